// Where an operator runs: Cpu or Cuda. Either is handed to the core's entry point as its executor or stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "core/build_info.h"
#include "core/executor.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
// Weak: with a CPU-only torch the symbol is absent, and the library still loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace packseq {

// torch's own thread pool.
struct Cpu {
  explicit Cpu(const torch::stable::Tensor&) {}

  operator Executor() const {
    return {[](int64_t count, int64_t grain, Executor::Body body, void* context) {
              torch::stable::parallel_for(0, count, grain,
                                          [&](int64_t begin, int64_t end) { body(context, begin, end); });
            },
            int(torch::stable::get_num_threads())};
  }
};

#if PACKSEQ_HAS_CUDA
// The current stream of the tensor's device, which is made the current device for the operator's duration.
struct Cuda {
  explicit Cuda(const torch::stable::Tensor& t) : guard(t.get_device_index()) {
    check_device(t.get_device_index());
    void* s = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s));
    stream = static_cast<cudaStream_t>(s);
  }

  operator cudaStream_t() const { return stream; }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

// entry(call, stream), with a workspace of so many bytes beside `like`; the allocator aligns it to 256 bytes and more.
template <class Call>
void run_in_workspace(Call call, size_t bytes, const torch::stable::Tensor& like, const Cuda& on,
                      void (*entry)(const Call&, cudaStream_t)) {
  const auto space = torch::stable::new_empty(like, {int64_t(bytes)}, torch::headeronly::ScalarType::Byte);
  call.workspace = space.mutable_data_ptr();
  entry(call, on.stream);
}
#else
// Built without CUDA the operators are registered for CUDA all the same: to say in one sentence what is missing.
struct Cuda : Cpu {
  explicit Cuda(const torch::stable::Tensor& t) : Cpu(t) { check_device(t.get_device_index()); }
};
#endif

}  // namespace packseq
