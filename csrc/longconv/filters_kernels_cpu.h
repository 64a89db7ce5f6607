// What the CPU kernels of the filters look like from outside, whatever the instruction set.
//
// Work is cut into parts of rows: nodes or steps begin .. end of row `row`, whole segments but for a row's last. Sums
// over all of a row are left in double for every part, `doubles` of them, to be added up in the parts' order. Scratch
// is 64-byte aligned.
#pragma once
#include "core/cpu/isa.h"
#include "core/divide_up.h"
#include "longconv/filters.h"
#include "longconv/s4_step.h"

namespace packseq {

struct FilterPart {
  int64_t row;
  Span span;
};

constexpr int64_t kNodeSegment = 1 << 14;

// ---- Cauchy: a part's sums are pairs, for each row [poles] of dw, then [groups, poles] of dv.

struct CauchyPartSums {
  PACKSEQ_HOST_DEVICE static int64_t doubles(const CauchyProblem& p) { return 2 * (p.groups + 1) * int64_t(p.poles); }
};

// ---- Vandermonde: steps go in tiles, chunks of tiles, segments of chunks.

constexpr int64_t kTileSteps = 128, kChunkTiles = 24, kChunkSteps = kTileSteps * kChunkTiles;
constexpr int64_t kStepSegment = 16 * kChunkSteps;

// out[g, h, l] = factor * sum over n of v[g, h, n] exp(x[h, n] l), or its real part where the problem says `conjugate`.
// `conjugated`: v is taken conjugate, and so is the result.
struct VandermondeSeries {
  const VandermondeProblem* problem;
  const void* v;
  void* out;
  double factor;
  bool conjugated;
};

// The sums over l of u[g, h, l] exp(x[h, n] l), and with l times u where `second` is set: pairs, [1 or 2, groups,
// poles] for each part. `conjugated`: u is taken conjugate.
struct VandermondeMoments {
  const VandermondeProblem* problem;
  const void* u;
  bool second, conjugated;

  PACKSEQ_HOST_DEVICE int64_t doubles() const { return (second ? 4 : 2) * problem->groups * int64_t(problem->poles); }
};

// ---- S4: filters go a few at a time, with the columns of P they share. Rows of sums are B and the columns of P;
// columns of sums are C and the conjugate columns of P.

constexpr int kFilterRun = 4;

struct S4Sums {
  PACKSEQ_HOST_DEVICE static int columns(const S4Problem& p, int64_t filters) { return int(filters) + p.rank; }
  PACKSEQ_HOST_DEVICE static int count(const S4Problem& p, int64_t filters) {
    return (1 + p.rank) * columns(p, filters);
  }
  PACKSEQ_HOST_DEVICE static int64_t run(const S4Problem& p, int64_t first) {
    return p.filters - first < kFilterRun ? p.filters - first : kFilterRun;
  }
  // A part's sums: pairs of the poles' gradients, then for every run of filters [poles, rows, columns] pairs, at last
  // one number for dt.
  PACKSEQ_HOST_DEVICE static int64_t doubles(const S4Problem& p) {
    const int64_t runs = divide_up(p.filters, kFilterRun);
    return 2 * p.poles * (1 + (1 + p.rank) * (p.filters + runs * p.rank)) + 1;
  }
};

// ---- The step, of one sequence in a block of channels.

constexpr int kStepChannels = 16;

struct FilterKernels {
  size_t (*cauchy_scratch)(const CauchyProblem&);
  void (*cauchy)(const CauchyForward&, const FilterPart&, void* scratch);
  void (*cauchy_backward)(const CauchyBackward&, const FilterPart&, double* sums, double* dz, void* scratch);

  size_t (*vandermonde_scratch)(const VandermondeProblem&);
  void (*series)(const VandermondeSeries&, const FilterPart&, void* scratch);
  void (*moments)(const VandermondeMoments&, const FilterPart&, double* sums, void* scratch);

  // circle: cos and sin of pi j / length for every node j
  size_t (*s4_scratch)(const S4Problem&);
  void (*s4_spectrum)(const S4Spectrum&, const FilterPart&, const double* circle, void* scratch);
  void (*s4_backward)(const S4SpectrumBackward&, const FilterPart&, const double* circle, double* sums, void* scratch);
};

struct StepKernels {
  // What all tokens share, [channels] pieces of this size.
  size_t (*parameter_bytes)(const S4Step&);
  void (*prepare)(const S4Step&, int64_t channel, void* parameters);
  size_t (*scratch)(const S4Step&);
  // states: the sequence's, [channels, poles]; `parameters` is that of channel 0
  void (*step)(const S4Step&, const Span& rows, void* states, int64_t channel, const void* parameters, void* scratch);
};

namespace baseline {
FilterKernels filter_kernels(Dtype real);
StepKernels step_kernels(Dtype);
}  // namespace baseline
namespace avx2 {
FilterKernels filter_kernels(Dtype real);
StepKernels step_kernels(Dtype);
}  // namespace avx2
namespace avx512 {
FilterKernels filter_kernels(Dtype real);
StepKernels step_kernels(Dtype);
}  // namespace avx512

}  // namespace packseq
