// CUDA's error codes as exceptions.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace packseq {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next call would find this one's error
    throw std::runtime_error(std::string("packseq: ") + what + ": " + cudaGetErrorString(error));
  }
}

}  // namespace packseq
