// What the GPU benchmarks add to NVBench's own columns: TFLOP/s and percentages of two peaks.
#pragma once
#include <nvbench/nvbench.cuh>
#include <string>

#include "core/launch.h"

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

inline void add_column(nvbench::state& state, const std::string& name, double value, const char* hint = nullptr) {
  nvbench::summary& column = state.add_summary("packseq/" + name);
  column.set_string("name", name);
  if (hint) column.set_string("hint", hint);
  column.set_float64("value", value);
}

inline double gpu_seconds(nvbench::state& state) {
  return state.get_summary("nv/cold/time/gpu/mean").get_float64("value");
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
