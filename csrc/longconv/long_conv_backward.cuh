// The filter's gradient as sums over sequences of conj(X) dY, X and dY the spectra of x and of y's gradient.
//
// A team of threads takes a chunk of a class's sequences and a few channels. It transforms x, then dy, and adds the
// products to sums that lie in shared memory, where every thread has its own.
#pragma once
#include "core/launch.h"
#include "longconv/long_conv_rows.cuh"

namespace packseq::longconv {
namespace {

// Shared memory of a team: the transform's, and the sums'.
template <class Tile>
constexpr size_t kGradientShared = Tile::kShared * sizeof(float2) + Tile::kSlots* Tile::kThreads * sizeof(float4);

template <class T, class Tile>
__device__ void sum_chunk(const GradientParams& p, float4* shared, int c, int64_t chunk, int64_t channel_tile) {
  const Tile tile(shared, p.shape.table);
  // All transforms come first, then the sums.
  float4* const sums = shared + blockDim.x / Tile::kThreads * (Tile::kShared / 2) + opaque(int(threadIdx.x), shared);
  const int stride = blockDim.x;
  const int64_t channels = p.shape.channels, channel = channel_tile * Tile::kChannels + tile.channel;
  const Plan& plan = *p.shape.plan;
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) sums[i * stride] = {};
  const int64_t end = min((chunk + 1) * kChunkSequences, int64_t(plan.count[c]));
  for (int64_t at = chunk * kChunkSequences; at < end; ++at) {
    const Piece piece = Piece::of(p.shape, p.shape.list[plan.first[c] + at], channel, p.x.reverse, 0, Tile::kSize);
    float2 x[kPoints], dy[kPoints];
    load_rows<T>(tile, opaque(p).x, piece, x);
    tile.template forward<true>(x);
    load_rows<T>(tile, opaque(p).dy, piece, dy);
    tile.wait();
    tile.template forward<true>(dy);
#pragma unroll
    for (int i = 0; i < Tile::kSlots; ++i) {
      sums[i * stride] = tile.correlate(x, dy, sums[i * stride], i);
    }
    tile.wait();
  }
  if (channel >= channels) return;
  float4* const to = p.sums + (plan.sums[c] + chunk * Tile::kSize) / 2 * channels;
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    to[spectrum_at(Tile::kLines, channels, i, tile.j, channel)] = sums[i * stride];
  }
}

// One warp, a channel a lane: the lags between blocks of rows that lie `distance` blocks apart.
template <class T>
__device__ void sum_directly(const GradientParams& p, int64_t chunk, int64_t channel, int distance) {
  const Plan& plan = *p.shape.plan;
  if (channel >= p.shape.channels) return;
  float sums[kBlockLags] = {};
  const int64_t end = min((chunk + 1) * plan.chunk_rows[0], int64_t(plan.count[0]));
  for (int64_t at = chunk * plan.chunk_rows[0]; at < end; ++at) {
    const Piece piece = Piece::of(p.shape, p.shape.list[plan.first[0] + at], channel, p.x.reverse, 0, kDirectRows);
    const int blocks = (piece.rows + kLagBlock - 1) / kLagBlock;
    const auto load = [&](const ConvCall& call, int block, float(&v)[kLagBlock]) {
      const Signal<const T> signal(call.input, piece, call.reverse), gate(call.pre_gate, piece, call.reverse);
#pragma unroll
      for (int i = 0; i < kLagBlock; ++i) {
        const int t = block * kLagBlock + i;
        v[i] = t < piece.rows ? signal(t) : 0.f;
        if (call.pre_gate.data && t < piece.rows) v[i] *= gate(t);
      }
    };
    for (int in = max(0, -distance); in < blocks && in + distance < blocks; ++in) {
      float x[kLagBlock], dy[kLagBlock];
      load(p.x, in, x);
      load(p.dy, in + distance, dy);
#pragma unroll
      for (int i = 0; i < kLagBlock; ++i) {
#pragma unroll
        for (int u = 0; u < kLagBlock; ++u) {
          sums[i - u + kLagBlock - 1] = fmaf(dy[i], x[u], sums[i - u + kLagBlock - 1]);
        }
      }
    }
  }
  const int64_t group = chunk * kLagGroups + distance + kLagBlocks - 1;
#pragma unroll
  for (int e = 0; e < kBlockLags; ++e) {
    p.direct_sums[(group * kBlockLags + e) * p.shape.channels + channel] = sums[e];
  }
}

