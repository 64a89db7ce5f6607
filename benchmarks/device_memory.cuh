// Device memory for as long as a benchmark's case runs, and a clock for what is measured beside NVBench.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "core/launch.h"

namespace packseq::bench {

class DeviceMemory {
 public:
  // Uninitialised; one element at least.
  template <class X>
  X* take(int64_t count) {
    void* p = nullptr;
    check_cuda(cudaMalloc(&p, size_t(std::max<int64_t>(count, 1)) * sizeof(X)), "benchmark memory");
    held_.emplace_back(p);
    return static_cast<X*>(p);
  }

  template <class X>
  X* copy(const std::vector<X>& host) {
    X* device = take<X>(int64_t(host.size()));
    check_cuda(cudaMemcpy(device, host.data(), host.size() * sizeof(X), cudaMemcpyHostToDevice), "benchmark memory");
    return device;
  }

 private:
  struct Free {
    void operator()(void* p) const { cudaFree(p); }
  };
  std::vector<std::unique_ptr<void, Free>> held_;
};

// Every value of every type the same and small: for kernels whose time does not depend on what the values are.
inline char* constant(DeviceMemory& memory, int64_t bytes) {
  char* const data = memory.take<char>(bytes);
  check_cuda(cudaMemset(data, 0x3c, size_t(bytes)), "benchmark memory");
  return data;
}

// Median seconds of what f() puts on the stream.
template <class F>
double median_seconds(cudaStream_t stream, const F& f) {
  constexpr int kRuns = 9;
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  std::vector<float> times(kRuns);
  for (float& milliseconds : times) {
    check_cuda(cudaEventRecord(begin, stream), "event");
    f();
    check_cuda(cudaEventRecord(end, stream), "event");
    check_cuda(cudaEventSynchronize(end), "event");
    check_cuda(cudaEventElapsedTime(&milliseconds, begin, end), "event");
  }
  check_cuda(cudaEventDestroy(begin), "event");
  check_cuda(cudaEventDestroy(end), "event");
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2] * 1e-3;
}

// Bytes read plus written a second by a copy of half a gigabyte from device to device.
inline double measure_copy_peak(cudaStream_t stream) {
  constexpr int64_t kBytes = int64_t{512} << 20;
  DeviceMemory memory;
  char *from = memory.take<char>(kBytes), *to = memory.take<char>(kBytes);
  const double seconds = median_seconds(
      stream, [&] { check_cuda(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, stream), "device copy"); });
  return 2.0 * kBytes / seconds;
}

}  // namespace packseq::bench
