// Arrays on the GPU between guard bands, for tests that compare a kernel with a computation on the host.
#pragma once
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/launch.h"

namespace packseq::testing {

// Tests of kernels skip where there is no GPU to run them.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};

template <class T>
class DeviceArray {
 public:
  // All bits set, which is NaN in every floating type and -1 in every integer.
  explicit DeviceArray(int64_t count) : count_(count) {
    check_cuda(cudaMalloc(&memory_, bytes() + 2 * kBand), "cudaMalloc");
    check_cuda(cudaMemset(memory_, kGuard, bytes() + 2 * kBand), "cudaMemset");
    check_cuda(cudaMemset(data(), 0xff, bytes()), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(int64_t(values.size())) { *this = values; }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(memory_); }

  DeviceArray& operator=(const std::vector<T>& values) {
    check_cuda(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return *this;
  }

  T* data() const { return reinterpret_cast<T*>(memory_ + kBand); }

  // Waits for the GPU. A write outside the array is a failure of the test.
  std::vector<T> values() const {
    std::vector<char> all(bytes() + 2 * kBand);
    check_cuda(cudaDeviceSynchronize(), "the kernel");
    check_cuda(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (size_t i = 0; i < kBand; ++i) {
      if (all[i] != kGuard || all[kBand + bytes() + i] != kGuard) {
        ADD_FAILURE() << "written outside the array, " << (all[i] != kGuard ? "before" : "after") << " it";
        break;
      }
    }
    const T* first = reinterpret_cast<const T*>(all.data() + kBand);
    return {first, first + count_};
  }

 private:
  static constexpr size_t kBand = 4096;
  static constexpr char kGuard = 0x5a;
  size_t bytes() const { return size_t(count_) * sizeof(T); }

  int64_t count_;
  char* memory_ = nullptr;
};

// Copies of vectors on the GPU, for as long as it lives.
class DeviceCopies {
 public:
  template <class T>
  const T* operator()(const std::vector<T>& values) {
    const auto copy = std::make_shared<DeviceArray<T>>(values);
    copies_.push_back(copy);
    return copy->data();
  }

 private:
  std::vector<std::shared_ptr<void>> copies_;
};

}  // namespace packseq::testing
