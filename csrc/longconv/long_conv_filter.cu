// The filter's spectra before the convolution, and its gradient from sums of spectra after it.
//
// The filter of a class of size N is the circular one of 2 N lags: k at lags 0 ... N - 1, k_after at 2 N - 1 and down.
// For sequences in blocks the filter is cut into blocks of N lags too, and what a block adds to the one before it comes
// by the sign (-1)^k, which is a shift by N. Spectra are scaled for the whole way there and back.
#include "core/dispatch.h"
#include "core/launch.h"
#include "longconv/long_conv_prepare.h"
#include "longconv/long_conv_tiles.cuh"

namespace packseq::longconv {
namespace {

// ---- Spectra -------------------------------------------------------------------------------------------------------

__device__ float filter_at(const Filter& f, int64_t channel, int64_t lag) {
  if (lag >= 0) return lag < f.taps ? f.k[channel * f.taps + lag] : 0.f;
  const int64_t j = -1 - lag;
  return j < f.taps_after ? f.k_after[channel * f.taps_after + j] : 0.f;
}

template <class Tile>
__device__ void store_spectrum(const Tile& tile, const float2 (&v)[kPoints], float4* to, int64_t channels,
                               int64_t channel) {
  constexpr float kScale = 1.f / (8 * Tile::kSize);
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    to[spectrum_at(Tile::kLines, channels, i, tile.j, channel)] = join(kScale * v[i], kScale * v[kPoints - 1 - i]);
  }
}

template <class Tile>
__device__ void class_spectrum(const SpectraParams& p, float4* shared, int64_t item, float4* to) {
  const Tile tile(shared, p.shape.table);
  const int64_t channel = item * Tile::kChannels + tile.channel;
  const bool exists = channel < p.shape.channels;
  float2 v[kPoints];
#pragma unroll
  for (int place = 0; place < kPoints; ++place) {
    const int m = 2 * tile.number(place), lag = m < Tile::kSize ? m : m - 2 * Tile::kSize;
    v[place] = exists ? float2{filter_at(p.filter, channel, lag), filter_at(p.filter, channel, lag + 1)} : float2{};
  }
  tile.template forward<false>(v);
  if (exists) store_spectrum(tile, v, to, p.shape.channels, channel);
}

__global__ void __launch_bounds__(512, 1) spectra_kernel(const __grid_constant__ SpectraParams p) {
  extern __shared__ float4 shared_memory[];
  float4* const shared = start_opaque(shared_memory);
  const Shape& shape = p.shape;
  int64_t unit = blockIdx.x;
  for (int c = 1; c <= shape.fft_classes; ++c) {
    if (shape.plan->count[c] == 0) continue;
    const bool done = with_size(c, [&](auto size) {
      using Tile = ConvTile<size>;
      const int teams = blockDim.x / Tile::kThreads, team = threadIdx.x / Tile::kThreads;
      const int64_t tiles = divide_up(shape.channels, Tile::kChannels), units = divide_up(tiles, teams);
      if (unit >= units) {
        unit -= units;
        return false;
      }
      const int64_t item = unit * teams + team;
      float4* const to = p.spectra + spectrum_begin(c) / 2 * shape.channels;
      if (item < tiles) class_spectrum<Tile>(p, shared, item, to);
      return true;
    });
    if (done) return;
  }
  if (shape.plan->count[0] == 0) return;
  const int64_t place = unit * blockDim.x + threadIdx.x;
  if (place >= kDirectLags * shape.channels) return;
  p.lags[place] = filter_at(p.filter, place % shape.channels, place / shape.channels - kDirectRows);
}

template <int kSize>
__global__ void __launch_bounds__(ConvTile<kSize>::kThreads, 1)
    block_spectra_kernel(const __grid_constant__ BlockSpectraParams p) {
  extern __shared__ float4 shared_memory[];
  using Tile = ConvTile<kSize>;
  const int64_t tiles = divide_up(p.channels, Tile::kChannels), index = blockIdx.x / tiles;
  const int64_t block = index - p.blocks_before, most = p.shape.plan->most_blocks;
  if (p.shape.plan->long_blocks == 0 || block >= most || block < -most) return;
  const Tile tile(start_opaque(shared_memory), p.shape.table);
  const int64_t channel = blockIdx.x % tiles * Tile::kChannels + tile.channel;
  const bool exists = channel < p.channels;
  float2 v[kPoints];
#pragma unroll
  for (int place = 0; place < kPoints; ++place) {
    if (place % Tile::kFirst >= Tile::kFirst / 2) continue;
    const int64_t lag = block * kSize + 2 * tile.number(place), of = p.channel0 + channel;
    v[place] = exists ? float2{filter_at(p.filter, of, lag), filter_at(p.filter, of, lag + 1)} : float2{};
  }
  tile.template forward<true>(v);
  if (exists) store_spectrum(tile, v, p.spectra + index * (kSize / 2) * p.channels, p.channels, channel);
}

// ---- Gradient ------------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 256;

// The sums of a class's chunks, in their order, into the first.
__global__ void __launch_bounds__(kSumThreads) sum_chunks_kernel(const __grid_constant__ FilterGradientParams p) {
  const int64_t channels = p.shape.channels;
  int64_t place = blockIdx.x * int64_t(kSumThreads) + threadIdx.x;
  for (int c = 1; c <= p.shape.fft_classes; ++c) {
    const int64_t size = size_of_class(c) / 2 * channels;
    if (place >= size) {
      place -= size;
      continue;
    }
    const int chunks = p.shape.plan->chunks[c];
    if (chunks < 2) return;
    float4* const sums = p.sums + p.shape.plan->sums[c] / 2 * channels + place;
    float4 sum = sums[0];
#pragma unroll 8
    for (int i = 1; i < chunks; ++i) {
      const float4 x = sums[i * size];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    sums[0] = sum;
    return;
  }
}

// What the direct class adds to the gradient of a lag of a channel.
__device__ float direct_gradient(const FilterGradientParams& p, int64_t channel, int64_t lag) {
  if (lag <= -kDirectRows || lag >= kDirectRows) return 0.f;
  const int group = int(lag + kDirectRows) / kLagBlock - kLagBlocks;  // rounded down
  const int within = int(lag) - group * kLagBlock;                    // 0 ... 15
  float sum = 0.f;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int of = group + step + kLagBlocks - 1, place = within - step * kLagBlock + kLagBlock - 1;
    if (of < 0 || of >= kLagGroups || place < 0) continue;
    for (int chunk = 0; chunk < p.shape.plan->chunks[0]; ++chunk) {
      sum += p.direct_sums[((int64_t(chunk) * kLagGroups + of) * kBlockLags + place) * p.shape.channels + channel];
    }
  }
  return sum;
}

struct Gradient {
  float *dk, *dk_after;
  int64_t taps, taps_after;

