// The tiles that each size is worked in, and the way from a size known at run time to its tile.
#pragma once
#include <algorithm>

#include "core/dispatch.h"
#include "longconv/long_conv_plan.cuh"

namespace packseq::longconv {

// Of the convolution: eight channels are a sector of float32.
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

// f(item) for those of `items` that are this team's turn. A block of threads takes as many at a time as it has teams of
// kThreads threads, beginning with its place `unit` and in steps of the grid; `unit` becomes its place among what comes
// after these items. The block's threads come in together. Where the loop stands is kept beside opaque()'s zero.
template <int kThreads, class F>
__device__ __forceinline__ void for_items(float4* shared, uint32_t& unit, uint32_t items, const F& f) {
  volatile uint32_t* const kept = reinterpret_cast<volatile uint32_t*>(shared - 1) + 1;
  const uint32_t teams = blockDim.x / kThreads;
  __syncthreads();  // what came before laid the shared memory out otherwise
  if (threadIdx.x == 0) *kept = items;
  __syncthreads();
  for (; unit * (blockDim.x / kThreads) < *kept; unit += gridDim.x) {
    const uint32_t item = unit * (blockDim.x / kThreads) + opaque(int(threadIdx.x), shared) / kThreads;
    if (item < *kept) f(item);
  }
  unit -= (*kept + teams - 1) / teams;
}

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
  return kOpaqueBytes + size_t(threads / Tile::kThreads) * Tile::kShared * sizeof(float2);
}
template <template <int> class TileOf>
constexpr size_t most_shared_bytes(int threads) {
  return std::max({shared_bytes<TileOf<128>>(threads), shared_bytes<TileOf<256>>(threads),
                   shared_bytes<TileOf<512>>(threads), shared_bytes<TileOf<1024>>(threads),
                   shared_bytes<TileOf<2048>>(threads), shared_bytes<TileOf<4096>>(threads)});
}
constexpr size_t conv_shared_bytes(int threads) { return most_shared_bytes<ConvTile>(threads); }

}  // namespace packseq::longconv
