// The scan's kernels as the host sees them: which mappings there are, and how work is cut into blocks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/device/complex.cuh"
#include "core/schedule.h"
#include "scan/scan.h"

namespace packseq {

// A tensor's element type known at run time only: for the kernels that are not worth one for each type.
struct AnyType {};

inline constexpr int kScanWarps = 4, kScanThreads = 32 * kScanWarps;

// A thread owns kC channels times kS states; kL lanes hold all states of their channels, and a warp has 32 / kL such.
// kChunk: tokens whose states the backward keeps in registers.
template <class T_, class X_, int kC_, int kS_, int kL_, int kChunk_>
struct MappingOf {
  using T = T_;  // of the tensors
  using X = X_;  // of the states
  static constexpr int kC = kC_, kS = kS_, kL = kL_, kChunk = kChunk_;
  static constexpr int kN = kS * kL;                           // states there is room for
  static constexpr int kWarps = kScanWarps;                    // of a block, side by side over channels
  static constexpr int kChannels = kWarps * (32 / kL_) * kC_;  // of a block
};

// Up to 16 real states, B and C of every token, rows that can be read two channels at a time.
template <class T>
using PairMapping = MappingOf<T, float, 2, 4, 4, 8>;
// For the forward over long sequences of those: so few states a thread that a group of tokens' fit in registers, and
// the same channels for all of a block's warps.
template <class T>
struct RelayMapping : MappingOf<T, float, 2, 2, 8, 8> {
  static constexpr int kWarps = 1, kChannels = 8;
};
// Everything else: more states, complex ones, constant B or C, rows of odd width.
using SmallMapping = MappingOf<AnyType, float, 1, 4, 4, 8>;
using LargeMapping = MappingOf<AnyType, float, 1, 8, 32, 4>;
using SmallComplexMapping = MappingOf<AnyType, Complex, 1, 2, 8, 8>;
using LargeComplexMapping = MappingOf<AnyType, Complex, 1, 8, 32, 4>;

// Whether RelayMapping does the forward over long sequences, where rows and matrices are aligned.
template <class Mapping>
inline constexpr bool kHasRelay = !std::is_same_v<typename Mapping::T, AnyType>;

// Sequences are cut into segments of so many tokens, by their own length alone, that few long ones fill a GPU too.
// Where a sequence has several, each segment is first walked for what it makes of its initial state (and, backward, of
// the gradient of its final state): decay and what is added, which combine_segments_kernel carries from one to the
// next. Then segments are walked on their own. Where the forward relays a sequence, segments wait for each other
// instead.
inline constexpr int32_t kSegmentRows = 4096;

// The forward relays sequences of more tokens, where it can.
inline constexpr int32_t kRelayRows = kSegmentRows;
static_assert(kRelayRows == kSegmentRows, "a sequence has several segments where it is relayed, and only there");

// The list of segments, of the longest sequences first, and how many blocks share it: places s, s + slots, ... are slot
// s's.
struct ScanGrid {
  const Tile* tiles;
  int32_t places, slots;
  int32_t split_places;    // the segments of sequences that have several are among the first so many places
  int32_t relay_places;    // and those of sequences that are relayed, if any are
  int32_t channel_blocks;  // in all groups
  bool aligned_rows;       // rows of u, delta, z and dout can be read 16 bytes at a time
  bool aligned_matrices;   // rows of B and C have all states of the mapping and can be read 16 bytes at a time

  PACKSEQ_HOST_DEVICE int64_t blocks() const { return int64_t(slots) * channel_blocks; }

  // The segment at a place; a negative sequence where there is none.
  PACKSEQ_HOST_DEVICE Tile segment(const ScanProblem& p, int32_t place) const {
    const Tile tile = tiles[place];
    return tile.sequence < p.sequences ? tile : Tile{-1, -1};
  }
};

// How segments of sequences that have several are tied, [segment_slots(total), channels, states] each and
// [segment_slots(total), channels]. A segment's slot is segment_slot(); nullptr where no sequence can be so long.
struct SegmentTies {
  void *states, *gradients;               // what a segment adds, and then what it starts from
  float *decay_steps, *decay_steps_back;  // the sum of its d
  int* passed;  // [segment_slots(total), blocks of channels]: whether a relay's `states` are there
};

PACKSEQ_HOST_DEVICE int64_t segment_slots(int64_t total) { return 2 * (total / kSegmentRows + 1); }
// Whole segments begin at least kSegmentRows apart, and so do last ones of sequences that have several.
PACKSEQ_HOST_DEVICE int64_t segment_slot(int64_t begin, int32_t segment, bool last) {
  return 2 * ((begin + int64_t(segment) * kSegmentRows) / kSegmentRows) + last;
}

// What the backward keeps in the workspace.
struct BackwardScratch {
  // States every kChunk tokens: sequence i's begin at number cu_seqlens[i] / kChunk + i.
  void* checkpoints;         // [total / kChunk + sequences, checkpoint_width]
  int64_t checkpoint_width;  // states of all channels, with those that fill up blocks
  // Shares of the gradients, which are added up in the order of their index.
  int32_t width;            // kN: states there is room for
  void* matrices;           // of B and C of every token: [blocks of channels of a group, total, groups, 2, kN]
  float *dA, *dB, *dC;      // [shares, channels, states], the latter two where B or C is constant
  float *dD, *ddelta_bias;  // [shares, channels]
  int64_t shares;           // slots
};

// Blocks of channels, in all groups.
template <class Mapping>
int32_t channel_blocks(const ScanProblem& p) {
  const int of_group = p.channels / p.groups;
  return (of_group + Mapping::kChannels - 1) / Mapping::kChannels * p.groups;
}

#if PACKSEQ_HAS_CUDA
template <class Mapping>
void launch_scan_forward(const ScanForward&, const ScanGrid&, const SegmentTies&, cudaStream_t);
template <class Mapping>
void launch_scan_backward(const ScanBackward&, const ScanGrid&, const SegmentTies&, const BackwardScratch&,
                          cudaStream_t);
void sum_scan_shares(const ScanBackward&, const ScanGrid&, const BackwardScratch&, cudaStream_t);
template <class Mapping>
void launch_scan_step(const ScanStep&, cudaStream_t);
#endif

}  // namespace packseq
