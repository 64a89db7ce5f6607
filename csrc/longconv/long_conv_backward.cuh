// The gradients of sequences that are one transform, and the filter's of those that are a direct sum. With X, dY and K
// the spectra of x, y's gradient and the filter, x's gradient is the transform back of conj(K) dY, and the filter's
// that of the sum over sequences of conj(X) dY.
//
// A team of threads takes a chunk of a class's sequences and a few channels. It transforms x, then dy, adds their
// product to sums that lie in shared memory, where every thread has its own, and transforms dy's with the filter back;
// of the largest size, a convolution in reversed time does that.
#pragma once
#include "core/launch.h"
#include "longconv/long_conv_staged.cuh"

namespace packseq::longconv {
namespace {

// This thread's sums: slot i is at [i * blockDim.x]. They come behind what the transforms use.
template <class Tile>
__device__ float4* sums_of(float4* shared) {
  return shared + Tile::used(blockDim.x) + opaque(int(threadIdx.x), shared);
}

template <class Tile>
__device__ void clear_sums(float4* shared) {
  float4* const sums = sums_of<Tile>(shared);
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) sums[i * blockDim.x] = {};
}

template <class Tile>
__device__ void store_sums(const GradientParams& p, float4* shared, int c, uint32_t chunk, uint32_t channel_tile) {
  const Tile tile(shared);
  const int64_t channels = p.shape.channels, channel = int64_t(channel_tile) * Tile::kChannels + tile.channel;
  if (channel >= channels) return;
  const float4* const sums = sums_of<Tile>(shared);
  float4* const to = p.sums + (p.shape.plan->sums[c] + int64_t(chunk) * Tile::kSize) / 2 * channels;
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    __stcg(to + spectrum_at(Tile::kLines, channels, i, tile.j, channel), sums[i * blockDim.x]);
  }
}

template <class Tile>
inline constexpr bool kFused = Tile::kSize <= size_of_class(kFusedClasses);

// dy's transform, then from both spectra to the sums and, in dy, to the spectrum of x's gradient.
template <class Tile>
__device__ void transform_and_multiply(const GradientParams& p, float4* shared, int c, uint32_t channel_tile,
                                       const float2 (&x)[kPoints], float2 (&dy)[kPoints]) {
  const Tile tile(shared);
  Weights<Tile> weights;
  tile.template forward<true>(dy, [&](const Tile& tile) {
    if constexpr (kFused<Tile>) weights.begin(filter_place(tile, p.spectra, p.shape, c, channel_tile));
  });
  float4* const sums = sums_of<Tile>(shared);
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    sums[i * blockDim.x] = tile.correlate(x, dy, sums[i * blockDim.x], i);
    if constexpr (kFused<Tile>) tile.multiply_by_conjugate(dy[i], dy[kPoints - 1 - i], weights.take(i), i);
  }
}

// The team's item. Which it is, is asked anew wherever it matters, for want of registers.
template <class T, class Tile>
__device__ void convolve_chunk(const GradientParams& p, float4* shared, int c) {
  const auto item = [&] { return warp_counter(shared) * (blockDim.x / Tile::kThreads) + Tile(shared).team; };
  const auto channel_tile = [&] { return item() % p.shape.tiles(Tile::kChannels); };
  const auto chunk = [&] { return item() / p.shape.tiles(Tile::kChannels); };
  clear_sums<Tile>(shared);
  for (uint32_t i = 0; i < kChunkSequences && chunk() * kChunkSequences + i < p.shape.plan->count[c]; ++i) {
    const Tile tile(shared);
    const auto piece = [&] {
      const ListedRows listed = p.shape.list[p.shape.plan->first[c] + chunk() * kChunkSequences + i];
      return Piece::of(p.shape, listed, int64_t(channel_tile()) * Tile::kChannels + tile.channel, p.x.reverse);
    };
    float2 x[kPoints], dy[kPoints];
    load_input<T>(tile, p.x, piece(), x);
    tile.template forward<true>(x);
    load_input<T>(tile, p.dy, piece(), dy);
    tile.wait();
    transform_and_multiply<Tile>(p, shared, c, channel_tile(), x, dy);
    if constexpr (kFused<Tile>) {
      tile.template inverse<true>(dy);
      finish_rows<T>(tile, p.dy, piece(), p.shape.channels, dy);
    }
    tile.wait();
  }
  store_sums<Tile>(p, shared, c, chunk(), channel_tile());
}

