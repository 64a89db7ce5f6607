// Launching kernels from the host: errors become exceptions, shared memory beyond 48 KiB is asked for.
#pragma once
#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "core/check.h"

namespace packseq {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("packseq: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Launches kernel(params) with `shared` bytes of dynamic shared memory. The grid is one-dimensional:
// only its x axis reaches 2^31 - 1 blocks. An empty grid launches nothing.
template <class Params>
void launch(const char* what, void (*kernel)(Params), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
            const std::type_identity_t<Params>& params) {
  if (blocks == 0) return;
  check(blocks <= std::numeric_limits<int32_t>::max(), what, ": needs ", blocks, " blocks, and a grid has 2^31 - 1");
  if (shared > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), what);
  }
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, stream>>>(params);
  check_cuda(cudaGetLastError(), what);
}

// Shared memory for a kernel of which about `blocks` blocks have work, at least `needed`: so much that none of the
// multiprocessors takes more than its even share. Left alone the GPU gives some of them half as many again where the
// blocks do not fill it, and they finish last.
inline size_t shared_for_even_load(const char* what, size_t needed, int64_t blocks) {
  int device, processors, shared;
  check_cuda(cudaGetDevice(&device), what);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), what);
  const int64_t share = (blocks + processors - 1) / processors;
  constexpr int64_t kReserved = 1024;  // bytes that the driver takes for every block
  const size_t too_much_for_one_more = size_t(shared / (share + 1) - kReserved / 2) / 128 * 128;
  return share < 1 || too_much_for_one_more < needed ? needed : too_much_for_one_more;
}

}  // namespace packseq
