// Loops of mma.sync and nothing else: what the tensor cores give to kernels written with it, Ampere's and ours.
// On Hopper that is less than its wgmma gives, so it is the ceiling that a percentage of those kernels is honest about.
#pragma once
#include <cuda_bf16.h>

#include "core/device/mma.cuh"
#include "core/device/shared_tile.cuh"
#include "core/launch.h"
#include "device_memory.cuh"

namespace packseq::bench {

struct MmaLoop {
  int iterations;
  float* sink;  // never written: keeps the sums alive
};

constexpr int kMmaThreads = 128;
constexpr int kMmaKeys = 64,
              kMmaDim = 64;  // of the product of one iteration: [16 kRows, kMmaDim] x [kMmaDim, kMmaKeys]

template <int kRows>
constexpr double mma_loop_flops(double warps, double iterations) {
  return warps * iterations * 2.0 * (16 * kRows) * kMmaDim * kMmaKeys;
}

// Two bfloat16 of random sign and mantissa, 0.5 to 2 in size: zeros would draw less power and flatter the clock.
__device__ inline uint32_t random_halves(uint32_t x) {
  x = (x + 1) * 0x9E3779B9u;
  x = (x ^ (x >> 15)) * 0x85EBCA6Bu;
  return ((x ^ (x >> 13)) & 0x80FF80FFu) | 0x3F003F00u;
}

template <int kTiles, int kRows>
__device__ void keep(const float (&sum)[kRows][kTiles][4], float* sink) {
  float all = 0;
#pragma unroll
  for (int i = 0; i < kRows * kTiles * 4; ++i) all += sum[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
  if (all == 0.123456789f) *sink = all;
}

// One iteration's product; load_a(a, k) and load_b(b, k, n) fetch fragments, B's one ahead of their use.
template <int kRows, class LoadA, class LoadB>
__device__ __forceinline__ void multiply_once(float (&sum)[kRows][kMmaKeys / 8][4], const LoadA& load_a,
                                              const LoadB& load_b) {
  constexpr int kCols = kMmaKeys / 16, kSteps = kMmaDim / 16 * kCols;
  uint32_t a[2][kRows][4], b[2][4];
  load_a(a[0], 0);
  load_b(b[0], 0, 0);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int k = i / kCols, n = i % kCols;
    if (i + 1 < kSteps) load_b(b[(i + 1) % 2], (i + 1) / kCols, (i + 1) % kCols);
    if (n == 0 && i + kCols < kSteps) load_a(a[(k + 1) % 2], k + 1);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      mma_16x8x16<__nv_bfloat16>(sum[m][2 * n], a[k % 2][m], b[i % 2][0], b[i % 2][1]);
      mma_16x8x16<__nv_bfloat16>(sum[m][2 * n + 1], a[k % 2][m], b[i % 2][2], b[i % 2][3]);
    }
  }
}

// Operands never leave the registers. A warp computes 16 kRows rows.
template <int kRows>
__global__ void __launch_bounds__(kMmaThreads) mma_registers_kernel(const __grid_constant__ MmaLoop loop) {
  float sum[kRows][kMmaKeys / 8][4] = {};
  uint32_t a[kRows][4], b[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) a[m][i] = random_halves(threadIdx.x * 37 + 4 * m + i);
    b[i] = random_halves(threadIdx.x * 53 + 101 + i);
  }
#pragma unroll 1
  for (int n = 0; n < loop.iterations; ++n) {
    multiply_once(
        sum, [&](uint32_t(&to)[kRows][4], int) { memcpy(to, a, sizeof(a)); },
        [&](uint32_t(&to)[4], int, int) { memcpy(to, b, sizeof(b)); });
  }
  keep(sum, loop.sink);
}

// Both operands come from shared memory through ldmatrix, as the scores' product Q K^T takes them.
template <int kRows>
__global__ void __launch_bounds__(kMmaThreads) mma_shared_kernel(const __grid_constant__ MmaLoop loop) {
  using Queries = SharedTile<16 * kRows*(kMmaThreads / 32), kMmaDim>;
  using Keys = SharedTile<kMmaKeys, kMmaDim>;
  __shared__ alignas(1024) uint32_t tiles[(Queries::kBytes + Keys::kBytes) / 4];
  for (int i = threadIdx.x; i < int(std::size(tiles)); i += kMmaThreads) tiles[i] = random_halves(i);
  __syncthreads();

  const int lane = threadIdx.x % 32, first_row = int(threadIdx.x / 32) * 16 * kRows;
  const uint32_t queries = shared_address(tiles), keys = queries + Queries::kBytes;
  const uint32_t a_part = rows_first(lane), b_part = columns_first(lane);
  float sum[kRows][kMmaKeys / 8][4] = {};
#pragma unroll 1
  for (int n = 0; n < loop.iterations; ++n) {
    multiply_once(
        sum,
        [&](uint32_t(&to)[kRows][4], int k) {
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            load_matrix_x4(to[m], fragment<Queries>(queries, a_part, first_row + 16 * m, k));
          }
        },
        [&](uint32_t(&to)[4], int k, int column) { load_matrix_x4(to, fragment<Keys>(keys, b_part, 16 * column, k)); });
  }
  keep(sum, loop.sink);
}

// FLOP/s of mma.sync out of registers on the current device, from runs of about a millisecond.
inline double measure_mma_peak(cudaStream_t stream) {
  constexpr int kRows = 2, kBlocksPerSm = 2, kIterations = 4096;
  int device = 0, sms = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "device");
  const int blocks = sms * kBlocksPerSm;
  const double seconds = median_seconds(stream, [&] {
    launch("mma loop", mma_registers_kernel<kRows>, blocks, kMmaThreads, 0, stream,
           {.iterations = kIterations, .sink = nullptr});
  });
  return mma_loop_flops<kRows>(blocks * (kMmaThreads / 32.0), kIterations) / seconds;
}

}  // namespace packseq::bench
