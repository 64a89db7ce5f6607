// The tile scheduler every packed kernel uses: from cu_seqlens alone, on the device, without a host copy.
//
// A packed tensor is cut into tiles of `rows` rows that never cross a sequence's end. How many there are depends on
// the lengths, which the host does not know; how many there can be does not: at most total / rows + one a sequence.
// One small kernel writes the list, most work first; the main kernel starts a block for every
// place the list could have, and a block whose place holds no tile leaves at once. The slack after the last sequence
// is listed like a sequence (number `sequences`), last, so that whoever owns a tile can zero it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/packed.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {

struct Tile {
  int32_t sequence;  // -1: none; `sequences`: slack
  int32_t block;     // covers rows block * rows ... of the sequence
};

// Sequences with the most work come first, in either order.
enum class TileOrder : int32_t {
  together,        // a sequence's tiles stand together: they read the same keys
  spread,          // apart, where other sequences have like work: they wait for each other
  spread_falling,  // the same where later tiles have less work, down to none: under a causal mask
};

struct TileScheduleParams {
  const int32_t* cu_seqlens;  // [sequences + 1]; tiles are cut from these
  const int32_t* cu_work;     // [sequences + 1]; a tile's work is its sequence's length here
  int64_t sequences;
  int64_t total, total_work;  // rows of the tensors that cu_seqlens and cu_work index
  int32_t rows;               // of a tile
  TileOrder order;
  Tile* tiles;  // [tile_capacity(total, sequences, rows)], all written
};

// Upper bound of the number of tiles: each sequence that has rows, and the slack, adds one part tile at most.
PACKSEQ_HOST_DEVICE int64_t tile_capacity(int64_t total, int64_t sequences, int64_t rows) {
  const int64_t parts = sequences + 1 < total ? sequences + 1 : total;
  return total / rows + parts;
}

#if PACKSEQ_HAS_CUDA
// A tile stands behind all earlier tiles of its sequence. Malformed contents can fill the list early.
void build_tile_schedule(const TileScheduleParams&, cudaStream_t);
#endif

}  // namespace packseq
