// Rows of one sequence and a tile of channels in shared memory: they come there ahead of their use, leave from there,
// and take up no register and hardly an instruction on the way. Results take the place of what they were made of.
//
// Row t lies at [t % 2][t / 2], so that neighbouring threads, which have pairs of rows, read neighbouring places; 64
// bytes between the halves keep the two apart for the banks when chunks of whole rows are copied.
#pragma once
#include "core/device/async_copy.cuh"
#include "longconv/long_conv_rows.cuh"

namespace packseq::longconv {

// Rows of a tile of channels in device memory: row t, from the tile's first channel on, is at first + t step.
template <class T>
struct TileRows {
  T* first;
  int32_t step, rows, channels;

  template <class Tile>
  __device__ static TileRows of(const Tile&, const void* data, int64_t stride, ListedRows listed, const Shape& shape,
                                uint32_t channel_tile, bool reverse) {
    const int64_t channel0 = int64_t(channel_tile) * Tile::kChannels, row = reverse ? listed.end - 1 : listed.begin;
    return {const_cast<T*>(static_cast<const T*>(data)) + row * stride + channel0, int32_t(reverse ? -stride : stride),
            listed.end - listed.begin, int32_t(min(shape.channels - channel0, int64_t(Tile::kChannels)))};
  }
};

template <class T, class Tile>
struct RowBuffer {
  static constexpr int kRowBytes = Tile::kChannels * sizeof(T), kChunkBytes = kRowBytes < 16 ? kRowBytes : 16;
  static constexpr int kParts = kRowBytes / kChunkBytes, kOfChunk = kChunkBytes / sizeof(T);  // chunks, elements
  static constexpr int kChunks = Tile::kSize * kParts / Tile::kThreads;                       // of a thread
  static constexpr int kOdd = Tile::kSize / 2 * Tile::kChannels + 64 / sizeof(T);  // elements before the odd rows
  static constexpr int kBytes = 2 * kOdd * sizeof(T);
  using Chunk = std::conditional_t<kChunkBytes == 16, uint4, std::conditional_t<kChunkBytes == 8, uint2, unsigned>>;
  static_assert(sizeof(Chunk) == kChunkBytes && kBytes % 16 == 0 && kChunks * Tile::kThreads == Tile::kSize * kParts);

  T* rows;  // the team's

  // `at`: of all teams
  __device__ RowBuffer(const Tile& tile, float4* at)
      : rows(reinterpret_cast<T*>(reinterpret_cast<char*>(at) + tile.team * kBytes)) {}

  // This thread's chunks in shared memory, in device memory, and which of them are there.
  template <class U>
  struct Chunks {
    static constexpr int kRows = Tile::kThreads / kParts;  // from one to the next
    static_assert(kRows % 2 == 0);
    T* here;
    U* there;
    int64_t stride;
    int left;

    __device__ Chunks(T* rows, const Tile& tile, const TileRows<U>& of) {
      const int thread = tile.j * Tile::kChannels + tile.channel, t = thread / kParts;
      const int channel = thread % kParts * kOfChunk;
      here = rows + (t % 2 * kOdd + t / 2 * Tile::kChannels + channel);
      there = of.first + (int64_t(of.step) * t + channel), stride = int64_t(of.step) * kRows;
      left = channel < of.channels ? of.rows - t : 0;
    }
    __device__ T* in_shared(int n) const { return here + n * (kRows / 2 * Tile::kChannels); }
    __device__ U* in_global(int n) const { return there + n * stride; }
    __device__ bool exists(int n) const { return n * kRows < left; }
  };
  // Zeros where there are no rows.
  __device__ void fetch(const Tile& tile, const TileRows<const T>& from) const {
    const Chunks<const T> chunks(rows, tile, from);
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const uint32_t to = uint32_t(__cvta_generic_to_shared(chunks.in_shared(n)));
      if constexpr (kChunkBytes == 16) {
        copy_async_16(to, chunks.in_global(n), chunks.exists(n));
      } else if constexpr (kChunkBytes == 8) {
        copy_async_8(to, chunks.in_global(n), chunks.exists(n));
      } else {
        copy_async_4(to, chunks.in_global(n), chunks.exists(n));
      }
    }
  }
  __device__ void store(const Tile& tile, const TileRows<T>& to) const {
    const Chunks<T> chunks(rows, tile, to);
    Chunk values[kChunks];
#pragma unroll
    for (int n = 0; n < kChunks; ++n) values[n] = *reinterpret_cast<const Chunk*>(chunks.in_shared(n));
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      if (chunks.exists(n)) __stcs(reinterpret_cast<Chunk*>(chunks.in_global(n)), values[n]);
    }
  }

  // f(place, row t, row t + 1) for the rows of this thread's registers.
  template <class F>
  __device__ void for_rows(const Tile& tile, const F& f) const {
    T* const first = rows + (tile.j * Tile::kChannels + tile.channel);
#pragma unroll
    for (int place = 0; place < kPoints; ++place) {
      if (place % Tile::kFirst >= Tile::kFirst / 2) continue;
      const int pair = Tile::kLines * (place / Tile::kFirst) + Tile::kRest * (place % Tile::kFirst);
      f(place, first[pair * Tile::kChannels], first[pair * Tile::kChannels + kOdd]);
    }
  }
  // piece_of(): asked where it is needed.
  template <class F>
  __device__ void load_input(const Tile& tile, const ConvCall& call, const F& piece_of, float2 (&v)[kPoints]) const {
    for_rows(tile, [&](int place, T even, T odd) { v[place] = {float(even), float(odd)}; });
    if (call.pre_gate.data) multiply_rows<T>(tile, call.pre_gate, call, piece_of(), v);
  }
  __device__ void finish_rows(const Tile& tile, const ConvCall& call, const Piece& piece, int64_t channels,
                              float2 (&v)[kPoints]) const {
    finish<T>(
        tile, call, piece, channels, v,
        [&](float2(&x)[kPoints]) {
          load_input(
              tile, call, [&] { return piece; }, x);
        },
        [&] { for_rows(tile, [&](int place, T& even, T& odd) { even = T(v[place].x), odd = T(v[place].y); }); });
  }
};

// The steps that a team takes one after the other, in shared memory. Its first thread, which alone keeps count, makes
// the next one `now`, and of that the one after: next(step) changes what it is given and says where its rows are
// listed, or makes it none. Others may look after the barrier that follows.
template <class Tile, class F>
__device__ __forceinline__ void begin_step(const Tile& tile, float4* shared, const F& next) {
  if (tile.j == 0 && tile.channel == 0) {
    Turn& turn = turn_of(shared, tile.team);
    Step step = turn.next;
    turn.now = step;
    const ListedRows* const rows = next(step);
    turn.next = step;
    if (step.item != Step::kNone) copy_async_8(uint32_t(__cvta_generic_to_shared(&turn.next.rows)), rows, true);
  }
  copy_async_commit();
}

// A block's place among the units of what comes next, if it began these at `unit` and went on in steps of the grid.
__device__ __forceinline__ uint32_t unit_behind(uint32_t unit, uint32_t units) {
  const uint32_t left = units - min(units, unit);
  return unit + (left + gridDim.x - 1) / gridDim.x * gridDim.x - units;
}

}  // namespace packseq::longconv
