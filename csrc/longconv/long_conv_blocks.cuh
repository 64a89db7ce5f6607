// Sequences in blocks, a slab of channels after the other: one kernel that the whole GPU goes through together.
//
// The transforms of all blocks go to device memory, a product of spectra is taken there frequency by frequency, and the
// results are transformed back. Between the three the GPU waits for all its blocks of threads.
//
// With U the blocks of the input and F those of the filter, the output's are
//   Y[o] = sum over i of U[i] W[o - i],  W[d] = F[d] + (-1)^k F[d - 1]
// where the second term is what a product of two blocks adds to the next block. The gradient of the input correlates
// with the filter, that of the filter's block d comes from S[d] + (-1)^k S[d + 1] with S[d] the sum over all sequences
// and i of conj(U[i]) dY[i + d].
#pragma once
#include <cooperative_groups.h>

#include "core/launch.h"
#include "longconv/long_conv_filter.cuh"
#include "longconv/long_conv_staged.cuh"

namespace packseq::longconv {
namespace {

// ---- A slab --------------------------------------------------------------------------------------------------------

// Where a slab's spectra are, and of how many blocks. Each is [blocks, kSlots, lines, channels].
struct Slab {
  int64_t channel0, channels;
  int32_t blocks;         // of all sequences
  int32_t before, after;  // of the filter: lags before 0, and from 0 on
  float4 *filter, *input, *dout, *output, *sums;
  int64_t size;  // elements of a spectrum

