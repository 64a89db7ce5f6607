// Tiles of half-precision elements in shared memory, laid out so that ldmatrix never meets a bank conflict.
//
// Columns lie in panels of 64 (128 bytes a row, so a row crosses every bank once); within a panel the 16-byte chunk c
// of row r lies at chunk c ^ (r % 8): eight rows of one column of chunks fall into eight different bank groups.
#pragma once
#include <cstdint>

namespace packseq {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

template <int kRows_, int kCols_>
struct SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPanels = (kCols + 63) / 64;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kCols % 16 == 0);

  // Byte offset of 16-byte chunk `chunk` (eight elements) of a row.
  __device__ static uint32_t offset(int row, int chunk) {
    return (chunk / 8) * kPanelBytes + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  }
};

// The same value, but the compiler cannot tell: what is computed from it inside a loop stays there, and does not fill
// registers that are needed all through the loop.
__device__ __forceinline__ int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A thread's part of a 16 x 16 fragment's address. The four 8 x 8 matrices of an ldmatrix.x4 are either numbered down
// the rows first (an A operand as it lies, or a B operand that lies [k][n] and is transposed on the way), or along
// the columns first (a B operand that lies [n][k], or an A operand that lies [k][m] and is transposed).
__device__ __forceinline__ uint32_t rows_first(int lane) {
  const int row = lane & 15, half = lane >> 4;
  return row * 128 + ((half ^ (lane & 7)) << 4);
}
__device__ __forceinline__ uint32_t columns_first(int lane) {
  const int row = (lane & 7) + ((lane >> 4) << 3), half = (lane >> 3) & 1;
  return row * 128 + ((half ^ (lane & 7)) << 4);
}

// Address of the fragment whose first row is `row` (a multiple of 8) and whose first column is 16 * k.
template <class Tile>
__device__ __forceinline__ uint32_t fragment(uint32_t tile, uint32_t lane_part, int row, int k) {
  return tile + (k / 4) * Tile::kPanelBytes + row * 128 + (lane_part ^ ((k & 3) << 5));
}

}  // namespace packseq
