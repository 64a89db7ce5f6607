// How the convolution's grids are laid over [total, channels].
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/divide_up.h"

namespace packseq {

// A block has `lines` runs of `rows` rows, each in `columns` vectors of channels.
struct ConvGrid {
  int columns, column_tiles, lines, rows;
  int64_t blocks;

  int64_t row_tiles() const { return column_tiles ? blocks / column_tiles : 0; }
};

constexpr int kConvThreads = 128;
constexpr int64_t kConvFill = 1 << 17;  // threads that fill a large GPU about twice

// all_columns: vectors of channels in a row. Runs have `rows` rows, or fewer where that would leave a GPU idle.
inline ConvGrid conv_grid(int64_t total, int all_columns, int most_columns, int rows) {
  ConvGrid grid{};
  if (total == 0 || all_columns == 0) return grid;
  while (rows > 8 && divide_up(total, rows) * all_columns < kConvFill) rows /= 2;
  grid.column_tiles = int(divide_up(all_columns, most_columns));
  grid.columns = int(divide_up(all_columns, grid.column_tiles));
  grid.lines = kConvThreads / grid.columns;
  grid.rows = rows;
  grid.blocks = divide_up(total, int64_t(rows) * grid.lines) * grid.column_tiles;
  return grid;
}

inline ConvGrid forward_grid(int64_t total, int all_columns) { return conv_grid(total, all_columns, 128, 32); }
inline ConvGrid backward_grid(int64_t total, int all_columns) { return conv_grid(total, all_columns, 32, 64); }

}  // namespace packseq