  __device__ void add(int64_t channel, int64_t lag, float x) const {
    if (lag >= 0) {
      if (lag < taps) dk[channel * taps + lag] += x;
    } else if (-1 - lag < taps_after) {
      dk_after[channel * taps_after - 1 - lag] += x;
    }
  }
};

template <class Tile>
__device__ void load_sum(const Tile& tile, const float4* from, int64_t channels, int64_t channel, bool exists,
                         float2 (&v)[kPoints]) {
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    const float4 x = exists ? from[spectrum_at(Tile::kLines, channels, i, tile.j, channel)] : float4{};
    v[i] = {x.x, x.y}, v[kPoints - 1 - i] = {x.z, x.w};
  }
}

constexpr int kGradientChannels = 8;  // of a block of threads

template <class Tile>
__device__ void add_class(const FilterGradientParams& p, float4* shared, int64_t channel0, const float4* sums) {
  if (threadIdx.x >= Tile::kThreads) return;
  const Tile tile(shared, p.shape.table);
  const int64_t channel = channel0 + tile.channel;
  const bool exists = channel < p.shape.channels;
  const Gradient gradient = {p.dk, p.dk_after, p.taps, p.taps_after};
  float2 v[kPoints];
  load_sum(tile, sums, p.shape.channels, channel, exists, v);
  tile.template inverse<false>(v);
  if (!exists) return;
  constexpr float kScale = 1.f / (8 * Tile::kSize);
#pragma unroll
  for (int place = 0; place < kPoints; ++place) {
    const int m = 2 * tile.number(place), lag = m < Tile::kSize ? m : m - 2 * Tile::kSize;
    gradient.add(channel, lag, kScale * v[place].x), gradient.add(channel, lag + 1, kScale * v[place].y);
  }
}

