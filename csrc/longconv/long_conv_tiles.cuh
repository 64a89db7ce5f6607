// The tiles that each size is worked in, and the way from a size known at run time to its tile.
#pragma once
#include <algorithm>

#include "core/dispatch.h"
#include "longconv/long_conv_plan.cuh"

namespace packseq::longconv {

// Of the convolution: eight channels are a sector of float32; of the largest size four is what fits.
template <int kSize>
using ConvTile = FftTile<kSize, (kSize <= 2048 ? 8 : 4)>;

// Of the filter's gradient, whose threads hold two spectra.
template <int kSize>
using GradientTile = FftTile<kSize, (kSize <= 1024 ? 4096 : 8192) / kSize>;

// f(constant<size>) for the class, and what it returns.
template <class F>
PACKSEQ_HOST_DEVICE auto with_size(int c, F&& f) {
  switch (c) {
    case 1:
      return f(constant<128>{});
    case 2:
      return f(constant<256>{});
    case 3:
      return f(constant<512>{});
    case 4:
      return f(constant<1024>{});
    case 5:
      return f(constant<2048>{});
    default:
      return f(constant<4096>{});
  }
}

// f(constant<c>) for every class of transforms that the device has, the longest first.
template <int c = kFftClasses, class F>
__device__ __forceinline__ void for_classes(int fft_classes, const F& f) {
  if (c <= fft_classes) f(constant<c>{});
  if constexpr (c > 1) for_classes<c - 1>(fft_classes, f);
}

// In front of what a block of threads uses as it likes: the kernel's parameters, what every team works on, a loop
// counter of every warp, opaque()'s zero and two numbers of the block. Loops have long bodies that leave no register
// for what is needed only between them, parameters among it: what is read from here is read again behind every barrier.
constexpr int kMostWarps = 16, kParamsBytes = 512;
struct Step {
  ListedRows rows;
  uint32_t item, channel_tile;
  uint32_t chunk, at;  // which of the class, and which sequence of the chunk, where items are chunks

  static constexpr uint32_t kNone = ~0u;  // as an item: there is no such step
};
struct Turn {
  Step now, next;
};
constexpr int kFrontBytes = kParamsBytes + kMostWarps * (sizeof(Turn) + sizeof(uint32_t)) + kOpaqueBytes;

template <class Params>
__device__ __forceinline__ const Params& keep_params(float4* shared_memory, const Params& p) {
  static_assert(sizeof(Params) <= kParamsBytes && sizeof(Params) % sizeof(uint32_t) == 0);
  for (int i = threadIdx.x; i < int(sizeof(Params) / sizeof(uint32_t)); i += blockDim.x) {
    reinterpret_cast<uint32_t*>(shared_memory)[i] = reinterpret_cast<const uint32_t*>(&p)[i];
  }
  return *reinterpret_cast<const Params*>(shared_memory);
}
// What is free, when all threads have come.
__device__ __forceinline__ float4* start_shared(float4* shared_memory) {
  return start_opaque(shared_memory + (kFrontBytes - kOpaqueBytes) / sizeof(float4));
}
__device__ __forceinline__ volatile uint32_t& block_number(float4* shared, int i) {
  return reinterpret_cast<volatile uint32_t*>(shared - 1)[1 + i];
}
__device__ __forceinline__ volatile uint32_t& warp_counter(float4* shared) {
  return reinterpret_cast<volatile uint32_t*>(shared - 1)[-1 - opaque(int(threadIdx.x), shared) / 32];
}
__device__ __forceinline__ Turn& turn_of(float4* shared, int team) {
  return reinterpret_cast<Turn*>(shared - (kFrontBytes - kParamsBytes) / sizeof(float4))[team];
}
__device__ __forceinline__ void advance(float4* shared, uint32_t step) {
  __syncwarp();
  const uint32_t next = warp_counter(shared) + step;
  __syncwarp();
  warp_counter(shared) = next;
  __syncwarp();
}

// f(item) for those of `items` that are this team's turn. A block of threads takes as many at a time as it has teams of
// kThreads threads, beginning with its place `unit` and in steps of the grid; `unit` becomes its place among what comes
// after these items. The block's threads come in together.
template <int kThreads, class F>
__device__ __forceinline__ void for_items(float4* shared, uint32_t& unit, uint32_t items, const F& f) {
  const auto teams = [] { return blockDim.x / kThreads; };
  __syncthreads();  // what came before laid the shared memory out otherwise
  block_number(shared, 0) = items, warp_counter(shared) = unit;
  __syncthreads();
  for (; warp_counter(shared) * teams() < block_number(shared, 0); advance(shared, gridDim.x)) {
    const uint32_t item = warp_counter(shared) * teams() + opaque(int(threadIdx.x), shared) / kThreads;
    if (item < block_number(shared, 0)) f(item);
  }
  unit = warp_counter(shared) - (block_number(shared, 0) + teams() - 1) / teams();
}

// Rows are staged on Hopper and later GPUs, which have the shared memory for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kCanStage = false;
#else
inline constexpr bool kCanStage = true;
#endif

// The class that blocks of longer sequences have: by how much shared memory a block of threads can have.
inline constexpr int kLargeClass = 6, kSmallClass = 4;

template <class F>
void with_largest_size(int fft_classes, F&& f) {
  fft_classes == kLargeClass ? f(constant<4096>{}) : f(constant<1024>{});
}

// Threads of a block that convolves, and the shared memory of so many.
constexpr int conv_threads(int fft_classes) { return fft_classes == kLargeClass ? 512 : 256; }

// Shared memory of a block of so many threads.
template <class Tile>
constexpr size_t shared_bytes(int threads) {
  return kFrontBytes + Tile::used(threads) * sizeof(float4);
}
template <template <int> class TileOf>
constexpr size_t most_shared_bytes(int threads) {
  return std::max({shared_bytes<TileOf<128>>(threads), shared_bytes<TileOf<256>>(threads),
                   shared_bytes<TileOf<512>>(threads), shared_bytes<TileOf<1024>>(threads),
                   shared_bytes<TileOf<2048>>(threads), shared_bytes<TileOf<4096>>(threads)});
}
constexpr size_t conv_shared_bytes(int threads) { return most_shared_bytes<ConvTile>(threads); }

}  // namespace packseq::longconv
