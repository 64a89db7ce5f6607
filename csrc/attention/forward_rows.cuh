// What the forward does row by row after the last part of the keys: for every element type.
#pragma once
#include "attention/attention.h"
#include "attention/scores.cuh"
#include "core/device/mma.cuh"

namespace packseq {

inline constexpr int kFinishThreads = 256;

__device__ inline void store_8(float* to, const float4& x, const float4& y) {
  reinterpret_cast<float4*>(to)[0] = x;
  reinterpret_cast<float4*>(to)[1] = y;
}
template <class T>
__device__ void store_8(T* to, const float4& x, const float4& y) {
  *reinterpret_cast<uint4*>(to) = {pack_halves<T>(x.x, x.y), pack_halves<T>(x.z, x.w), pack_halves<T>(y.x, y.y),
                                   pack_halves<T>(y.z, y.w)};
}

// A thread has 8 columns of a row of a head.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ AttentionFinish p) {
  const int groups = p.dim_v / 8;
  const int64_t first = blockIdx.x * int64_t(kFinishThreads), first_row = first / groups;  // of a head
  const int in_block = int(first - first_row * groups) + int(threadIdx.x);
  const int64_t row = first_row + in_block / groups;
  const int group = in_block % groups;
  if (row >= p.rows * p.heads) return;
  const int64_t at = row * p.dim_v + group * 8;
  const float4* const total = reinterpret_cast<const float4*>(static_cast<const float*>(p.total) + at);
  const float2 sums = static_cast<const float2*>(p.sums)[row];
  float4 x = total[0], y = total[1];

  const bool seen = sums.y != 0.0f;
  const float sink = p.sinks ? static_cast<const float*>(p.sinks)[row % p.heads] * kLog2e : -INFINITY;
  const float top = seen ? fmaxf(sums.x, sink) : sink;
  const float keep = seen ? exp2f(sums.x - top) : 0.0f;  // not of -inf - -inf
  const float weight = sums.y * keep + (sink == -INFINITY ? 0.0f : exp2f(sink - top));
  const float by = keep / weight;
  const auto scaled = [&](float z) { return seen ? z * by : 0.0f; };
  x = {scaled(x.x), scaled(x.y), scaled(x.z), scaled(x.w)};
  y = {scaled(y.x), scaled(y.y), scaled(y.z), scaled(y.w)};
  store_8(static_cast<T*>(p.out) + at, x, y);
  if (group == 0) {
    const bool nothing = !seen && sink == -INFINITY;
    static_cast<float*>(p.lse)[row] = nothing ? -INFINITY : top * kLn2 + logf(weight);
  }
}

}  // namespace packseq
