// What the CPU kernels of the long convolution look like from outside, whatever the instruction set.
#pragma once
#include "core/cpu/isa.h"
#include "longconv/longconv.h"

namespace packseq {

// A transform of `points` complex values in passes: see fft_cpu.h.
struct FftPlan {
  static constexpr int kMostLevels = 32, kLastRadix = 4;
  int64_t points;
  int levels;                        // 2 or more
  int radix[kMostLevels];            // 2, 3, 4 or 5, the last one kLastRadix; their product is `points`
  const void* factors[kMostLevels];  // real, complex [radix[0] * ... * radix[level - 1], radix[level] - 1]
};

// What sequences of nearly the same length have in common: their transform, and how much of the filters goes into it.
// Neither depends on which sequences there are. Without points sums are taken one after another.
struct LongConvSize {
  FftPlan plan;
  int64_t taps, taps_after;
};

struct LongConvSequence {
  Span rows;  // one or more
  const LongConvSize* size;
};

// Some channels, no more than a tile's, of some sequences.
struct LongConvPiece {
  const LongConvSequence *first, *last;
  Span channels;
};

constexpr int64_t kTileBytes = 64;  // of a row, as it is computed: a whole number of every vector
PACKSEQ_HOST_DEVICE constexpr int64_t long_conv_tile(Dtype dtype) { return kTileBytes / (dtype == Dtype::f64 ? 8 : 4); }

// A piece's part of the gradients that sequences share: [taps + taps_after + 1, tile] with those of k, k_after and D.
struct LongConvSums {
  double* rows;
  int64_t taps, taps_after;
  PACKSEQ_HOST_DEVICE int64_t count() const { return taps + taps_after + 1; }
};

struct LongConvKernels {
  // points: of the largest transform
  size_t (*forward_scratch)(const LongConvProblem&, int64_t points);
  void (*forward)(const LongConvForward&, const LongConvPiece&, void* scratch);
  size_t (*backward_scratch)(const LongConvProblem&, int64_t points);
  void (*backward)(const LongConvBackward&, const LongConvPiece&, const LongConvSums&, void* scratch);
};

namespace baseline {
LongConvKernels long_conv_kernels(Dtype);
}
namespace avx2 {
LongConvKernels long_conv_kernels(Dtype);
}
namespace avx512 {
LongConvKernels long_conv_kernels(Dtype);
}

}  // namespace packseq