template <class T>
__global__ void __launch_bounds__(256, 1) gradient_kernel(const __grid_constant__ GradientParams p) {
  extern __shared__ float4 shared_memory[];
  float4* const shared = start_opaque(shared_memory);
  const Shape& shape = p.shape;
  uint32_t unit = blockIdx.x;
  for_classes(shape.fft_classes, [&](auto c) {
    using Tile = GradientTile<size_of_class(c)>;
    const int chunks = shape.plan->chunks[c];
    if (chunks == 0) return;
    for_items<Tile::kThreads>(shared, unit, chunks * shape.tiles(Tile::kChannels), [&](uint32_t item) {
      const GradientParams& q = opaque(p);
      const uint32_t tiles = q.shape.tiles(Tile::kChannels);
      sum_chunk<T, Tile>(q, shared, c, item / tiles, item % tiles);
    });
  });
  const int distances = p.two_sided ? kLagGroups : kLagBlocks, first = p.two_sided ? 1 - kLagBlocks : 0;
  const uint32_t tiles = shape.tiles(32);
  for_items<32>(shared, unit, shape.plan->chunks[0] * tiles * distances, [&](uint32_t item) {
    const int64_t channel = item / distances % tiles * int64_t(32) + threadIdx.x % 32;
    sum_directly<T>(p, item / distances / tiles, channel, first + int(item % distances));
  });
}

// dD: sums of x dy over parts of the rows.
constexpr int kSkipThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSkipThreads) skip_kernel(const __grid_constant__ SkipParams p) {
  const Shape& shape = p.shape;
  const int64_t tiles = divide_up(shape.channels, kSkipThreads), part = blockIdx.x / tiles;
  const int64_t channel = blockIdx.x % tiles * kSkipThreads + threadIdx.x;
  if (channel >= shape.channels) return;
  const int64_t live = span_of(shape.cu_seqlens, shape.sequences, shape.total, shape.sequences).begin;
  const Span rows = {min(part * kSkipRows, live), min((part + 1) * kSkipRows, live)};
  const Piece piece = {rows.begin, int32_t(channel), int32_t(rows.size())};
  const auto signal = [&](const Rows& of) { return Signal<const T>(of, piece, false); };
  const Signal<const T> input = signal(p.input), pre_gate = signal(p.pre_gate);
  const Signal<const T> dout = signal(p.dout), gate = signal(p.gate);
  float sums[4] = {};  // of every fourth row
  const auto add = [&](int t, float& sum) {
    float x = input(t), dy = dout(t);
    if (p.pre_gate.data) x *= pre_gate(t);
    if (p.gate.data) dy *= gate(t);
    sum = fmaf(x, dy, sum);
  };
  const int count = int(rows.size());
  int t = 0;
  for (; t + 4 <= count; t += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) add(t + i, sums[i]);
  }
  for (; t < count; ++t) add(t, sums[0]);
  p.sums[part * shape.channels + channel] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

template <class T>
void gradient_sums(const GradientParams& p, int blocks, cudaStream_t stream) {
  const int threads = conv_threads(p.shape.fft_classes) / 2;
  size_t shared = 0;
  for (int c = 1; c <= p.shape.fft_classes; ++c) {
    shared = std::max(shared, with_size(c, [&](auto size) {
                        using Tile = GradientTile<size>;
                        return kOpaqueBytes + threads / Tile::kThreads * kGradientShared<Tile>;
                      }));
  }
  launch("long conv: gradient", gradient_kernel<T>, blocks, threads, shared, stream, p);
}

template <class T>
void skip_sums(const SkipParams& p, cudaStream_t stream) {
  const int64_t parts = divide_up(p.shape.total, kSkipRows);
  launch("long conv: dD", skip_kernel<T>, parts * divide_up(p.shape.channels, kSkipThreads), kSkipThreads, 0, stream,
         p);
}

}  // namespace packseq::longconv
