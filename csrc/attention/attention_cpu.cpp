// Attention on the CPU: lays out the work and hands it to the kernels of the machine's instruction set.
//
// Work is cut by the sequence's own length, and every piece owns the rows that it writes. So the result depends
// neither on the number of threads nor on what else is in the batch.
#include <vector>

#include "attention/attention.h"
#include "attention/kernels_cpu.h"
#include "attention/mask.h"
#include "core/cpu/memory.h"
#include "core/cpu/work_list.h"

namespace packseq {

namespace {

Span queries_of(const AttentionProblem& p, int64_t i) { return span_of(p.cu_seqlens_q, p.sequences, p.total_q, i); }
Span keys_of(const AttentionProblem& p, int64_t i) { return span_of(p.cu_seqlens_k, p.sequences, p.total_k, i); }

// How many keys the queries q0 .. q1 may see, to the nearest block.
double visible_keys(const Mask& mask, int32_t q0, int32_t q1) {
  constexpr int32_t block = 64;
  return double(KeyBlocks(mask, q0, q1, block).count) * block;
}

// Multiply-adds of a tile, and what loading its rows and keys is worth.
double tile_cost(const AttentionProblem& p, const Mask& mask, int32_t q0, int32_t q1) {
  const double rows = double(q1 - q0) * (p.heads / p.kv_heads), keys = visible_keys(mask, q0, q1);
  return (p.dim + p.dim_v) * ((rows + 8) * keys + 32 * rows + 64);
}

struct Place {
  int64_t sequence;
  int32_t q0, q1;
};

}  // namespace

void attention_forward(const AttentionForward& f, const Executor& executor) {
  const AttentionProblem& p = f.problem;
  const Span slack = queries_of(p, p.sequences);
  const size_t stat = p.dtype == Dtype::f64 ? 8 : 4;
  if (!f.sums) {
    zero_rows(f.out, slack, size_t(p.heads) * p.dim_v * size_of(p.dtype));
    zero_rows(f.lse, slack, p.heads * stat);
  }

  WorkList<Place> work;
  const int64_t rows = forward_tile_rows(p);
  for (int64_t i = 0; i < p.sequences; ++i) {
    const int64_t len_q = queries_of(p, i).size();
    const Mask mask(p, i, len_q, keys_of(p, i).size());
    const int32_t queries = queries_per_tile(p, len_q, rows);
    for (int64_t q0 = 0; q0 < len_q; q0 += queries) {
      const int32_t q1 = int32_t(q0 + queries < len_q ? q0 + queries : len_q);
      work.add({i, int32_t(q0), q1}, tile_cost(p, mask, int32_t(q0), q1));
    }
  }
  const AttentionKernels kernels = PACKSEQ_BY_ISA(attention_kernels(p.dtype));
  const int workers = work.workers(executor, p.kv_heads);
  const AlignedMemory scratch(workers, kernels.forward_scratch(p));
  using Piece = WorkList<Place>::Piece;
  const auto tile = [&](const Piece& x) {
    const int64_t i = x.item->sequence;
    return QueryTile{i, queries_of(p, i), keys_of(p, i), x.item->q0, x.item->q1, int(x.copy)};
  };
  work.run(executor, workers, p.kv_heads, [&](const Piece& piece, const Piece& next, int64_t worker) {
    const QueryTile after = next.item ? tile(next) : QueryTile{};
    kernels.forward(f, tile(piece), next.item ? &after : nullptr, scratch[worker]);
  });
}

void attention_backward(const AttentionBackward& b, const Executor& executor) {
  const AttentionProblem& p = b.problem;
  const Span slack_q = queries_of(p, p.sequences), slack_k = keys_of(p, p.sequences);
  if (!b.delta) {
    zero_rows(b.dq, slack_q, size_t(p.heads) * p.dim * size_of(p.dtype));
    zero_rows(b.dk, slack_k, size_t(p.kv_heads) * p.dim * size_of(p.dtype));
    zero_rows(b.dv, slack_k, size_t(p.kv_heads) * p.dim_v * size_of(p.dtype));
  }

  WorkList<int64_t> work;
  int64_t longest_k = 0;
  for (int64_t i = 0; i < p.sequences; ++i) {
    const int64_t len_q = queries_of(p, i).size(), len_k = keys_of(p, i).size();
    if (!len_q && !len_k) continue;
    longest_k = len_k > longest_k ? len_k : longest_k;
    const Mask mask(p, i, len_q, len_k);
    double cost = double(len_k) * (p.dim + p.dim_v);
    for (int64_t q0 = 0; q0 < len_q; q0 += 512) {
      cost += 2.5 * tile_cost(p, mask, int32_t(q0), int32_t(q0 + 512 < len_q ? q0 + 512 : len_q));
    }
    work.add(i, cost);
  }
  std::vector<double> dsinks(p.sinks ? p.sequences * p.heads : 0);
  const AttentionKernels kernels = PACKSEQ_BY_ISA(attention_kernels(p.dtype));
  const int workers = work.workers(executor, p.kv_heads);
  const AlignedMemory scratch(workers, kernels.backward_scratch(p, longest_k));
  using Piece = WorkList<int64_t>::Piece;
  const auto sequence = [&](const Piece& x) {
    double* const parts = p.sinks ? dsinks.data() + *x.item * p.heads : nullptr;
    return SequenceHead{*x.item, queries_of(p, *x.item), keys_of(p, *x.item), int(x.copy), parts};
  };
  work.run(executor, workers, p.kv_heads, [&](const Piece& piece, const Piece& next, int64_t worker) {
    const SequenceHead after = next.item ? sequence(next) : SequenceHead{};
    kernels.backward(b, sequence(piece), next.item ? &after : nullptr, scratch[worker]);
  });
  for (int h = 0; p.sinks && h < p.heads; ++h) {
    double sum = 0;
    for (int64_t i = 0; i < p.sequences; ++i) sum += dsinks[i * p.heads + h];
    if (p.dtype == Dtype::f64) {
      static_cast<double*>(b.dsinks)[h] = sum;
    } else {
      static_cast<float*>(b.dsinks)[h] = float(sum);
    }
  }
}

namespace {

constexpr int64_t kRowGrain = 64;  // rows of a head that are worth a thread

}  // namespace

void attention_finish(const AttentionFinish& f, const Executor& executor) {
  const AttentionKernels kernels = PACKSEQ_BY_ISA(attention_kernels(f.dtype));
  executor.parallel_for(f.rows * f.heads, kRowGrain, [&](int64_t begin, int64_t end) {
    kernels.finish(f, {begin, end});
  });
}

void attention_delta(const AttentionDelta& d, const Executor& executor) {
  const AttentionKernels kernels = PACKSEQ_BY_ISA(attention_kernels(d.dtype));
  executor.parallel_for(d.rows * d.heads, kRowGrain, [&](int64_t begin, int64_t end) {
    kernels.delta(d, {begin, end});
  });
}

}  // namespace packseq