  __device__ int32_t filter_blocks() const { return before + after; }
};

// As many as there is room for, but no more than end with a full round of the multiprocessors.
template <class Tile>
__device__ int64_t slab_channels(const BlockParams& p, const Slab& s, int64_t spectra) {
  const int64_t most = p.pool_elements / (spectra * (Tile::kSize / 2) * Tile::kChannels);  // tiles
  const int64_t items = s.blocks + s.filter_blocks();                                      // of a tile
  const int64_t rounds = max(most * items / gridDim.x, int64_t(1));
  return min(min(most, max(rounds * gridDim.x / items, int64_t(1))) * Tile::kChannels, p.shape.channels);
}

// f(item) for this block of threads' part of `items`, of which `before` others have been given out.
template <class F>
__device__ __forceinline__ void for_share(int64_t before, int64_t items, const F& f) {
  int64_t item = (int64_t(blockIdx.x) - before) % gridDim.x;
  if (item < 0) item += gridDim.x;
  for (; item < items; item += gridDim.x) f(item);
}

// The rows of a block, as a sequence of its own.
template <class Tile>
__device__ ListedRows rows_of(const LongBlock& block, bool reverse) {
  const int64_t begin = int64_t(block.index) * Tile::kSize, length = block.rows.end - block.rows.begin;
  const int32_t first = int32_t(begin), last = int32_t(min(begin + Tile::kSize, length));
  return reverse ? ListedRows{block.rows.end - last, block.rows.end - first}
                 : ListedRows{block.rows.begin + first, block.rows.begin + last};
}

// ---- Transforms ----------------------------------------------------------------------------------------------------

template <class Tile>
__device__ void store_spectrum(const Tile& tile, const Slab& s, float4* to, int64_t channel,
                               const float2 (&v)[kPoints]) {
  if (channel >= s.channels) return;
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    __stcg(to + spectrum_at(Tile::kLines, s.channels, i, tile.j, channel), join(v[i], v[kPoints - 1 - i]));
  }
}
template <class Tile>
__device__ void load_spectrum(const Tile& tile, const Slab& s, const float4* from, int64_t channel,
                              float2 (&v)[kPoints]) {
#pragma unroll
  for (int i = 0; i < Tile::kSlots; ++i) {
    const float4* const at = from + spectrum_at(Tile::kLines, s.channels, i, tile.j, channel);
    const float4 x = channel < s.channels ? __ldcg(at) : float4{};
    v[i] = {x.x, x.y}, v[kPoints - 1 - i] = {x.z, x.w};
  }
}

template <class Tile>
__device__ void transform_filter(const BlockParams& p, float4* shared, const Slab& s, int64_t item) {
  const Tile tile(shared);
  const int64_t tiles = divide_up(s.channels, Tile::kChannels), index = item / tiles;
  const int64_t channel = item % tiles * Tile::kChannels + tile.channel;
  float2 v[kPoints] = {};
  if (channel < s.channels) {
#pragma unroll
    for (int place = 0; place < kPoints; ++place) {
      if (place % Tile::kFirst >= Tile::kFirst / 2) continue;
      const int64_t lag = (index - s.before) * Tile::kSize + 2 * tile.number(place), of = s.channel0 + channel;
      constexpr float kScale = 1.f / (8 * Tile::kSize);
      v[place] = {kScale * filter_at(p.filter, of, lag), kScale * filter_at(p.filter, of, lag + 1)};
    }
  }
  tile.template forward<true>(v);
  tile.wait();
  store_spectrum(tile, s, s.filter + index * s.size, channel, v);
}

// Blocks of the call's input. Where rows are staged, those of the next item are under way during a transform.
template <class T, class Tile, bool kStaged>
__device__ void transform_blocks(const BlockParams& p, const ConvCall& call, float4* shared, const Slab& s,
                                 int64_t before, float4* spectra) {
  const int64_t tiles = divide_up(s.channels, Tile::kChannels), items = s.blocks * tiles;
  const auto buffer = [&](const Tile& tile) { return RowBuffer<T, Tile>(tile, shared + Tile::used(blockDim.x)); };
  const auto channel_tile = [&](int64_t item) { return uint32_t(s.channel0 / Tile::kChannels + item % tiles); };
  const auto rows = [&](int64_t item) { return rows_of<Tile>(p.shape.blocks[item / tiles], call.reverse); };
  const auto fetch = [&](int64_t item) {
    const Tile tile(shared);
    if (item < items) {
      buffer(tile).fetch(tile, TileRows<const T>::of(tile, call.input.data, call.input.token, rows(item), p.shape,
                                                     channel_tile(item), call.reverse));
    }
    copy_async_commit();
  };
  bool first = true;
  for_share(before, items, [&](int64_t item) {
    const Tile tile(shared);
    const int64_t channel = item % tiles * Tile::kChannels + tile.channel;
    const Piece piece = Piece::of(p.shape, rows(item), s.channel0 + channel, call.reverse);
    float2 v[kPoints];
    if constexpr (kStaged) {
      if (first) fetch(item);
      first = false;
      copy_async_wait<0>();
      tile.wait();
      buffer(tile).load_input(
          tile, call, [&] { return piece; }, v);
      tile.wait();
      fetch(item + gridDim.x);
    } else {
      load_input<T>(tile, call, piece, v);
    }
    tile.template forward<true>(v);
    tile.wait();
    store_spectrum(tile, s, spectra + item / tiles * s.size, channel, v);
  });
  copy_async_wait<0>();
}

template <class T, class Tile, bool kStaged>
__device__ void inverse_blocks(const BlockParams& p, const ConvCall& call, float4* shared, const Slab& s,
                               int64_t before, const float4* spectra) {
  const int64_t tiles = divide_up(s.channels, Tile::kChannels), items = s.blocks * tiles;
  for_share(before, items, [&](int64_t item) {
    const Tile tile(shared);
    const int64_t channel = item % tiles * Tile::kChannels + tile.channel;
    const uint32_t channel_tile = uint32_t(s.channel0 / Tile::kChannels + item % tiles);
    const ListedRows rows = rows_of<Tile>(p.shape.blocks[item / tiles], call.reverse);
    const Piece piece = Piece::of(p.shape, rows, s.channel0 + channel, call.reverse);
    const RowBuffer<T, Tile> buffer(tile, shared + Tile::used(blockDim.x));
    if (kStaged && call.D) {
      buffer.fetch(tile, TileRows<const T>::of(tile, call.input.data, call.input.token, rows, p.shape, channel_tile,
                                               call.reverse));
    }
    copy_async_commit();
    float2 v[kPoints];
    load_spectrum(tile, s, spectra + item / tiles * s.size, channel, v);
    tile.wait();
    tile.template inverse<true>(v);
    if constexpr (kStaged) {
      copy_async_wait<0>();
      tile.wait();
      buffer.finish_rows(tile, call, piece, p.shape.channels, v);
      tile.wait();
      buffer.store(tile, TileRows<T>::of(tile, call.out, p.shape.channels, rows, p.shape, channel_tile, call.reverse));
      tile.wait();
    } else {
      finish_rows<T>(tile, call, piece, p.shape.channels, v);
    }
  });
}

// The filter's gradient from the sums.
template <class Tile>
__device__ void inverse_sums(const BlockParams& p, float4* shared, const Slab& s) {
  const int64_t tiles = divide_up(s.channels, Tile::kChannels);
  for_share(0, s.filter_blocks() * tiles, [&](int64_t item) {
    const Tile tile(shared);
    const int64_t index = item / tiles, channel = item % tiles * Tile::kChannels + tile.channel;
    const float sign = tile.j % 2 ? -1.f : 1.f;  // of the frequencies of this thread
    float2 v[kPoints];
    load_spectrum(tile, s, s.sums + index * s.size, channel, v);
    const float4* const next = s.sums + (index + 1) * s.size;
#pragma unroll
    for (int i = 0; i < Tile::kSlots; ++i) {
      if (channel >= s.channels) continue;
      const float4 x = __ldcg(next + spectrum_at(Tile::kLines, s.channels, i, tile.j, channel));
      v[i] = v[i] + sign * float2{x.x, x.y};
      v[kPoints - 1 - i] = v[kPoints - 1 - i] + sign * float2{x.z, x.w};
    }
    tile.wait();
    tile.template inverse<true>(v);
    if (channel >= s.channels) return;
    const FilterGradient gradient = {p.dk, p.dk_after, p.filter.taps, p.filter.taps_after};
    constexpr float kScale = 1.f / (8 * Tile::kSize);
#pragma unroll
    for (int place = 0; place < kPoints; ++place) {
      if (place % Tile::kFirst >= Tile::kFirst / 2) continue;
      const int64_t lag = (index - s.before) * Tile::kSize + 2 * tile.number(place), of = s.channel0 + channel;
      gradient.add(of, lag, kScale * v[place].x), gradient.add(of, lag + 1, kScale * v[place].y);
    }
  });
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Two frequencies; the first may be two real numbers.
struct Pair {
  float2 a, b;

  __device__ static Pair load(const float4* p) {
    const float4 x = __ldcg(p);
    return {{x.x, x.y}, {x.z, x.w}};
  }
  __device__ void store(float4* p) const { __stcg(p, join(a, b)); }
};

// c + x y
__device__ Pair multiply_add(Pair x, Pair y, Pair c, bool two_reals) {
  const float2 real = {fmaf(x.a.x, y.a.x, c.a.x), fmaf(x.a.y, y.a.y, c.a.y)};
  return {two_reals ? real : fft::multiply_add(x.a, y.a, c.a), fft::multiply_add(x.b, y.b, c.b)};
}
__device__ Pair conjugate(Pair x, bool two_reals) {
  return {two_reals ? x.a : fft::conjugate(x.a), fft::conjugate(x.b)};
}

// A thread's element of every spectrum of a slab.
struct Element {
  int64_t place;
  bool two_reals;
  float sign;  // (-1)^k

  __device__ static Element of(const Slab& s, int lines, int64_t place) {
    const int64_t line = place / s.channels % lines;
    return {place, place < s.channels, line % 2 ? -1.f : 1.f};
  }
};

constexpr int kAtOnce = 8;  // outputs, or distances, that a thread works on

struct FilterWeights {
  const Slab& s;
  const Element& e;
  bool correlate;

  __device__ Pair filter(int d) const {
    if (d < -s.before || d >= s.after) return {};
    return Pair::load(s.filter + (d + s.before) * s.size + e.place);
  }
  __device__ Pair operator()(int d) const {
    if (correlate) d = -d;
    const Pair own = filter(d), before = filter(d - 1);
    const Pair sum = {own.a + e.sign * before.a, own.b + e.sign * before.b};
    return correlate ? conjugate(sum, e.two_reals) : sum;
  }
};

// Outputs first ... first + kAtOnce of one sequence of `count` blocks, which begins at `input`.
__device__ void multiply_group(const Slab& s, const Element& e, const float4* input, float4* output, int count,
                               int first, bool correlate) {
  const FilterWeights weights = {s, e, correlate};
  const int back = correlate ? s.before : s.after;  // distances with a weight: -ahead ... back
  const int ahead = correlate ? s.after : s.before;
  const int begin = max(0, first - back), end = min(count, first + kAtOnce + ahead);
  Pair sums[kAtOnce] = {}, weight[kAtOnce];
#pragma unroll
  for (int q = 0; q < kAtOnce; ++q) weight[q] = weights(first + q - begin);
  for (int i = begin; i < end; ++i) {
    const Pair x = Pair::load(input + i * s.size + e.place);
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) sums[q] = multiply_add(x, weight[q], sums[q], e.two_reals);
#pragma unroll
    for (int q = kAtOnce - 1; q > 0; --q) weight[q] = weight[q - 1];
    weight[0] = weights(first - i - 1);
  }
#pragma unroll
  for (int q = 0; q < kAtOnce; ++q) {
    if (first + q < count) sums[q].store(output + (first + q) * s.size + e.place);
  }
}

// A sequence of few blocks and a filter on one side: all inputs and weights are under way together.
__device__ void multiply_few(const Slab& s, const Element& e, float4* inout, int count, bool correlate) {
  Pair x[kAtOnce], w[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    x[i] = i < count ? Pair::load(inout + i * s.size + e.place) : Pair{};
    w[i] = i < count && i < s.after ? Pair::load(s.filter + i * s.size + e.place) : Pair{};
  }
#pragma unroll
  for (int d = kAtOnce - 1; d > 0; --d) w[d] = {w[d].a + e.sign * w[d - 1].a, w[d].b + e.sign * w[d - 1].b};
  if (correlate) {
#pragma unroll
    for (int d = 0; d < kAtOnce; ++d) w[d] = conjugate(w[d], e.two_reals);
  }
#pragma unroll
  for (int o = 0; o < kAtOnce; ++o) {
    if (o >= count) continue;
    Pair sum = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int d = correlate ? i - o : o - i;
      if (d >= 0) sum = multiply_add(x[i], w[d], sum, e.two_reals);
    }
    sum.store(inout + o * s.size + e.place);
  }
}

