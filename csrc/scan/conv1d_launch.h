// What the host needs of the convolution's kernels: one element type a file, written into the build folder by CMake.
#pragma once
#include <cuda_runtime_api.h>

#include "scan/conv1d.h"

namespace packseq::conv1d {

template <class T>
void forward(const Conv1dForward&, cudaStream_t);
template <class T>
void backward(const Conv1dBackward&, cudaStream_t);
template <class T>
void step(const Conv1dStep&, cudaStream_t);

}  // namespace packseq::conv1d
