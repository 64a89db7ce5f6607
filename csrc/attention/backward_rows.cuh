// What the backward does row by row, before and after its main kernel: for every element type.
#pragma once
#include <cmath>

#include "attention/mask.h"
#include "attention/scores.cuh"
#include "core/device/mma.cuh"
#include "core/divide_up.h"
#include "core/launch.h"

namespace packseq {

// delta = rowsum(dout * out) - dlse unless the call has it, and lse in units of log 2.
struct RowStatistics {
  AttentionBackward call;
  float* lse;    // [heads, total_q]; +inf where the row sees no key, so that exp2(s - lse) is 0
  float* delta;  // [heads, total_q]
  int* turns;    // [turn_count], set to zero for the main kernel on the way
  int64_t turn_count;
};

// The sequence that row `row` of the queries belongs to.
__device__ inline int64_t sequence_of(const AttentionProblem& p, int64_t row) {
  int64_t low = 0, high = p.sequences;  // cu_seqlens[low] <= row < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.cu_seqlens_q[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Whether a row sees any key. Its lse tells, unless a sink holds that up.
__device__ inline bool sees_key(const AttentionBackward& call, int64_t row, float lse) {
  const AttentionProblem& p = call.problem;
  if (lse == -INFINITY) return false;
  if (!p.sinks) return true;
  const int64_t i = sequence_of(p, row);
  const Span q = span_of(p.cu_seqlens_q, p.sequences, p.total_q, i);
  const Mask mask(p, i, q.size(), span_of(p.cu_seqlens_k, p.sequences, p.total_k, i).size());
  const int query = int(row - q.begin);
  return KeyBlocks(mask, query, query + 1, 1).count > 0;
}

__device__ inline float dot_16_bytes(const uint4& a, const uint4& b, const float*) {
  const float4 &x = reinterpret_cast<const float4&>(a), &y = reinterpret_cast<const float4&>(b);
  return fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, x.w * y.w)));
}
template <class T>
__device__ float dot_16_bytes(const uint4& a, const uint4& b, const T*) {
  const uint32_t x[] = {a.x, a.y, a.z, a.w}, y[] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack_halves<T>(x[i]), v = unpack_halves<T>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

inline constexpr int kRowThreads = 256, kRowsAtOnce = 4;  // of a head each; so many loads are under way together

// The rows of a block's heads: eight lanes a row, 16 bytes a lane at a time.
struct RowItems {
  static constexpr int kLanes = 8, kItems = kRowThreads / kLanes;
  int64_t row[kRowsAtOnce];
  int head[kRowsAtOnce], lane;

  // Item i is row i / heads of head i % heads; one long division serves the block.
  __device__ explicit RowItems(int heads) : lane(threadIdx.x % kLanes) {
    const int64_t first = blockIdx.x * int64_t(kItems * kRowsAtOnce), first_row = first / heads;
    const int in_block = int(first - first_row * heads) + threadIdx.x / kLanes;
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int item = in_block + j * kItems;
      row[j] = first_row + item / heads;
      head[j] = item % heads;
    }
  }

  // rowsum(dout * out) of the rows before `rows`, to the lanes of each.
  template <class T>
  __device__ void dot(float (&sums)[kRowsAtOnce], const Packed& dout, const void* out, int heads, int dim,
                      int64_t rows) const {
    constexpr int kWidth = 16 / sizeof(T);
    for (int i = lane * kWidth; i < dim; i += kLanes * kWidth) {
      uint4 x[kRowsAtOnce] = {}, y[kRowsAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        if (row[j] >= rows) continue;
        const T* of_dout = static_cast<const T*>(dout.data) + row[j] * dout.token + head[j] * dout.head;
        const T* of_out = static_cast<const T*>(out) + (row[j] * heads + head[j]) * dim;
        x[j] = *reinterpret_cast<const uint4*>(of_dout + i);
        y[j] = *reinterpret_cast<const uint4*>(of_out + i);
      }
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) sums[j] += dot_16_bytes(x[j], y[j], static_cast<const T*>(nullptr));
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
#pragma unroll
      for (int offset = kLanes / 2; offset; offset /= 2) sums[j] += __shfl_xor_sync(~0u, sums[j], offset);
    }
  }
};

inline int64_t row_blocks(int64_t rows, int heads) { return divide_up(rows * heads, RowItems::kItems * kRowsAtOnce); }