// In an order in which outputs may take the inputs' places where the filter has one side.
__device__ void multiply_sequence(const Slab& s, const Element& e, float4* input, float4* output, int count,
                                  bool correlate) {
  if (input == output && count <= kAtOnce) return multiply_few(s, e, input, count, correlate);
  const int groups = (count + kAtOnce - 1) / kAtOnce;
  for (int g = 0; g < groups; ++g) {
    multiply_group(s, e, input, output, count, (correlate ? g : groups - 1 - g) * kAtOnce, correlate);
  }
}

// Products of all sequences' blocks with the filter's.
template <class Tile>
__device__ void multiply_blocks(const BlockParams& p, const Slab& s, float4* input, bool correlate) {
  float4* const output = s.output ? s.output : input;
  const int64_t parts = divide_up(s.size, int64_t(blockDim.x));
  for_share(0, s.blocks * parts, [&](int64_t item) {
    const int64_t first = item / parts, place = item % parts * blockDim.x + threadIdx.x;
    const LongBlock block = p.shape.blocks[first];
    if (block.index != 0 || place >= s.size) return;
    multiply_sequence(s, Element::of(s, Tile::kLines, place), input + first * s.size, output + first * s.size,
                      min(block.count, int32_t(s.blocks - first)), correlate);
  });
}