__global__ void __launch_bounds__(512, 1) filter_gradient_kernel(const __grid_constant__ FilterGradientParams p) {
  extern __shared__ float4 shared_memory[];
  float4* const shared = start_opaque(shared_memory);
  const int64_t channel0 = blockIdx.x * int64_t(kGradientChannels), channels = p.shape.channels;
  for (int channel = 0; channel < kGradientChannels && channel0 + channel < channels; ++channel) {
    const int64_t c = channel0 + channel;
    for (int64_t m = threadIdx.x; m < p.taps; m += blockDim.x) p.dk[c * p.taps + m] = direct_gradient(p, c, m);
    for (int64_t m = threadIdx.x; m < p.taps_after; m += blockDim.x) {
      p.dk_after[c * p.taps_after + m] = direct_gradient(p, c, -1 - m);
    }
  }
  if (p.dD && threadIdx.x < kGradientChannels && channel0 + threadIdx.x < channels) {
    float sum = 0.f;
    for (int64_t i = 0; i < p.skip_parts; ++i) sum += p.skip_sums[i * channels + channel0 + threadIdx.x];
    p.dD[channel0 + threadIdx.x] = sum;
  }
  for (int c = 1; c <= p.shape.fft_classes; ++c) {
    if (p.shape.plan->chunks[c] == 0) continue;
    with_size(c, [&](auto size) {
      using Tile = ConvTile<size>;
      for (int part = 0; part < kGradientChannels; part += Tile::kChannels) {
        __syncthreads();
        add_class<Tile>(p, shared, channel0 + part, p.sums + p.shape.plan->sums[c] / 2 * channels);
      }
      return true;
    });
  }
}

template <int kSize>
__global__ void __launch_bounds__(ConvTile<kSize>::kThreads, 1)
    block_gradient_kernel(const __grid_constant__ BlockGradientParams p) {
  extern __shared__ float4 shared_memory[];
  using Tile = ConvTile<kSize>;
  const int64_t tiles = divide_up(p.channels, Tile::kChannels), index = blockIdx.x / tiles;
  const int64_t block = index - p.blocks_before, most = p.shape.plan->most_blocks;
  if (p.shape.plan->long_blocks == 0 || block >= most || block < -most) return;
  const Tile tile(start_opaque(shared_memory), p.shape.table);
  const int64_t channel = blockIdx.x % tiles * Tile::kChannels + tile.channel;
  const bool exists = channel < p.channels;
  const float4* const sums = p.sums + index * (kSize / 2) * p.channels;
  const float sign = tile.j % 2 ? -1.f : 1.f;  // of the frequencies of this thread
  float2 v[kPoints], next[kPoints];
  load_sum(tile, sums, p.channels, channel, exists, v);
  load_sum(tile, sums + (kSize / 2) * p.channels, p.channels, channel, exists, next);
#pragma unroll
  for (int i = 0; i < kPoints; ++i) v[i] = v[i] + sign * next[i];
  tile.template inverse<true>(v);
  if (!exists) return;
  const Gradient gradient = {p.dk, p.dk_after, p.taps, p.taps_after};
  constexpr float kScale = 1.f / (8 * kSize);
#pragma unroll
  for (int place = 0; place < kPoints; ++place) {
    if (place % Tile::kFirst >= Tile::kFirst / 2) continue;
    const int64_t lag = block * kSize + 2 * tile.number(place), of = p.channel0 + channel;
    gradient.add(of, lag, kScale * v[place].x), gradient.add(of, lag + 1, kScale * v[place].y);
  }
}

}  // namespace

void filter_spectra(const SpectraParams& p, int threads, cudaStream_t stream) {
  int64_t blocks = divide_up(kDirectLags * p.shape.channels, threads);
  for (int c = 1; c <= p.shape.fft_classes; ++c) {
    blocks += with_size(c, [&](auto size) {
      using Tile = ConvTile<size>;
      return divide_up(divide_up(p.shape.channels, Tile::kChannels), threads / Tile::kThreads);
    });
  }
  launch("long conv: spectra", spectra_kernel, blocks, threads, conv_shared_bytes(threads), stream, p);
}

void filter_block_spectra(const BlockSpectraParams& p, cudaStream_t stream) {
  with_largest_size(p.shape.fft_classes, [&](auto size) {
    using Tile = ConvTile<size>;
    launch("long conv: spectra", block_spectra_kernel<size>, p.blocks * divide_up(p.channels, Tile::kChannels),
           Tile::kThreads, shared_bytes<Tile>(Tile::kThreads), stream, p);
  });
}

void filter_gradient(const FilterGradientParams& p, int threads, cudaStream_t stream) {
  const int64_t numbers = spectrum_begin(p.shape.fft_classes + 1) / 2 * p.shape.channels;
  launch("long conv: sums", sum_chunks_kernel, divide_up(numbers, kSumThreads), kSumThreads, 0, stream, p);
  launch("long conv: filter gradient", filter_gradient_kernel, divide_up(p.shape.channels, kGradientChannels), threads,
         conv_shared_bytes(threads), stream, p);
}

void filter_block_gradient(const BlockGradientParams& p, cudaStream_t stream) {
  with_largest_size(p.shape.fft_classes, [&](auto size) {
    using Tile = ConvTile<size>;
    launch("long conv: filter gradient", block_gradient_kernel<size>, p.blocks * divide_up(p.channels, Tile::kChannels),
           Tile::kThreads, shared_bytes<Tile>(Tile::kThreads), stream, p);
  });
}

}  // namespace packseq::longconv
