// Sequences in blocks: the transforms of all blocks into device memory, and out of it.
#pragma once
#include "core/launch.h"
#include "longconv/long_conv_rows.cuh"

namespace packseq::longconv {
namespace {

// f(block's place in the list, tile, piece) for every block and tile of channels that is this block of threads' turn.
template <class Tile, class F>
__device__ void for_blocks(const BlockParams& p, float4* shared, const F& f) {
  const Tile tile(shared, p.shape.table);
  const int64_t tiles = divide_up(p.channels, Tile::kChannels), items = p.shape.plan->long_blocks * tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const LongBlock block = p.shape.blocks[item / tiles];
    const int64_t channel = item % tiles * Tile::kChannels + tile.channel;
    Piece piece = Piece::of(p.shape, block.sequence, p.channel0 + channel, p.call.reverse,
                            int64_t(block.index) * Tile::kSize, Tile::kSize);
    if (channel >= p.channels) piece.rows = 0;
    f(p.spectra + item / tiles * (Tile::kSize / 2) * p.channels + channel, tile, piece);
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(ConvTile<kSize>::kThreads, 1)
    transform_blocks_kernel(const __grid_constant__ BlockParams p) {
  extern __shared__ float4 shared_memory[];
  using Tile = ConvTile<kSize>;
  for_blocks<Tile>(p, start_opaque(shared_memory), [&](float4* spectrum, const Tile& tile, const Piece& piece) {
    float2 v[kPoints];
    load_rows<T>(tile, p.call, piece, v);
    tile.template forward<true>(v);
    tile.wait();
    if (piece.rows <= 0) return;
#pragma unroll
    for (int i = 0; i < Tile::kSlots; ++i) {
      spectrum[spectrum_at(Tile::kLines, p.channels, i, tile.j, 0)] = join(v[i], v[kPoints - 1 - i]);
    }
  });
}

template <class T, int kSize>
__global__ void __launch_bounds__(ConvTile<kSize>::kThreads, 1)
    inverse_blocks_kernel(const __grid_constant__ BlockParams p) {
  extern __shared__ float4 shared_memory[];
  using Tile = ConvTile<kSize>;
  for_blocks<Tile>(p, start_opaque(shared_memory), [&](float4* spectrum, const Tile& tile, const Piece& piece) {
    float2 v[kPoints];
#pragma unroll
    for (int i = 0; i < Tile::kSlots; ++i) {
      const float4 x = piece.rows > 0 ? spectrum[spectrum_at(Tile::kLines, p.channels, i, tile.j, 0)] : float4{};
      v[i] = {x.x, x.y}, v[kPoints - 1 - i] = {x.z, x.w};
    }
    tile.wait();
    tile.template inverse<true>(v);
    finish_rows<T>(tile, p.call, piece, p.shape.channels, v);
  });
}

}  // namespace

template <class T>
void transform_blocks(const BlockParams& p, int blocks, cudaStream_t stream) {
  with_largest_size(p.shape.fft_classes, [&](auto size) {
    launch("long conv: blocks", transform_blocks_kernel<T, size>, blocks, ConvTile<size>::kThreads,
           shared_bytes<ConvTile<size>>(ConvTile<size>::kThreads), stream, p);
  });
}

template <class T>
void inverse_blocks(const BlockParams& p, int blocks, cudaStream_t stream) {
  with_largest_size(p.shape.fft_classes, [&](auto size) {
    launch("long conv: blocks", inverse_blocks_kernel<T, size>, blocks, ConvTile<size>::kThreads,
           shared_bytes<ConvTile<size>>(ConvTile<size>::kThreads), stream, p);
  });
}

}  // namespace packseq::longconv
