// Fused multi-head attention over packed sequences: the C++ API.
//
//   s[i, j] = softcap(scale * q[i] . k[j]) - alibi_slope * |i' - j|      i' = i + (len_k - len_q)
//   out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]                           over the visible keys j
//   lse[i]  = log(sum_j exp(s[i, j]) + exp(sink))                        natural logarithm
//
// Everything is per sequence: i counts its queries, j its keys, i' is the query's place when the last query
// stands level with the last key. Key j is visible to query i when
//   (not causal or j <= i')  and  (i' - window_left <= j <= i' + window_right  or  j < sink_tokens).
// softcap(x) is c * tanh(x / c), or x where c is 0. A row that sees no key gets zeros and an lse of -inf
// (or of the sink). Rows after the last sequence come back as zeros, lse too.
//
// Where a sequence's keys come in parts, every part is a call that adds to what the calls before it left (`sums`,
// `delta`). A sequence of such a call is a run of queries beside a run of keys, and `positions` say where both begin.
// attention_finish makes results of the sums, attention_delta what the backward's calls start from.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/executor.h"
#include "core/packed.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {

// Statistics (lse, dlse, sinks, alibi_slopes, dsinks) are float32, or float64 where the tensors are float64.
struct AttentionProblem {
  Dtype dtype;  // of q, k, v, out and their gradients; f64 on the CPU only
  int64_t total_q, total_k;
  int64_t sequences;
  int heads, kv_heads;          // heads is a multiple of kv_heads; query head h reads kv head h / (heads / kv_heads)
  int dim, dim_v;               // of q and k; of v and out
  const int32_t* cu_seqlens_q;  // [sequences + 1]
  const int32_t* cu_seqlens_k;  // [sequences + 1]
  Packed q;                     // [total_q, heads, dim]
  Packed k;                     // [total_k, kv_heads, dim]
  Packed v;                     // [total_k, kv_heads, dim_v]

  double scale;
  bool causal;
  int64_t window_left, window_right;  // -1: unbounded
  int64_t sink_tokens;
  double softcap;            // 0: none
  const void* alibi_slopes;  // [heads], may be nullptr
  const void* sinks;         // [heads], may be nullptr

  // [sequences, 2], each sequence's first query and first key: i' and j, and sink_tokens, count from there. nullptr:
  // the last query stands level with the last key.
  const int32_t* positions = nullptr;
};

struct AttentionForward {
  AttentionProblem problem;
  void* out;        // [total_q, heads, dim_v], contiguous
  void* lse;        // [total_q, heads]
  void* workspace;  // CUDA only: attention_forward_workspace(problem) bytes, 256-byte aligned

  // Not nullptr: [total_q, heads, 2], with e a whole number in units of log 2,
  //   out += sum_j exp(s[i, j] - e log 2) v[j]        in the statistics' type
  //   sums = (e, sum_j exp(s[i, j] - e log 2))        (-inf, 0) before the first key: then out may hold anything
  // where what stood there is brought to the new e, which is exact. lse and sinks are nullptr; slack rows stay.
  void* sums = nullptr;
};

struct AttentionBackward {
  AttentionProblem problem;
  Packed dout;       // [total_q, heads, dim_v]
  const void* out;   // [total_q, heads, dim_v], contiguous
  const void* lse;   // [total_q, heads]
  const void* dlse;  // [total_q, heads], may be nullptr
  void* dq;          // [total_q, heads, dim], contiguous
  void* dk;          // [total_k, kv_heads, dim], contiguous
  void* dv;          // [total_k, kv_heads, dim_v], contiguous
  void* dsinks;      // [heads]; nullptr where sinks is
  void* workspace;   // CUDA only: attention_backward_workspace(*this) bytes, 256-byte aligned

  // Not nullptr: [total_q, heads], rowsum(dout * out) - dlse. dq, dk and dv are of the statistics' type: dq is added
  // to, dk and dv are where `add_to_keys` says so, and else written. lse is that of all keys. out, dlse, sinks and
  // dsinks are nullptr; slack rows stay.
  const void* delta = nullptr;
  bool add_to_keys = false;
};

// AttentionForward's sums of all keys to results, of every row; zeros where no key was added.
struct AttentionFinish {
  Dtype dtype;  // of out
  int64_t rows;
  int heads, dim_v;
  const void* total;  // [rows, heads, dim_v], what `out` was there
  const void* sums;   // [rows, heads, 2]
  const void* sinks;  // [heads], may be nullptr
  void* out;          // [rows, heads, dim_v]
  void* lse;          // [rows, heads]
};

// AttentionBackward's delta, of every row.
struct AttentionDelta {
  Dtype dtype;  // of dout and out
  int64_t rows;
  int heads, dim_v;
  Packed dout;       // [rows, heads, dim_v]
  const void* out;   // [rows, heads, dim_v], contiguous
  const void* dlse;  // [rows, heads], may be nullptr
  void* delta;       // [rows, heads]
};

void attention_forward(const AttentionForward&, const Executor&);
void attention_backward(const AttentionBackward&, const Executor&);
void attention_finish(const AttentionFinish&, const Executor&);
void attention_delta(const AttentionDelta&, const Executor&);

#if PACKSEQ_HAS_CUDA
// On the GPU, rows of q, k, v and dout start at 16-byte boundaries: data, token and head strides are multiples of 16 B.
size_t attention_forward_workspace(const AttentionProblem&);
size_t attention_backward_workspace(const AttentionBackward&);  // whatever its workspace is
void attention_forward(const AttentionForward&, cudaStream_t);
void attention_backward(const AttentionBackward&, cudaStream_t);
void attention_finish(const AttentionFinish&, cudaStream_t);
void attention_delta(const AttentionDelta&, cudaStream_t);
#endif

}  // namespace packseq