template <class T>
__global__ void __launch_bounds__(kRowThreads) row_statistics_kernel(const __grid_constant__ RowStatistics params) {
  const AttentionBackward& call = params.call;
  const AttentionProblem& p = call.problem;
  for (int64_t i = blockIdx.x * int64_t(kRowThreads) + threadIdx.x; i < params.turn_count;
       i += gridDim.x * int64_t(kRowThreads)) {
    params.turns[i] = 0;
  }
  const RowItems items(p.heads);
  const int64_t rows = span_of(p.cu_seqlens_q, p.sequences, p.total_q, p.sequences).begin;  // slack is not read
  float sums[kRowsAtOnce] = {};
  if (!call.delta) items.dot<T>(sums, call.dout, call.out, p.heads, p.dim_v, rows);
#pragma unroll
  for (int j = 0; j < kRowsAtOnce; ++j) {
    const int64_t row = items.row[j];
    if (items.lane != 0 || row >= rows) continue;
    const int64_t from = row * p.heads + items.head[j], to = items.head[j] * p.total_q + row;
    const float lse = static_cast<const float*>(call.lse)[from];
    if (call.delta) sums[j] = static_cast<const float*>(call.delta)[from];
    params.delta[to] = sums[j] - (call.dlse ? static_cast<const float*>(call.dlse)[from] : 0.0f);
    params.lse[to] = sees_key(call, row, lse) ? lse * kLog2e : INFINITY;
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) delta_kernel(const __grid_constant__ AttentionDelta p) {
  const RowItems items(p.heads);
  float sums[kRowsAtOnce] = {};
  items.dot<T>(sums, p.dout, p.out, p.heads, p.dim_v, p.rows);
#pragma unroll
  for (int j = 0; j < kRowsAtOnce; ++j) {
    if (items.lane != 0 || items.row[j] >= p.rows) continue;
    const int64_t at = items.row[j] * p.heads + items.head[j];
    static_cast<float*>(p.delta)[at] = sums[j] - (p.dlse ? static_cast<const float*>(p.dlse)[at] : 0.0f);
  }
}

// dsinks[head] = -sum over rows of exp(sink - lse) * delta: one block a head, in a fixed order.
__global__ void sinks_gradient_kernel(const __grid_constant__ RowStatistics params) {
  constexpr int kThreads = 512;
  __shared__ float sums[kThreads];
  const AttentionProblem& p = params.call.problem;
  const int head = blockIdx.x;
  const float sink = static_cast<const float*>(p.sinks)[head];
  const int64_t rows = span_of(p.cu_seqlens_q, p.sequences, p.total_q, p.sequences).begin;
  float sum = 0.0f;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    const float lse = static_cast<const float*>(params.call.lse)[row * p.heads + head];
    if (lse != -INFINITY) sum -= expf(sink - lse) * params.delta[head * p.total_q + row];
  }
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<float*>(params.call.dsinks)[head] = sums[0];
}

// The float32 sums of dQ, columns in write_dq()'s order, to scale * dQ in the tensors' type.
struct StoreDq {
  AttentionBackward call;
  const float* lse;  // RowStatistics's: rows that see no key were never summed
  const float* dq;   // [heads, total_q, padded_dim]
  int padded_dim;
};

// A thread moves 16 columns of a row.
template <class T>
__global__ void __launch_bounds__(kRowThreads) store_dq_kernel(const __grid_constant__ StoreDq params) {
  const AttentionProblem& p = params.call.problem;
  const int groups = params.padded_dim / 16;
  const int64_t first = blockIdx.x * int64_t(kRowThreads), first_row = first / groups;
  const int in_block = int(first - first_row * groups) + int(threadIdx.x);
  const int64_t head_row = first_row + in_block / groups;
  const int col = in_block % groups * 16;
  if (head_row >= p.heads * p.total_q || col >= p.dim) return;
  const int head = int(head_row / p.total_q);
  const int64_t row = head_row - head * p.total_q;
  uint4 low = {}, high = {};
  const bool slack = row >= span_of(p.cu_seqlens_q, p.sequences, p.total_q, p.sequences).begin;
  const bool summed = !slack && params.lse[head_row] != INFINITY;
  const float4* sums = reinterpret_cast<const float4*>(params.dq + head_row * params.padded_dim + col);
  const float scale = float(p.scale);
  const int64_t at = (row * p.heads + head) * p.dim + col;
  if (summed) {
    uint32_t lows[4], highs[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 x = sums[t];
      lows[t] = pack_halves<T>(x.x * scale, x.y * scale);
      highs[t] = pack_halves<T>(x.z * scale, x.w * scale);
    }
    low = {lows[0], lows[1], lows[2], lows[3]};
    high = {highs[0], highs[1], highs[2], highs[3]};
  }
  T* to = static_cast<T*>(params.call.dq) + at;
  *reinterpret_cast<uint4*>(to) = low;
  if (col + 8 < p.dim) *reinterpret_cast<uint4*>(to + 8) = high;
}

}  // namespace packseq