// Sums of conj(U[i]) dY[i + d] over all sequences' blocks, for kAtOnce distances d at a time.
__device__ void sum_products(const BlockParams& p, const Slab& s, const Element& e) {
  for (int index = 0; index <= s.filter_blocks(); index += kAtOnce) {
    const int distance = index - s.before;
    Pair sums[kAtOnce] = {};
    for (int block0 = 0; block0 < s.blocks;) {
      const int count = min(p.shape.blocks[block0].count, s.blocks - block0);
      const auto dy = [&](int i) {
        if (i < 0 || i >= count) return Pair{};
        return Pair::load(s.dout + (block0 + i) * s.size + e.place);
      };
      const int begin = max(0, -distance - kAtOnce + 1), end = min(count, count - distance);
      Pair window[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) window[q] = begin < end ? dy(begin + distance + q) : Pair{};
      for (int i = begin; i < end; ++i) {
        const Pair x = conjugate(Pair::load(s.input + (block0 + i) * s.size + e.place), e.two_reals);
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) sums[q] = multiply_add(x, window[q], sums[q], e.two_reals);
#pragma unroll
        for (int q = 0; q + 1 < kAtOnce; ++q) window[q] = window[q + 1];
        window[kAtOnce - 1] = dy(i + 1 + distance + kAtOnce - 1);
      }
      block0 += count;
    }
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      if (index + q <= s.filter_blocks()) sums[q].store(s.sums + (index + q) * s.size + e.place);
    }
  }
}

