// The convolution of sequences that are one transform or a direct sum.
//
// A team of threads takes one sequence and a few neighbouring channels: rows are read into registers, transformed,
// multiplied with the filter's spectrum, transformed back and written, without touching device memory in between.
// Blocks of threads stay: each walks through the classes, the longest sequences first, in steps of the grid.
#pragma once
#include "core/launch.h"
#include "longconv/long_conv_rows.cuh"

namespace packseq::longconv {
namespace {

struct FilterPlace {
  const float4* at;
  int32_t channels;  // fewer than 2^24
};

template <class T, class Tile>
__device__ void convolve_sequence(const ConvParams& p, float4* shared, int c, int64_t sequence, int channel_tile) {
  const Tile tile(shared, p.shape.table);
  const int64_t channel = int64_t(channel_tile) * Tile::kChannels + tile.channel;
  const Piece piece = Piece::of(p.shape, sequence, channel, p.call.reverse, 0, Tile::kSize);
  float2 v[kPoints];
  load_rows<T>(tile, p.call, piece, v);
  tile.convolve(v, piece.rows > 0, [&] {
    const ConvParams& q = opaque(p);
    return FilterPlace{q.spectra + spectrum_begin(c) / 2 * q.shape.channels + piece.channel, int32_t(q.shape.channels)};
  });
  const ConvParams& q = opaque(p);
  finish_rows<T>(tile, q.call, piece, q.shape.channels, v);
}

// One warp, a channel a lane. Each output is a sum over the inputs in the order of time.
template <class T>
__device__ void convolve_directly(const ConvParams& p, float4* shared, int64_t sequence, int64_t channel_tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const x = reinterpret_cast<float*>(shared) + warp * kDirectRows * 32 + lane;  // every 32nd is this lane's
  const int64_t channels = p.shape.channels, channel = channel_tile * 32 + lane;
  const Piece piece = Piece::of(p.shape, sequence, channel, p.call.reverse, 0, kDirectRows);
  if (piece.rows == 0) return;
  const ConvCall& call = p.call;
  const int blocks = (piece.rows + kLagBlock - 1) / kLagBlock;
  const auto signal = [&](const Rows& rows) { return Signal<const T>(rows, piece, call.reverse); };
  const Signal<const T> input = signal(call.input);
  for (int b = 0; b < blocks; ++b) {
    float values[kLagBlock];
#pragma unroll
    for (int i = 0; i < kLagBlock; ++i) {
      const int t = b * kLagBlock + i;
      values[i] = t < piece.rows ? input(t) : 0.f;
    }
    if (call.pre_gate.data) {
      const Signal<const T> gate = signal(call.pre_gate);
#pragma unroll
      for (int i = 0; i < kLagBlock; ++i) {
        const int t = b * kLagBlock + i;
        if (t < piece.rows) values[i] *= gate(t);
      }
    }
#pragma unroll
    for (int i = 0; i < kLagBlock; ++i) x[(b * kLagBlock + i) * 32] = values[i];
  }

  const float* const zero_lag = p.lags + kDirectRows * channels + channel;
  const float D = call.D ? call.D[channel] : 0.f;
  const auto store = [&](void* to, int t, float y) {
    static_cast<T*>(to)[(piece.row + (call.reverse ? -t : t)) * channels + channel] = T(y);
  };
  for (int out = 0; out < blocks; ++out) {
    float y[kLagBlock] = {};
    const auto add = [&](int in, auto from_past_only) {
      float k[kBlockLags];
#pragma unroll
      for (int e = from_past_only ? kLagBlock - 1 : 0; e < kBlockLags; ++e) {
        k[e] = __ldg(zero_lag + ((out - in) * kLagBlock + e - (kLagBlock - 1)) * channels);
      }
#pragma unroll
      for (int u = 0; u < kLagBlock; ++u) {
        const float value = x[(in * kLagBlock + u) * 32];
#pragma unroll
        for (int i = from_past_only ? u : 0; i < kLagBlock; ++i) y[i] = fmaf(k[i - u + kLagBlock - 1], value, y[i]);
      }
    };
    for (int in = 0; in < (p.two_sided ? blocks : out); ++in) add(in, constant<false>{});
    if (!p.two_sided) add(out, constant<true>{});
    const Signal<const T> other = signal(call.other), gate = signal(call.gate);
#pragma unroll
    for (int i = 0; i < kLagBlock; ++i) {
      const int t = out * kLagBlock + i;
      if (t >= piece.rows) continue;
      if (call.D) y[i] = fmaf(D, x[t * 32], y[i]);
      if (call.out_other) store(call.out_other, t, y[i] * other(t));
      store(call.out, t, call.gate.data ? y[i] * gate(t) : y[i]);
    }
  }
}

// Rows after the last sequence.
template <class T>
__device__ void clear_slack(const Shape& shape, void* out) {
  if (!out) return;
  const Span slack = span_of(shape.cu_seqlens, shape.sequences, shape.total, shape.sequences);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  int64_t at = slack.begin * shape.channels + blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  for (; at < slack.end * shape.channels; at += threads) static_cast<T*>(out)[at] = T(0.f);
}

template <class T>
__global__ void __launch_bounds__(512, 1) convolve_kernel(const __grid_constant__ ConvParams p) {
  extern __shared__ float4 shared_memory[];
  float4* const shared = start_opaque(shared_memory);
  const Shape& shape = p.shape;
  clear_slack<T>(shape, p.call.out), clear_slack<T>(shape, p.call.out_other);
  uint32_t unit = blockIdx.x;
  for_classes(shape.fft_classes, [&](auto c) {
    using Tile = ConvTile<size_of_class(c)>;
    const int count = shape.plan->count[c];
    if (count == 0) return;
    for_items<Tile::kThreads>(shared, unit, count * shape.tiles(Tile::kChannels), [&](uint32_t item) {
      const ConvParams& q = opaque(p);
      const uint32_t tiles = q.shape.tiles(Tile::kChannels);
      const int64_t sequence = q.shape.list[q.shape.plan->first[c] + item / tiles];
      convolve_sequence<T, Tile>(q, shared, c, sequence, item % tiles);
    });
  });
  const uint32_t tiles = shape.tiles(32);
  for_items<32>(shared, unit, shape.plan->count[0] * tiles, [&](uint32_t item) {
    convolve_directly<T>(p, shared, shape.list[shape.plan->first[0] + item / tiles], item % tiles);
  });
}

}  // namespace

template <class T>
void convolve(const ConvParams& p, int blocks, cudaStream_t stream) {
  const int threads = conv_threads(p.shape.fft_classes);
  const size_t direct = kOpaqueBytes + size_t(threads) * kDirectRows * sizeof(float);
  launch("long conv", convolve_kernel<T>, blocks, threads, std::max(direct, conv_shared_bytes(threads)), stream, p);
}

}  // namespace packseq::longconv
