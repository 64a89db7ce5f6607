// What the CPU kernels of the causal convolution look like from outside, whatever the instruction set.
#pragma once
#include "core/cpu/isa.h"
#include "scan/conv1d.h"

namespace packseq {

// Channels of rows, or of sequences. A tile of rows has no more than these; both are multiples of every vector.
constexpr int64_t kConvTileRows = 64, kConvTileChannels = 64;
struct ConvTile {
  Span items, channels;
};

struct Conv1dKernels {
  void (*forward)(const Conv1dForward&, const ConvTile& rows);
  void (*final_states)(const Conv1dForward&, const ConvTile& sequences);
  // sums: [width + 1, channels], to which the tile's part of dweight (tap by tap) and dbias is added
  void (*backward)(const Conv1dBackward&, const ConvTile& rows, double* sums);
  void (*initial_states)(const Conv1dBackward&, const ConvTile& sequences);
  void (*step)(const Conv1dStep&, const ConvTile& sequences);
};

namespace baseline {
Conv1dKernels conv1d_kernels(Dtype);
}
namespace avx2 {
Conv1dKernels conv1d_kernels(Dtype);
}
namespace avx512 {
Conv1dKernels conv1d_kernels(Dtype);
}

}  // namespace packseq
