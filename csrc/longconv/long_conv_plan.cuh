// How the long convolution's work is laid out: classes of sequences by their length, and what the workspace holds.
//
// A sequence's class depends on its own length alone. Class 0 has kDirectRows rows at most and is summed directly;
// class c in 1 ... fft_classes has up to size_of_class(c) rows and is one transform; what is longer is cut into blocks
// of the largest size. A kernel on one block of threads lists the sequences class by class, in their own order.
#pragma once
#include <algorithm>

#include "core/divide_up.h"
#include "core/workspace.h"
#include "longconv/fft_tile.cuh"
#include "longconv/longconv.h"

namespace packseq::longconv {

constexpr int kFftClasses = 6;
constexpr int kClasses = kFftClasses + 2;  // direct, transforms, blocks
constexpr int kLong = kClasses - 1;

// Backward, up to this size one kernel makes the gradients of the input and of the filter. With the largest a block of
// threads has two channels, and reads and writes rows in too small parts.
constexpr int kFusedClasses = 5;

PACKSEQ_HOST_DEVICE constexpr int size_of_class(int c) { return 64 << c; }
static_assert(size_of_class(kFftClasses) == kLargestSize && size_of_class(0) == kDirectRows);

// -1: no rows. fft_classes: of the device, as its shared memory allows.
PACKSEQ_HOST_DEVICE int class_of(int64_t rows, int fft_classes) {
  if (rows == 0) return -1;
  for (int c = 0; c <= fft_classes; ++c) {
    if (rows <= size_of_class(c)) return c;
  }
  return kLong;
}

// Where a class's spectrum begins among those of all classes, in complex numbers of a channel.
PACKSEQ_HOST_DEVICE constexpr int spectrum_begin(int c) { return size_of_class(c) - size_of_class(1); }

// A sequence in the list.
struct ListedRows {
  int32_t begin, end;
};

// A block of a sequence that is cut into blocks.
struct LongBlock {
  ListedRows rows;       // of the whole sequence
  int32_t index, count;  // which of how many of the sequence; its first stands `index` places before in the list
};

// What the listing kernel finds.
struct Plan {
  int32_t first[kClasses];       // of the class in the list of sequences
  int32_t count[kClasses];       // sequences
  int32_t chunks[kClasses];      // parts that a class is cut into for the filter's gradient
  int32_t chunk_rows[kClasses];  // sequences of a chunk
  int64_t sums[kClasses];        // where the chunks' sums begin in their part of the workspace, in numbers a channel
  int32_t long_blocks;           // in the list of blocks
  int32_t most_blocks;           // of any sequence
};

// Sums over sequences are taken over chunks of the class first: this many sequences or, of the direct class, this many
// chunks.
constexpr int kChunkSequences = 8;
constexpr int kDirectChunks = 64;
constexpr int kLagBlock = 16;                        // lags of the direct class are worked in blocks
constexpr int kLagBlocks = kDirectRows / kLagBlock;  // of either sign
constexpr int kDirectLags = 2 * kDirectRows;         // -64 ... 63
constexpr int kBlockLags = 2 * kLagBlock - 1;        // lags between two blocks of rows
constexpr int kLagGroups = 2 * kLagBlocks - 1;       // distances between two blocks

// Sizes that follow from the call's sizes alone.
struct Layout {
  int64_t total, sequences, channels, taps, taps_after;
  int fft_classes;

  Layout(const LongConvProblem& p, int fft_classes_)
      : total(p.total),
        sequences(p.sequences),
        channels(p.channels),
        taps(p.taps),
        taps_after(p.k_after ? p.taps_after : 0),
        fft_classes(fft_classes_) {}

  int64_t block() const { return size_of_class(fft_classes); }
  // Sequences of a class that is transformed there can be.
  int64_t most_sequences(int c) const { return std::min(sequences, total / (size_of_class(c) / 2 + 1)); }
  int64_t most_long() const { return std::min(sequences, total / (block() + 1)); }
  int64_t most_long_blocks() const { return most_long() == 0 ? 0 : total / block() + most_long(); }
  // Blocks of the filter, of lags 0 on and before them, as far as the longest sequence reaches.
  int64_t blocks_after() const {
    return most_long() == 0 ? 0 : std::min(divide_up(taps, block()), divide_up(total, block()));
  }
  int64_t blocks_before() const {
    return most_long() == 0 ? 0 : std::min(divide_up(taps_after, block()), divide_up(total, block()));
  }
  int64_t filter_blocks() const { return blocks_after() + blocks_before(); }
  // Complex numbers of a channel that the spectra of all classes take.
  int64_t spectra() const { return spectrum_begin(fft_classes + 1); }
  // Complex numbers of a channel that the sums of all chunks take.
  int64_t chunk_sums() const {
    int64_t all = 0, rows = 0;
    for (int c = 1; c <= fft_classes; ++c) all += size_of_class(c), rows = std::max(rows, most_sequences(c));
    return all + std::min(2 * total / kChunkSequences, divide_up(rows, kChunkSequences) * all);
  }
};

// What every kernel gets.
struct Shape {
  const int32_t* cu_seqlens;
  int64_t total, sequences, channels;
  int32_t fft_classes;
  const Plan* plan;
  const ListedRows* list;   // [sequences], class by class
  const LongBlock* blocks;  // [most_long_blocks]
  const float2* table;      // [kTableSize]

  // Tiles of so many channels; with the sequences they number fewer than 2^32 things.
  PACKSEQ_HOST_DEVICE uint32_t tiles(uint32_t of) const { return (uint32_t(channels) + of - 1) / of; }
};

// Element (pair i, line, channel) of the spectra of one size: v[i] and v[31 - i] of the thread's registers.
PACKSEQ_HOST_DEVICE int64_t spectrum_at(int lines, int64_t channels, int i, int j, int64_t channel) {
  return (int64_t(i) * lines + j) * channels + channel;
}

}  // namespace packseq::longconv
