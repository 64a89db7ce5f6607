// Attention on the GPU, host side: lays out the workspace, lists the tiles, picks the kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <iterator>

#include "attention/attention.h"
#include "attention/attention_f32.h"
#include "attention/attention_sm80.h"
#include "attention/backward_rows.cuh"
#include "attention/forward_rows.cuh"
#include "core/check.h"
#include "core/dispatch.h"
#include "core/divide_up.h"
#include "core/launch.h"
#include "core/schedule.h"
#include "core/shared_memory.h"
#include "core/workspace.h"

namespace packseq {
namespace {

bool is_half(const AttentionProblem& p) { return p.dtype != Dtype::f32; }

// The head dim the tensor-core kernels are built for that holds both of the problem's.
int padded_dim(const AttentionProblem& p) {
  const auto* dim = std::lower_bound(std::begin(sm80::kDims), std::end(sm80::kDims), std::max(p.dim, p.dim_v));
  check(dim != std::end(sm80::kDims), "attention: head dims must be at most 256, got ", p.dim, " and ", p.dim_v);
  return *dim;
}

// Whether the current device needs the backward's variants for little shared memory.
bool small_shared() { return most_shared_memory("attention backward") < size_t(sm80::kLargeShared); }

struct TileList {
  Tile* tiles;
  int64_t places;
  int rows;
};

TileList take_tiles(Workspace& pieces, const AttentionProblem& p, int64_t total, int rows) {
  const int64_t places = tile_capacity(total, p.sequences, rows);
  return {pieces.take<Tile>(places), places, rows};
}

struct ForwardWorkspace {
  Workspace pieces;
  TileList queries;

  ForwardWorkspace(const AttentionProblem& p, void* base)
      : pieces(base),
        queries(take_tiles(pieces, p, p.total_q, is_half(p) ? sm80::forward_rows(padded_dim(p)) : kF32Rows)) {}
};

struct BackwardWorkspace {
  bool small = small_shared();
  Workspace pieces;
  float *lse, *delta;
  TileList keys;
  TileList queries;  // float32 only
  float* dq;         // half types only, like turns, and where dq leaves in the tensors' type
  int* turns;
  int64_t turn_count;

  explicit BackwardWorkspace(const AttentionBackward& call) : BackwardWorkspace(call, call.problem) {}

 private:
  BackwardWorkspace(const AttentionBackward& call, const AttentionProblem& p)
      : pieces(call.workspace),
        lse(pieces.take<float>(p.heads * p.total_q)),
        delta(pieces.take<float>(p.heads * p.total_q)),
        keys(take_tiles(pieces, p, p.total_k, is_half(p) ? sm80::backward_rows(padded_dim(p), small) : kF32Rows)),
        queries(take_tiles(pieces, p, is_half(p) ? 0 : p.total_q, kF32Rows)),
        dq(pieces.take<float>(is_half(p) && !call.delta ? p.heads * p.total_q * padded_dim(p) : 0)),
        turn_count(is_half(p) ? p.heads * sm80::turn_slots(p, padded_dim(p)) : 0) {
    turns = pieces.take<int>(turn_count);
  }
};

void list_queries(const TileList& list, const AttentionProblem& p, cudaStream_t stream) {
  build_tile_schedule({.cu_seqlens = p.cu_seqlens_q,
                       .cu_work = p.cu_seqlens_k,
                       .sequences = p.sequences,
                       .total = p.total_q,
                       .total_work = p.total_k,
                       .rows = list.rows,
                       .order = TileOrder::together,
                       .tiles = list.tiles},
                      stream);
}

void list_keys(const TileList& list, const AttentionProblem& p, cudaStream_t stream) {
  build_tile_schedule({.cu_seqlens = p.cu_seqlens_k,
                       .cu_work = p.cu_seqlens_q,
                       .sequences = p.sequences,
                       .total = p.total_k,
                       .total_work = p.total_q,
                       .rows = list.rows,
                       .order = p.causal ? TileOrder::spread_falling : TileOrder::together,
                       .tiles = list.tiles},
                      stream);
}

// f(type, padded head dim) for the half types.
template <class F>
void dispatch_half(const AttentionProblem& p, const F& f) {
  dispatch<64, 96, 128, 192, 256>("padded head dim", padded_dim(p), [&](auto dim) {
    if (p.dtype == Dtype::bf16) {
      f(__nv_bfloat16{}, dim);
    } else {
      f(__half{}, dim);
    }
  });
}

// f(type) for all of a GPU's.
template <class F>
void dispatch_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::bf16) {
    f(__nv_bfloat16{});
  } else if (dtype == Dtype::f16) {
    f(__half{});
  } else {
    f(float{});
  }
}

template <class T>
void row_statistics(const RowStatistics& rows, cudaStream_t stream) {
  const AttentionProblem& p = rows.call.problem;
  launch("attention row statistics", row_statistics_kernel<T>, row_blocks(p.total_q, p.heads), kRowThreads, 0, stream,
         rows);
}

}  // namespace

size_t attention_forward_workspace(const AttentionProblem& p) { return ForwardWorkspace(p, nullptr).pieces.used(); }
size_t attention_backward_workspace(const AttentionBackward& call) { return BackwardWorkspace(call).pieces.used(); }

void attention_forward(const AttentionForward& call, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const ForwardWorkspace work(p, call.workspace);
  list_queries(work.queries, p, stream);
  if (!is_half(p)) return attention_forward_f32(call, work.queries.tiles, work.queries.places, stream);
  dispatch_half(p, [&](auto type, auto dim) {
    sm80::forward<decltype(type), dim>(call, work.queries.tiles, work.queries.places, stream);
  });
}

void attention_backward(const AttentionBackward& call, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  const BackwardWorkspace work(call);
  const RowStatistics rows = {
      .call = call, .lse = work.lse, .delta = work.delta, .turns = work.turns, .turn_count = work.turn_count};
  list_keys(work.keys, p, stream);
  if (!is_half(p)) {
    row_statistics<float>(rows, stream);
    list_queries(work.queries, p, stream);
    attention_backward_f32(call, work.delta, work.queries.tiles, work.queries.places, work.keys.tiles, work.keys.places,
                           stream);
  } else {
    dispatch_half(p, [&](auto type, auto dim) {
      using T = decltype(type);
      row_statistics<T>(rows, stream);
      const sm80::BackwardScratch scratch = {.lse = work.lse, .delta = work.delta, .dq = work.dq, .turns = work.turns};
      sm80::backward<T, dim>(call, scratch, work.small, work.keys.tiles, work.keys.places, stream);
      if (call.delta) return;
      launch("attention dq", store_dq_kernel<T>, divide_up(p.heads * p.total_q * (dim / 16), kRowThreads), kRowThreads,
             0, stream, {.call = call, .lse = work.lse, .dq = work.dq, .padded_dim = dim});
    });
  }
  if (p.sinks) launch("attention dsinks", sinks_gradient_kernel, p.heads, 512, 0, stream, rows);
}

void attention_finish(const AttentionFinish& call, cudaStream_t stream) {
  dispatch_type(call.dtype, [&](auto type) {
    launch("attention finish", finish_kernel<decltype(type)>,
           divide_up(call.rows * call.heads * (call.dim_v / 8), kFinishThreads), kFinishThreads, 0, stream, call);
  });
}

void attention_delta(const AttentionDelta& call, cudaStream_t stream) {
  dispatch_type(call.dtype, [&](auto type) {
    launch("attention delta", delta_kernel<decltype(type)>, row_blocks(call.rows, call.heads), kRowThreads, 0, stream,
           call);
  });
}

}  // namespace packseq