// The chunks of a class, by rows in shared memory: x of a team's next sequence is under way from x's transform on, its
// dy while x is transformed.
template <class T, class Tile>
__device__ void convolve_chunks_staged(const GradientParams& p, float4* shared, int c, uint32_t& unit, uint32_t items) {
  using Buffer = RowBuffer<T, Tile>;
  const auto teams = [] { return blockDim.x / Tile::kThreads; };
  const auto of_x = [&](const Tile& tile) {
    return Buffer(tile, shared + (Tile::used(blockDim.x) + Tile::kSlots * blockDim.x));
  };
  const auto of_dy = [&](const Tile& tile) {
    return Buffer(tile, shared + (Tile::used(blockDim.x) + Tile::kSlots * blockDim.x +
                                  teams() * (Buffer::kBytes / sizeof(float4))));
  };
  const auto fetch = [&](const Tile& tile, const Buffer& buffer, const Rows& from, const Step& step) {
    buffer.fetch(
        tile, TileRows<const T>::of(tile, from.data, from.token, step.rows, p.shape, step.channel_tile, p.x.reverse));
  };
  const auto first_of = [&](uint32_t item, Step& step) {
    const uint32_t tiles = p.shape.tiles(Tile::kChannels);
    step.item = item < block_number(shared, 0) ? item : Step::kNone;
    step.channel_tile = item % tiles, step.chunk = item / tiles, step.at = 0;
  };
  const auto listed = [&](const Step& step) {
    return p.shape.list + __ldg(&p.shape.plan->first[c]) + step.chunk * kChunkSequences + step.at;
  };
  __syncthreads();
  block_number(shared, 0) = items, block_number(shared, 1) = unit;
  Tile::begin(shared, p.shape.table);
  bool more = unit * teams() + Tile(shared).team < items;
  if (more) {
    const Tile tile(shared);
    Step step;
    first_of(unit * teams() + tile.team, step);
    step.rows = *listed(step);
    turn_of(shared, tile.team).next = step;
    fetch(tile, of_x(tile), p.x.input, step);
    copy_async_commit();
    fetch(tile, of_dy(tile), p.dy.input, step);
    clear_sums<Tile>(shared);
  }
  copy_async_commit();
  while (more) {
    const Tile tile(shared);
    copy_async_wait<1>();
    tile.wait();
    begin_step(tile, shared, [&](Step& step) {
      ++step.at;
      const bool last =
          step.at == kChunkSequences || step.chunk * kChunkSequences + step.at == __ldg(&p.shape.plan->count[c]);
      if (last) first_of(step.item + gridDim.x * teams(), step);
      return listed(step);
    });
    const auto piece = [&](const Tile& tile) {
      const Step& now = turn_of(shared, tile.team).now;
      return Piece::of(p.shape, now.rows, int64_t(now.channel_tile) * Tile::kChannels + tile.channel, p.x.reverse);
    };
    float2 x[kPoints], dy[kPoints];
    if (p.x.pre_gate.data) tile.wait();  // for what piece() reads
    of_x(tile).load_input(
        tile, p.x, [&] { return piece(tile); }, x);
    tile.template forward<true>(x);
    copy_async_wait<0>();
    tile.wait();
    if (const Step& next = turn_of(shared, tile.team).next; next.item != Step::kNone) {
      fetch(tile, of_x(tile), p.x.input, next);
    }
    copy_async_commit();
    of_dy(tile).load_input(
        tile, p.dy, [&] { return piece(tile); }, dy);
    transform_and_multiply<Tile>(p, shared, c, turn_of(shared, tile.team).now.channel_tile, x, dy);
    if constexpr (kFused<Tile>) {
      tile.template inverse<true>(dy);
      of_dy(tile).finish_rows(tile, p.dy, piece(tile), p.shape.channels, dy);
    }
    tile.wait();
    const Turn turn = turn_of(shared, tile.team);
    if constexpr (kFused<Tile>) {
      of_dy(tile).store(tile, TileRows<T>::of(tile, p.dy.out, p.shape.channels, turn.now.rows, p.shape,
                                              turn.now.channel_tile, p.x.reverse));
    }
    more = turn.next.item != Step::kNone;
    if (more) fetch(tile, of_dy(tile), p.dy.input, turn.next);
    copy_async_commit();
    if (!more || turn.next.at == 0) {
      store_sums<Tile>(p, shared, c, turn.now.chunk, turn.now.channel_tile);
      clear_sums<Tile>(shared);
    }
  }
  unit = unit_behind(block_number(shared, 1), (block_number(shared, 0) + teams() - 1) / teams());
}

