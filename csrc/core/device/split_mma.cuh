// Products of floats on tensor cores, of which each factor is the sum of two numbers of 11 bits: three products,
// without that of the lower parts. Large products and small ones are summed apart: what a tensor core cuts off depends
// on the largest number in a sum.
//
// A's factors, made where they are used, are split by cutting off, two operations; B's, made once for many uses, by
// rounding, so that what is left out has no sign of its own.
#pragma once
#include <cstdint>

#include "core/device/mma.cuh"

namespace packseq {

struct Split {
  uint32_t high, low;
};

// Tensor cores ignore the last 13 bits of a number. By 2^-23 of x more, the lower part is left what they take on
// average.
__device__ __forceinline__ Split split_by_cutting(float x) {
  const uint32_t high = __float_as_uint(x) & 0xffffe000u;
  return {high, __float_as_uint(fmaf(x, 1.0f + 0x1p-23f, -__uint_as_float(high)))};
}

// NaN stays NaN.
__device__ __forceinline__ Split split_by_rounding(float x) {
  const auto rounded = [](float y) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(y));
    return bits;
  };
  const uint32_t high = rounded(x);
  return {high, rounded(x - __uint_as_float(high))};
}

// Fragments of a split A[16, 8].
struct SplitRows {
  uint32_t high[4], low[4];

  // x[row][column]: of rows g and g + 8, columns t and t + 4.
  __device__ __forceinline__ explicit SplitRows(const float (&x)[2][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split parts = split_by_cutting(x[i % 2][i / 2]);
      high[i] = parts.high, low[i] = parts.low;
    }
  }
};

// A sum [16, 8] of such products.
struct SplitSum {
  float large[4] = {}, small[4] = {};

  // b: B's fragments {high, high, low, low}.
  __device__ __forceinline__ void add(const SplitRows& a, uint4 b) {
    mma_16x8x8_tf32(small, a.low, b.x, b.y);
    mma_16x8x8_tf32(small, a.high, b.z, b.w);
    mma_16x8x8_tf32(large, a.high, b.x, b.y);
  }
  __device__ __forceinline__ float operator[](int i) const { return large[i] + small[i]; }
};

// Writes element (k, n) of B[8, 8] into fragments kept in shared memory lane by lane: column t of A then stands for
// k = 2 t, t + 4 for 2 t + 1.
__device__ __forceinline__ void store_split(uint4* fragments, int k, int n, float x) {
  uint32_t* const to = reinterpret_cast<uint32_t*>(fragments + n * 4 + k / 2) + k % 2;
  const Split parts = split_by_rounding(x);
  to[0] = parts.high, to[2] = parts.low;
}

}  // namespace packseq
