// A tile of a packed tensor into shared memory: rows outside the sequence become zeros and are not read.
#pragma once
#include <cstdint>

#include "core/device/async_copy.cuh"
#include "core/device/shared_tile.cuh"
#include "core/packed.h"

namespace packseq {

// One thread's share of the copies of tiles of one tensor and head. Eight neighbouring threads copy 128 bytes of a row.
template <class T, class Tile, int kThreads>
class TileLoader {
 public:
  // Rows have `cols` elements; the tensor must outlive the loader.
  __device__ TileLoader(const Packed& x, int head, int cols)
      : x_(x), column_(static_cast<const T*>(x.data) + head * x.head + threadIdx.x % 8 * 8), cols_(cols) {}

  // Starts copying rows first ... first + Tile::kRows of the sequence that starts at row `begin` and has `length`.
  __device__ void load(uint32_t tile, int32_t begin, int32_t first, int32_t length) const {
    constexpr int kStep = kThreads / 8;
    static_assert(Tile::kRows % kStep == 0 && kStep % 8 == 0);  // so that a thread's swizzle stays the same
    const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const T* pointer = column_ + (int64_t(begin) + first + row0) * x_.token;
    const uint32_t shared = tile + Tile::offset(row0, chunk);
#pragma unroll
    for (int i = 0; i < Tile::kRows / kStep; ++i) {
      const bool in_rows = first + row0 + i * kStep < length;
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        if (panel * 64 + chunk * 8 < Tile::kCols) {
          const bool valid = in_rows && panel * 64 + chunk * 8 < cols_;
          copy_async_16(shared + panel * Tile::kPanelBytes + i * kStep * 128, pointer + panel * 64, valid);
        }
      }
      pointer += kStep * x_.token;
    }
  }

 private:
  const Packed& x_;
  const T* column_;
  int cols_;
};

}  // namespace packseq
