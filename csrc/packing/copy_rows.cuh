// Copies rows to where they belong: one kernel for packing and unpacking, by where the rows come from.
//
// A block owns a tile of rows of the destination, or a segment of one long row. It first finds out where each of them
// comes from, then copies in the widest units that row size and addresses allow, several loads in flight a thread.
#pragma once
#include "core/packed.h"
#include "packing/packing.h"

namespace packseq {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kTileUnits = 2048;  // of up to 16 bytes: 32 KiB
constexpr int kTileRows = 1024;   // at most
constexpr int kInFlight = 4;      // units a thread loads before it stores

// ---- Sources: find() writes, by the whole block, the row that each of `count` rows from `first` on comes from; -1
// for those that are filled. Whatever indices and boundaries hold, it is a row that exists.

// tokens[t] = padded[indices[t]].
struct ByIndices {
  const int64_t* indices;
  int64_t rows;  // of the padded batch

  __device__ void find(int64_t first, int count, int64_t* map) const {
    for (int i = threadIdx.x; i < count; i += kCopyThreads) {
      const int64_t index = indices[first + i];
      map[i] = index >= 0 && index < rows ? index : -1;
    }
  }
};

// The same from boundaries.
struct ByBoundaries {
  const int32_t* cu_seqlens;
  PaddedShape shape;
  int64_t capacity;

  __device__ void find(int64_t first, int count, int64_t* map) const {
    for (int i = threadIdx.x; i < count; i += kCopyThreads) map[i] = place_of(first + i);
  }

  __device__ int64_t place_of(int64_t t) const {
    if (shape.batch == 0) return -1;
    int64_t b = 0;  // the last sequence that begins at t or before
    for (int64_t low = 1, high = shape.batch; low < high;) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens[middle] <= t) {
        b = middle, low = middle + 1;
      } else {
        high = middle;
      }
    }
    const Span span = span_of(cu_seqlens, shape.batch, capacity, b);
    const bool inside = span.begin <= t && t < span.end && t - span.begin < shape.length;
    return inside ? b * shape.length + t - span.begin : -1;
  }
};

// padded[indices[t]] = tokens[t], seen from the padded rows: since indices grow, those of a tile stand together.
struct ToIndices {
  const int64_t* indices;
  int64_t capacity;

  __device__ void find(int64_t first, int count, int64_t* map) const {
    __shared__ int64_t shared_begin;
    for (int i = threadIdx.x; i < count; i += kCopyThreads) map[i] = -1;
    if (threadIdx.x < 32) {
      const int64_t begin = tokens_before(first);
      if (threadIdx.x == 0) shared_begin = begin;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count && shared_begin + i < capacity; i += kCopyThreads) {
      const int64_t row = indices[shared_begin + i] - first;
      if (row >= 0 && row < count) map[int(row)] = shared_begin + i;
    }
  }

  // How many tokens stand before the row: 32 probes at a time. Slack's -1 counts as the largest number.
  __device__ int64_t tokens_before(int64_t row) const {
    int64_t low = 0, high = capacity;
    while (low < high) {
      const int64_t step = (high - low) / 32 + 1, probe = low + (threadIdx.x + 1) * step - 1;
      const bool before = probe < high && uint64_t(indices[probe]) < uint64_t(row);
      const int64_t steps = __popc(__ballot_sync(~0u, before));
      high = min(high, low + (steps + 1) * step - 1);
      low += steps * step;
    }
    return low;
  }
};

struct ToBoundaries {
  const int32_t* cu_seqlens;
  PaddedShape shape;
  int64_t capacity;

  __device__ void find(int64_t first, int count, int64_t* map) const {
    for (int i = threadIdx.x; i < count; i += kCopyThreads) {
      const int64_t b = (first + i) / shape.length, l = (first + i) % shape.length;
      const Span span = span_of(cu_seqlens, shape.batch, capacity, b);
      map[i] = l < span.size() ? span.begin + l : -1;
    }
  }
};

// ---- The copy ------------------------------------------------------------------------------------------------------

template <class Unit, class Source>
struct CopyParams {
  Source source;
  int64_t rows;       // of the destination
  int64_t row_units;  // of each row
  int tile_rows;      // 1 where a row has several segments
  int segments, segment_units;
  const Unit* from;
  Unit* to;          // [rows, row_units]
  const void* fill;  // 16 bytes, repeated; nullptr: zeros
};

template <class Unit, class Source>
__global__ void __launch_bounds__(kCopyThreads) copy_rows_kernel(const __grid_constant__ CopyParams<Unit, Source> p) {
  __shared__ int64_t map[kTileRows];
  const int64_t first = blockIdx.x / p.segments * int64_t(p.tile_rows);
  const int64_t column = blockIdx.x % p.segments * int64_t(p.segment_units);
  const int rows = int(min(int64_t(p.tile_rows), p.rows - first));
  const uint32_t columns = uint32_t(min(int64_t(p.segment_units), p.row_units - column));
  p.source.find(first, rows, map);
  __syncthreads();

  constexpr int kPattern = 16 / sizeof(Unit);
  const Unit* const from = p.from + column;
  Unit* const to = p.to + first * p.row_units + column;
  const uint32_t units = rows * columns;
  for (uint32_t begin = threadIdx.x; begin < units; begin += kInFlight * kCopyThreads) {
    Unit unit[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const uint32_t u = begin + k * kCopyThreads, row = u / columns, i = u % columns;
      if (u >= units) continue;
      if (const int64_t source = map[row]; source >= 0) {
        unit[k] = from[source * p.row_units + i];
      } else {
        unit[k] = p.fill ? static_cast<const Unit*>(p.fill)[(column + i) % kPattern] : Unit{};
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const uint32_t u = begin + k * kCopyThreads, row = u / columns, i = u % columns;
      if (u < units) to[row * p.row_units + i] = unit[k];
    }
  }
}

}  // namespace
}  // namespace packseq
