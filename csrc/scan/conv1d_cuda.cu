// The causal convolution on the GPU, host side.
//
// All of it is bound by memory. With E elements of B bytes, the forward moves at the least 2 E B bytes, the backward
// 3 E B; what a run of rows reads again at its ends, and the sums for the taps, add a few percent, mostly out of the
// second-level cache.
#include "core/device/element_type.cuh"
#include "scan/conv1d_grid.h"
#include "scan/conv1d_launch.h"

namespace packseq {
// Whatever vectors of channels the addresses allow: the most tiles of rows that any gives.
size_t conv1d_backward_workspace(const Conv1dProblem& p) {
  int64_t tiles = 0;
  for (const int vec : {1, 2, 4}) tiles = std::max(tiles, backward_grid(p.total, p.channels / vec).row_tiles());
  return size_t(tiles * (p.width + 1) * p.channels) * sizeof(float);
}

void conv1d_forward(const Conv1dForward& f, cudaStream_t stream) {
  with_element_type(f.problem.dtype, [&]<class T>(std::type_identity<T>) { conv1d::forward<T>(f, stream); });
}

void conv1d_backward(const Conv1dBackward& b, cudaStream_t stream) {
  with_element_type(b.problem.dtype, [&]<class T>(std::type_identity<T>) { conv1d::backward<T>(b, stream); });
}

void conv1d_step(const Conv1dStep& s, cudaStream_t stream) {
  with_element_type(s.problem.dtype, [&]<class T>(std::type_identity<T>) { conv1d::step<T>(s, stream); });
}

}  // namespace packseq
