// What the GPU benchmarks share over NVBench: cases by name, timing, and columns with rates and percentages of peaks.
#pragma once
#include <algorithm>
#include <nvbench/nvbench.cuh>
#include <string>
#include <vector>

#include "core/launch.h"
#include "device_memory.cuh"

namespace packseq::bench {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "device");
  return value;
}

// Dense bfloat16 FLOP a clock and SM, by NVIDIA's whitepapers on the A100 (312 TFLOP/s from 108 SMs at 1.41 GHz) and
// the H100 (989 TFLOP/s from 132 SMs at 1.83 GHz). 0 where none is declared: later chips of 8.x differ card by card.
inline double tensor_flop_per_clock() {
  switch (device_attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
          device_attribute(cudaDevAttrComputeCapabilityMinor)) {
    case 80:
      return 2048;
    case 90:
      return 4096;
    default:
      return 0;
  }
}

// At the highest clock the device names, which it may not hold under load: on an H200 1.98 GHz, so 1,070 TFLOP/s.
inline double declared_tensor_peak() {
  return tensor_flop_per_clock() * device_attribute(cudaDevAttrMultiProcessorCount) *
         device_attribute(cudaDevAttrClockRate) * 1e3;
}

// Float32 operations a second at that clock, a fused multiply-add counted as one: an SM of the A100 has 64 lanes, those
// of later chips 128.
inline double declared_fp32_rate() {
  const bool a100 = device_attribute(cudaDevAttrComputeCapabilityMajor) == 8 &&
                    device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  return (a100 ? 64.0 : 128.0) * device_attribute(cudaDevAttrMultiProcessorCount) *
         device_attribute(cudaDevAttrClockRate) * 1e3;
}

template <class Case>
const Case& find_case(const std::vector<Case>& all, const std::string& name) {
  return *std::find_if(all.begin(), all.end(), [&](const Case& c) { return c.name == name; });
}

template <class Case>
std::vector<std::string> names_of(const std::vector<Case>& all) {
  std::vector<std::string> names;
  for (const Case& c : all) names.push_back(c.name);
  return names;
}

// Times run(stream), with a cold L2. A first run loads the kernels.
template <class F>
void measure(nvbench::state& state, const F& run) {
  const cudaStream_t stream = state.get_cuda_stream();
  run(stream);
  check_cuda(cudaStreamSynchronize(stream), "benchmark");
  state.exec(nvbench::exec_tag::no_batch, [&](nvbench::launch& call) { run(call.get_stream()); });
}

inline void add_column(nvbench::state& state, const std::string& name, double value, const char* hint = nullptr) {
  nvbench::summary& column = state.add_summary("packseq/" + name);
  column.set_string("name", name);
  if (hint) column.set_string("hint", hint);
  column.set_float64("value", value);
}

inline double gpu_seconds(nvbench::state& state) {
  return state.get_summary("nv/cold/time/gpu/mean").get_float64("value");
}

inline void add_milliseconds(nvbench::state& state) { add_column(state, "ms", gpu_seconds(state) * 1e3); }

// Of what the call must move, and the part of what a device copy reaches in this run.
inline void add_bytes(nvbench::state& state, double bytes) {
  static const double copy_peak = measure_copy_peak(state.get_cuda_stream());
  const double rate = bytes / gpu_seconds(state);
  add_column(state, "GB/s", rate * 1e-9);
  add_column(state, "of device copy", rate / copy_peak, "percentage");
}

// mma_peak: of mma.sync, measured in this run; 0 for none.
inline void add_flops(nvbench::state& state, double flops, double mma_peak) {
  const double rate = flops / gpu_seconds(state);
  add_column(state, "TFLOP/s", rate * 1e-12);
  if (mma_peak > 0) add_column(state, "of mma.sync", rate / mma_peak, "percentage");
  if (const double peak = declared_tensor_peak(); peak > 0) {
    add_column(state, "of declared peak", rate / peak, "percentage");
  }
}

}  // namespace packseq::bench
