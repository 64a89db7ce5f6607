// Launching kernels from the host: errors become exceptions, shared memory beyond 48 KiB is asked for.
#pragma once
#include <cuda_runtime.h>

#include <limits>

#include "core/check.h"
#include "core/check_cuda.h"

namespace packseq {

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

// The same for a kernel whose blocks wait for each other: all of them run at once, or it is an error.
template <class Params>
void launch_together(const char* what, void (*kernel)(Params), int64_t blocks, int threads, size_t shared,
                     cudaStream_t stream, const std::type_identity_t<Params>& params) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), what);
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(
      cudaLaunchCooperativeKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments, shared, stream),
      what);
}

}  // namespace packseq