template <class Tile>
__device__ void sum_all_products(const BlockParams& p, const Slab& s) {
  for_share(0, divide_up(s.size, int64_t(blockDim.x)), [&](int64_t part) {
    const int64_t place = part * blockDim.x + threadIdx.x;
    if (place < s.size) sum_products(p, s, Element::of(s, Tile::kLines, place));
  });
}

// ---- The kernel ----------------------------------------------------------------------------------------------------

template <class T, int kSize, bool kStaged>
__global__ void __launch_bounds__(ConvTile<kSize>::kThreads, 1)
    blocks_kernel(const __grid_constant__ BlockParams params) {
  if constexpr (!kStaged || kCanStage) {
    extern __shared__ float4 shared_memory[];
    using Tile = ConvTile<kSize>;
    const BlockParams& p = keep_params(shared_memory, params);
    static_assert(sizeof(BlockParams) + sizeof(Slab) <= kParamsBytes);
    Slab& slab = *reinterpret_cast<Slab*>(reinterpret_cast<char*>(shared_memory) + sizeof(BlockParams));
    float4* const shared = start_shared(shared_memory);
    const Plan& plan = *p.shape.plan;
    if (plan.long_blocks == 0) return;
    Tile::begin(shared, p.shape.table);
    const auto grid = cooperative_groups::this_grid();

    const auto two_sided = [&] { return p.blocks_before > 0; };
    const auto begin_slab = [&](int64_t channel0) {  // by one thread
      Slab s = {};
      s.blocks = plan.long_blocks;
      s.before = min(p.blocks_before, plan.most_blocks), s.after = min(p.blocks_after, plan.most_blocks);
      const int64_t spectra = s.filter_blocks() + int64_t(s.blocks) * (1 + p.backward + two_sided()) +
                              (p.backward ? s.filter_blocks() + 1 : 0);
      s.channel0 = channel0;
      s.channels = min(slab_channels<Tile>(p, s, spectra), p.shape.channels - channel0);
      s.size = kSize / 2 * s.channels;
      float4* next = p.pool;
      const auto take = [&](int64_t count) {
        float4* const at = next;
        next += count * s.size;
        return at;
      };
      s.filter = take(s.filter_blocks()), s.input = take(s.blocks), s.dout = p.backward ? take(s.blocks) : nullptr;
      s.output = two_sided() ? take(s.blocks) : nullptr, s.sums = p.backward ? take(s.filter_blocks() + 1) : nullptr;
      slab = s;
    };
    const Slab& s = slab;
    if (threadIdx.x == 0) begin_slab(0);
    __syncthreads();
    while (s.channel0 < p.shape.channels) {
      const int64_t tiles = divide_up(s.channels, Tile::kChannels);
      const int64_t of_filter = s.filter_blocks() * tiles, of_blocks = s.blocks * tiles;
      for_share(0, of_filter, [&](int64_t item) { transform_filter<Tile>(p, shared, s, item); });
      for (int k = 0; k <= int(p.backward); ++k) {
        transform_blocks<T, Tile, kStaged>(p, k ? p.dy : p.x, shared, s, of_filter + k * of_blocks,
                                           k ? s.dout : s.input);
      }
      grid.sync();
      if (p.backward) {
        sum_all_products<Tile>(p, s);
        grid.sync();
      }
      for (int k = int(p.backward); k >= 0; --k) {
        const ConvCall& call = k ? p.dy : p.x;
        if (!call.out) continue;
        float4* const input = k ? s.dout : s.input;
        multiply_blocks<Tile>(p, s, input, k);
        if (k) inverse_sums<Tile>(p, shared, s);
        grid.sync();
        inverse_blocks<T, Tile, kStaged>(p, call, shared, s, k ? of_filter : 0, s.output ? s.output : input);
        grid.sync();
      }
      if (threadIdx.x == 0) begin_slab(s.channel0 + s.channels);
      __syncthreads();
    }
  }
}

}  // namespace

template <class T>
void convolve_blocks(const BlockParams& p, bool staged, int blocks, cudaStream_t stream) {
  with_largest_size(p.shape.fft_classes, [&](auto size) {
    using Tile = ConvTile<size>;
    const size_t buffer = staged ? RowBuffer<T, Tile>::kBytes : 0;
    launch_together("long conv: blocks", staged ? blocks_kernel<T, size, true> : blocks_kernel<T, size, false>, blocks,
                    Tile::kThreads, shared_bytes<Tile>(Tile::kThreads) + buffer, stream, p);
  });
}

}  // namespace packseq::longconv
