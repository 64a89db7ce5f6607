// The filter's spectra before the convolution, and its gradient from sums of spectra after it.
//
// The filter of a class of size N is the circular one of 2 N lags: k at lags 0 ... N - 1, k_after at 2 N - 1 and down.
// Spectra are scaled for the whole way there and back.
#include "core/dispatch.h"
#include "core/launch.h"
#include "longconv/long_conv_filter.cuh"
#include "longconv/long_conv_prepare.h"
#include "longconv/long_conv_tiles.cuh"

namespace packseq::longconv {
namespace {

// ---- Spectra -------------------------------------------------------------------------------------------------------

template <class Tile>
__device__ void class_spectrum(const SpectraParams& p, float4* shared, int64_t item, float4* to) {
  const Tile tile(shared);
  const int64_t channel = item * Tile::kChannels + tile.channel;
  const bool exists = channel < p.shape.channels;
  float2 v[kPoints];
#pragma unroll
  for (int place = 0; place < kPoints; ++place) {
    const int m = 2 * tile.number(place), lag = m < Tile::kSize ? m : m - 2 * Tile::kSize;
    v[place] = exists ? float2{filter_at(p.filter, channel, lag), filter_at(p.filter, channel, lag + 1)} : float2{};
  }
  tile.template forward<false>(v);
  if (!exists) return;
  constexpr float kScale = 1.f / (8 * Tile::kSize);
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    to[spectrum_at(Tile::kLines, p.shape.channels, i, tile.j, channel)] =
        tile.weights(kScale * v[i], kScale * v[kPoints - 1 - i], i);
  }
}

__global__ void __launch_bounds__(512, 1) spectra_kernel(const __grid_constant__ SpectraParams p) {
  extern __shared__ float4 shared_memory[];
  float4* const shared = start_shared(shared_memory);
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
      Tile::begin(shared, shape.table);
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
  const Tile tile(shared);
  const int64_t channel = channel0 + tile.channel;
  const bool exists = channel < p.shape.channels;
  const FilterGradient gradient = {p.dk, p.dk_after, p.taps, p.taps_after};
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
  float4* const shared = start_shared(shared_memory);
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
      Tile::begin(shared, p.shape.table);
      for (int part = 0; part < kGradientChannels; part += Tile::kChannels) {
        __syncthreads();
        add_class<Tile>(p, shared, channel0 + part, p.sums + p.shape.plan->sums[c] / 2 * channels);
      }
      return true;
    });
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

void filter_gradient(const FilterGradientParams& p, int threads, cudaStream_t stream) {
  const int64_t numbers = spectrum_begin(p.shape.fft_classes + 1) / 2 * p.shape.channels;
  launch("long conv: sums", sum_chunks_kernel, divide_up(numbers, kSumThreads), kSumThreads, 0, stream, p);
  launch("long conv: filter gradient", filter_gradient_kernel, divide_up(p.shape.channels, kGradientChannels), threads,
         conv_shared_bytes(threads), stream, p);
}

}  // namespace packseq::longconv
