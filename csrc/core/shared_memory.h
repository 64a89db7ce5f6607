// How much shared memory blocks of threads may have, and should.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "core/launch.h"

namespace packseq {

// The most bytes a block can have on the current device; PACKSEQ_SMALL_TILES=1 says 99 KiB, as some chips have, so that
// what those get can be tested on any.
inline size_t most_shared_memory(const char* what) {
  const char* small = std::getenv("PACKSEQ_SMALL_TILES");
  if (small && std::string_view(small) == "1") return 99 * 1024;
  int device, bytes;
  check_cuda(cudaGetDevice(&device), what);
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  return size_t(bytes);
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
  const int64_t too_much_for_one_more = (shared / (share + 1) - kReserved / 2) / 128 * 128;
  return share < 1 ? needed : size_t(std::max(int64_t(needed), too_much_for_one_more));
}

}  // namespace packseq
