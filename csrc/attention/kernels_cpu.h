// What the CPU kernels of attention look like from outside, whatever the instruction set.
#pragma once
#include "attention/attention.h"
#include "core/cpu/isa.h"

namespace packseq {

// Queries q0 .. q1 of one sequence, in all the heads that share one head of k and v.
struct QueryTile {
  int64_t sequence;
  Span q, k;  // its rows
  int32_t q0, q1;
  int kv_head;
};

// One sequence in one head of k and v, and the heads of q that share it.
struct SequenceHead {
  int64_t sequence;
  Span q, k;
  int kv_head;
  double* dsinks;  // [heads]: adds each head's part; nullptr where there are no sinks
};

struct AttentionKernels {
  size_t (*forward_scratch)(const AttentionProblem&);
  // next: what the same thread does after this, or nullptr
  void (*forward)(const AttentionForward&, const QueryTile&, const QueryTile* next, void* scratch);
  size_t (*backward_scratch)(const AttentionProblem&, int64_t longest_k);
  void (*backward)(const AttentionBackward&, const SequenceHead&, const SequenceHead* next, void* scratch);
  // of the rows of heads that are numbered so
  void (*finish)(const AttentionFinish&, const Span&);
  void (*delta)(const AttentionDelta&, const Span&);
};

// Rows of a tile are the queries times the heads that share a head of k and v: at least one query, and as many as make
// `rows` rows; a sequence's tiles are of nearly equal size.
PACKSEQ_HOST_DEVICE int32_t queries_per_tile(const AttentionProblem& p, int64_t len_q, int64_t rows) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t most = rows > group ? rows / group : 1;
  const int64_t step = group < 32 ? 32 / group : 1;
  const int64_t tiles = (len_q + most - 1) / most;
  const int64_t even = tiles ? (len_q + tiles - 1) / tiles : 1;
  const int64_t whole = (even + step - 1) / step * step;
  return int32_t(whole < most ? whole : most);
}

// Rows of a forward tile: its queries and outputs should stay in the second-level cache.
PACKSEQ_HOST_DEVICE int64_t forward_tile_rows(const AttentionProblem& p) { return p.dim + p.dim_v <= 256 ? 256 : 128; }

constexpr int64_t kBackwardTileRows = 64;

namespace baseline {
AttentionKernels attention_kernels(Dtype);
}
namespace avx2 {
AttentionKernels attention_kernels(Dtype);
}
namespace avx512 {
AttentionKernels attention_kernels(Dtype);
}

}  // namespace packseq
