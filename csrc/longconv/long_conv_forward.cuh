// The convolution of sequences that are one transform or a direct sum.
//
// A team of threads takes one sequence and a few neighbouring channels: rows are read into registers, transformed,
// multiplied with the filter's spectrum, transformed back and written, without touching device memory in between.
// Blocks of threads stay: each walks through the classes, the longest sequences first, in steps of the grid.
#pragma once
#include "core/launch.h"
#include "longconv/long_conv_staged.cuh"

namespace packseq::longconv {
namespace {

template <class T, class Tile>
__device__ void convolve_sequence(const ConvParams& p, float4* shared, int c, ListedRows listed,
                                  uint32_t channel_tile) {
  const Tile tile(shared);
  const Piece piece =
      Piece::of(p.shape, listed, int64_t(channel_tile) * Tile::kChannels + tile.channel, p.call.reverse);
  float2 v[kPoints];
  load_input<T>(tile, p.call, piece, v);
  tile.convolve(v, [&](const Tile& tile) { return filter_place(tile, p.spectra, p.shape, c, channel_tile); });
  finish_rows<T>(tile, p.call, piece, p.shape.channels, v);
}

// The items of a class, by rows in shared memory: those of a team's next one are under way while it works on one.
template <class T, class Tile>
__device__ void convolve_staged(const ConvParams& p, float4* shared, int c, uint32_t& unit, uint32_t items) {
  using Buffer = RowBuffer<T, Tile>;
  const auto buffer = [&](const Tile& tile) { return Buffer(tile, shared + Tile::used(blockDim.x)); };
  const auto step_of = [&](uint32_t item, Step& step) {
    const uint32_t tiles = p.shape.tiles(Tile::kChannels);
    step.item = item < block_number(shared, 0) ? item : Step::kNone, step.channel_tile = item % tiles;
    return p.shape.list + __ldg(&p.shape.plan->first[c]) + item / tiles;
  };
  const auto fetch = [&](const Tile& tile, const Step& step) {
    const Rows& from = p.call.input;
    buffer(tile).fetch(tile, TileRows<const T>::of(tile, from.data, from.token, step.rows, p.shape, step.channel_tile,
                                                   p.call.reverse));
  };
  const auto teams = [] { return blockDim.x / Tile::kThreads; };
  __syncthreads();
  block_number(shared, 0) = items, block_number(shared, 1) = unit;
  Tile::begin(shared, p.shape.table);
  bool more = unit * teams() + Tile(shared).team < items;
  if (more) {
    const Tile tile(shared);
    Step step = {};
    step.rows = *step_of(unit * teams() + tile.team, step);
    turn_of(shared, tile.team).next = step;
    fetch(tile, step);
  }
  copy_async_commit();
  while (more) {
    const Tile tile(shared);
    copy_async_wait<0>();
    tile.wait();
    begin_step(tile, shared, [&](Step& step) { return step_of(step.item + gridDim.x * teams(), step); });
    const auto piece = [&](const Tile& tile) {
      const Step& now = turn_of(shared, tile.team).now;
      return Piece::of(p.shape, now.rows, int64_t(now.channel_tile) * Tile::kChannels + tile.channel, p.call.reverse);
    };
    float2 v[kPoints];
    if (p.call.pre_gate.data) tile.wait();  // for what piece() reads
    buffer(tile).load_input(
        tile, p.call, [&] { return piece(tile); }, v);
    tile.convolve(v, [&](const Tile& tile) {
      return filter_place(tile, p.spectra, p.shape, c, turn_of(shared, tile.team).now.channel_tile);
    });
    {
      const Tile tile(shared);
      buffer(tile).finish_rows(tile, p.call, piece(tile), p.shape.channels, v);
      copy_async_wait<0>();
      tile.wait();
      const Turn turn = turn_of(shared, tile.team);
      buffer(tile).store(tile, TileRows<T>::of(tile, p.call.out, p.shape.channels, turn.now.rows, p.shape,
                                               turn.now.channel_tile, p.call.reverse));
      more = turn.next.item != Step::kNone;
      if (more) fetch(tile, turn.next);
      copy_async_commit();
    }
  }
  unit = unit_behind(block_number(shared, 1), (block_number(shared, 0) + teams() - 1) / teams());
}

// One warp, a channel a lane. Each output is a sum over the inputs in the order of time.
template <class T>
__device__ void convolve_directly(const ConvParams& p, float4* shared, ListedRows listed, int64_t channel_tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const x = reinterpret_cast<float*>(shared) + warp * kDirectRows * 32 + lane;  // every 32nd is this lane's
  const int64_t channels = p.shape.channels, channel = channel_tile * 32 + lane;
  const Piece piece = Piece::of(p.shape, listed, channel, p.call.reverse);
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
    __stcs(static_cast<T*>(to) + ((piece.row + (call.reverse ? -t : t)) * channels + channel), T(y));
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

template <class T, bool kStaged>
__global__ void __launch_bounds__(512, 1) convolve_kernel(const __grid_constant__ ConvParams params) {
  if constexpr (!kStaged || kCanStage) {
    extern __shared__ float4 shared_memory[];
    const ConvParams& p = keep_params(shared_memory, params);
    float4* const shared = start_shared(shared_memory);
    const Shape& shape = p.shape;
    clear_slack<T>(shape, p.call.out), clear_slack<T>(shape, p.call.out_other);
    uint32_t unit = blockIdx.x;
    for_classes(shape.fft_classes, [&](auto c) {
      using Tile = ConvTile<size_of_class(c)>;
      const int count = shape.plan->count[c];
      if (count == 0 || c < p.first_class) return;
      const uint32_t items = count * shape.tiles(Tile::kChannels);
      if constexpr (kStaged) {
        convolve_staged<T, Tile>(p, shared, c, unit, items);
      } else {
        Tile::begin(shared, shape.table);
        for_items<Tile::kThreads>(shared, unit, items, [&](uint32_t item) {
          const uint32_t tiles = p.shape.tiles(Tile::kChannels);
          convolve_sequence<T, Tile>(p, shared, c, p.shape.list[p.shape.plan->first[c] + item / tiles], item % tiles);
        });
      }
    });
    const uint32_t tiles = shape.tiles(32);
    for_items<32>(shared, unit, shape.plan->count[0] * tiles, [&](uint32_t item) {
      convolve_directly<T>(p, shared, shape.list[shape.plan->first[0] + item / tiles], item % tiles);
    });
  }
}

}  // namespace

template <class T>
size_t convolve_bytes(int fft_classes, bool staged) {
  const int threads = conv_threads(fft_classes);
  size_t bytes = kFrontBytes + size_t(threads) * kDirectRows * sizeof(float);  // of direct sums
  for (int c = 1; c <= fft_classes; ++c) {
    bytes = std::max(bytes, with_size(c, [&](auto size) {
                       using Tile = ConvTile<size>;
                       const size_t buffers = staged ? threads / Tile::kThreads * RowBuffer<T, Tile>::kBytes : 0;
                       return shared_bytes<Tile>(threads) + buffers;
                     }));
  }
  return bytes;
}

template <class T>
void convolve(const ConvParams& p, bool staged, int blocks, cudaStream_t stream) {
  launch("long conv", staged ? convolve_kernel<T, true> : convolve_kernel<T, false>, blocks,
         conv_threads(p.shape.fft_classes), convolve_bytes<T>(p.shape.fft_classes, staged), stream, p);
}

}  // namespace packseq::longconv
