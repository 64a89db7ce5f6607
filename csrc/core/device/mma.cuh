// Tensor-core products from Ampere on: one warp, D[16, 8] += A[16, 16] B[16, 8], float32 accumulators.
//
// With g = lane / 4 and t = lane % 4 a thread holds
//   A: {(g, 2t..2t+1), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, two elements a register
//   B: {(2t..2t+1, g), (2t + 8.., g)}
//   C, D: {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}
// so two neighbouring C tiles, packed to halves, are the A tile of the next product.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace packseq {

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D[16, 8] += A[16, 8] B[8, 8] of numbers of 11 bits (tf32: floats whose last 13 bits are 0); with g and t as above
//   A: {(g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)}      B: {(t, g), (t + 4, g)}
// The products are exact; their sum is cut off, not rounded.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum[16 kRows, 8 kColTiles] += A B over kDepth products of depth 16: load_a(a, k) fills A's fragments of all rows,
// load_b(b, k, n) B's of columns 16 n .. 16 n + 16. The compiler moves the loads ahead as far as registers allow.
template <class T, int kDepth, int kRows, int kColTiles, class LoadA, class LoadB>
__device__ __forceinline__ void multiply(float (&sum)[kRows][kColTiles][4], const LoadA& load_a, const LoadB& load_b) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    uint32_t a[kRows][4];
    load_a(a, k);
#pragma unroll
    for (int n = 0; n < kColTiles / 2; ++n) {
      uint32_t b[4];
      load_b(b, k, n);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        mma_16x8x16<T>(sum[m][2 * n], a[m], b[0], b[1]);
        mma_16x8x16<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Two floats as two halves in one register, the first in the low bits.
template <class T>
__device__ __forceinline__ uint32_t pack_halves(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_halves<__half>(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(h);
}

template <>
__device__ __forceinline__ uint32_t pack_halves<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(h);
}

// Columns 16 k .. 16 k + 16 of accumulators as an A fragment.
template <class T, int kColTiles>
__device__ __forceinline__ void pack_fragment(uint32_t (&a)[4], const float (&c)[kColTiles][4], int k) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float(&pair)[4] = c[2 * k + j / 2];
    a[j] = pack_halves<T>(pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack_halves(uint32_t x);

template <>
__device__ __forceinline__ float2 unpack_halves<__half>(uint32_t x) {
  return __half22float2(reinterpret_cast<const __half2&>(x));
}

template <>
__device__ __forceinline__ float2 unpack_halves<__nv_bfloat16>(uint32_t x) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
}

}  // namespace packseq