// One warp, a channel a lane: the lags between blocks of rows that lie `distance` blocks apart.
template <class T>
__device__ void sum_directly(const GradientParams& p, int64_t chunk, int64_t channel, int distance) {
  const Plan& plan = *p.shape.plan;
  if (channel >= p.shape.channels) return;
  float sums[kBlockLags] = {};
  const int64_t end = min((chunk + 1) * plan.chunk_rows[0], int64_t(plan.count[0]));
  for (int64_t at = chunk * plan.chunk_rows[0]; at < end; ++at) {
    const Piece piece = Piece::of(p.shape, p.shape.list[plan.first[0] + at], channel, p.x.reverse);
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
    __stcg(p.direct_sums + (group * kBlockLags + e) * p.shape.channels + channel, sums[e]);
  }
}

template <class T, bool kStaged>
__global__ void __launch_bounds__(256, 1) gradient_kernel(const __grid_constant__ GradientParams params) {
  if constexpr (!kStaged || kCanStage) {
    extern __shared__ float4 shared_memory[];
    const GradientParams& p = keep_params(shared_memory, params);
    float4* const shared = start_shared(shared_memory);
    const Shape& shape = p.shape;
    uint32_t unit = blockIdx.x;
    for_classes(shape.fft_classes, [&](auto c) {
      using Tile = GradientTile<size_of_class(c)>;
      const int chunks = shape.plan->chunks[c];
      if (chunks == 0) return;
      const uint32_t items = chunks * shape.tiles(Tile::kChannels);
      // Rows of two float32 channels are too short to be copied.
      if constexpr (kStaged && (kFused<Tile> || sizeof(T) < 4)) {
        convolve_chunks_staged<T, Tile>(p, shared, c, unit, items);
      } else {
        Tile::begin(shared, shape.table);
        for_items<Tile::kThreads>(shared, unit, items, [&](uint32_t) { convolve_chunk<T, Tile>(p, shared, c); });
      }
    });
    const int distances = p.two_sided ? kLagGroups : kLagBlocks, first = p.two_sided ? 1 - kLagBlocks : 0;
    const uint32_t tiles = shape.tiles(32);
    for_items<32>(shared, unit, shape.plan->chunks[0] * tiles * distances, [&](uint32_t item) {
      const int64_t channel = item / distances % tiles * int64_t(32) + threadIdx.x % 32;
      sum_directly<T>(p, item / distances / tiles, channel, first + int(item % distances));
    });
  }
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
size_t gradient_bytes(int fft_classes, bool staged) {
  const int threads = conv_threads(fft_classes) / 2;
  size_t bytes = 0;
  for (int c = 1; c <= fft_classes; ++c) {
    bytes = std::max(bytes, with_size(c, [&](auto size) {
                       using Tile = GradientTile<size>;
                       const size_t buffers = staged ? 2 * threads / Tile::kThreads * RowBuffer<T, Tile>::kBytes : 0;
                       return shared_bytes<Tile>(threads) + Tile::kSlots * threads * sizeof(float4) + buffers;
                     }));
  }
  return bytes;
}

template <class T>
void gradients(const GradientParams& p, bool staged, int blocks, cudaStream_t stream) {
  launch("long conv: gradient", staged ? gradient_kernel<T, true> : gradient_kernel<T, false>, blocks,
         conv_threads(p.shape.fft_classes) / 2, gradient_bytes<T>(p.shape.fft_classes, staged), stream, p);
}

template <class T>
void skip_sums(const SkipParams& p, cudaStream_t stream) {
  const int64_t parts = divide_up(p.shape.total, kSkipRows);
  launch("long conv: dD", skip_kernel<T>, parts * divide_up(p.shape.channels, kSkipThreads), kSkipThreads, 0, stream,
         p);
}

}  // namespace packseq::longconv
