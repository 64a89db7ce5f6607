// A tile of a packed tensor into shared memory: rows outside the sequence become zeros and are not read.
#pragma once
#include <cstdint>

#include "core/device/async_copy.cuh"
#include "core/device/shared_tile.cuh"

namespace packseq {

// One thread's share of the copies of tiles of one tensor and head. Eight neighbouring threads copy 128 bytes of a row.
template <class T, class Tile, int kThreads>
class TileLoader {
 public:
  // `rows` points at row 0 of the sequence; `length` rows of `cols` elements may be read.
  __device__ TileLoader(const T* rows, int64_t stride, int32_t length, int cols)
      : pointer_(rows + (threadIdx.x % 8) * 8), stride_(stride), length_(length), cols_(cols) {}

  // Starts copying rows first ... first + Tile::kRows.
  __device__ void load(uint32_t tile, int32_t first) const {
    constexpr int kStep = kThreads / 8;
    static_assert(Tile::kRows % kStep == 0);
    const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const T* pointer = pointer_ + int64_t(first + row0) * stride_;
    uint32_t shared = tile + Tile::offset(row0, chunk);  // kStep is a multiple of 8: the swizzle stays the same
    static_assert(kStep % 8 == 0);
#pragma unroll
    for (int i = 0; i < Tile::kRows / kStep; ++i) {
      const bool in_rows = first + row0 + i * kStep < length_;
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        if (panel * 64 + chunk * 8 < Tile::kCols) {
          const bool valid = in_rows && panel * 64 + chunk * 8 < cols_;
          copy_async_16(shared + panel * Tile::kPanelBytes + i * kStep * 128, pointer + panel * 64, valid);
        }
      }
      pointer += kStep * stride_;
    }
  }

 private:
  const T* pointer_;
  int64_t stride_;
  int32_t length_;
  int cols_;
};

}  // namespace packseq
