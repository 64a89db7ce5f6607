// What the CPU kernels of the scan look like from outside, whatever the instruction set.
#pragma once
#include "core/cpu/isa.h"
#include "scan/scan.h"

namespace packseq {

// A kernel works on a block of channels, one vector lane each: a group's channels cut into blocks of kScanBlock, the
// last of which may have fewer.
constexpr int kScanBlock = 64;

struct ScanBlock {
  int first, channels, group;
};

PACKSEQ_HOST_DEVICE int blocks_per_group(const ScanProblem& p) {
  return (p.channels / p.groups + kScanBlock - 1) / kScanBlock;
}

PACKSEQ_HOST_DEVICE ScanBlock block_of(const ScanProblem& p, int64_t block) {
  const int group = int(block / blocks_per_group(p)), in_group = int(block % blocks_per_group(p)) * kScanBlock;
  const int rest = p.channels / p.groups - in_group;
  return {group * (p.channels / p.groups) + in_group, rest < kScanBlock ? rest : kScanBlock, group};
}

// Real numbers of one channel's state.
PACKSEQ_HOST_DEVICE int64_t state_width(const ScanProblem& p) { return int64_t(p.states) * (p.complex ? 2 : 1); }

// A sequence with where its states, [channels, states], come from and go to. nullptr: zeros, nowhere.
struct ScanSequence {
  Span rows;
  const void* initial;
  void* final;
};

// The same for the backward: the gradient comes from the final states and goes to the initial ones.
struct ScanSequenceBackward {
  Span rows;
  const void *initial, *dfinal;
  void* dinitial;
};

// Parameters' gradients of one block, summed over a run of sequences: rows of kScanBlock lanes, for each number of a
// state dA, then dB and dC where these are constant; at last dD and ddelta_bias.
struct ScanSums {
  double* rows;

  PACKSEQ_HOST_DEVICE static int64_t dB(const ScanProblem& p) { return state_width(p); }
  PACKSEQ_HOST_DEVICE static int64_t dC(const ScanProblem& p) { return dB(p) + (p.B.constants ? state_width(p) : 0); }
  PACKSEQ_HOST_DEVICE static int64_t dD(const ScanProblem& p) { return dC(p) + (p.C.constants ? state_width(p) : 0); }
  PACKSEQ_HOST_DEVICE static int64_t ddelta_bias(const ScanProblem& p) { return dD(p) + 1; }
  PACKSEQ_HOST_DEVICE static int64_t count(const ScanProblem& p) { return dD(p) + 2; }
};

// Gradients of B and C of every token, summed over a slice of a group's channels: [total, states], in the type that is
// computed in. nullptr where constant.
struct ScanSlice {
  void *dB, *dC;
  bool first;  // the block is the slice's first: sums start here
};

struct ScanKernels {
  size_t (*parameter_bytes)(const ScanProblem&);
  void (*prepare)(const ScanProblem&, void* parameters);  // A and what else is the same for all tokens

  size_t (*forward_scratch)(const ScanProblem&);
  void (*forward)(const ScanProblem&, void* out, const ScanSequence&, int64_t block, void* parameters, void* scratch);

  size_t (*backward_scratch)(const ScanProblem&, int64_t longest);
  void (*backward)(const ScanBackward&, const ScanSequenceBackward&, int64_t block, ScanSums, const ScanSlice&,
                   void* parameters, void* scratch);

  // Rows begin .. end of dB and dC from the slices of each group.
  void (*merge)(const ScanBackward&, const ScanSlice* slices, int slices_per_group, int64_t begin, int64_t end);
};

namespace baseline {
ScanKernels scan_kernels(const ScanProblem&);
}
namespace avx2 {
ScanKernels scan_kernels(const ScanProblem&);
}
namespace avx512 {
ScanKernels scan_kernels(const ScanProblem&);
}

}  // namespace packseq
