// Packing and unpacking on the GPU through the C++ API: GB/s, and the part of what a device copy reaches.
#include "device_memory.cuh"
#include "gpu_report.cuh"
#include "packing/packing.h"
#include "packing_cases.h"

namespace packseq::bench {
namespace {

const std::vector<PackingCase>& cases() {
  static const std::vector<PackingCase> all = packing_cases();
  return all;
}

std::vector<char> mask_of(const PackingCase& c) {
  std::vector<char> mask(size_t(c.rows()), 0);
  const std::vector<int64_t> lengths = c.lengths();
  for (int64_t b = 0; b < c.batch; ++b) std::fill_n(mask.begin() + b * c.length, lengths[size_t(b)], char(1));
  return mask;
}

TokenRows token_rows(const PackingCase& c, bool by_mask, DeviceMemory& memory) {
  if (by_mask) return {.mask = memory.copy(mask_of(c)), .lengths = nullptr, .mask_bytes = 1, .length_bytes = 0};
  return {.mask = nullptr, .lengths = memory.copy(c.lengths()), .mask_bytes = 0, .length_bytes = 8};
}

Pack prepare(const PackingCase& c, bool by_mask, DeviceMemory& memory) {
  char* padded = memory.take<char>(c.rows() * c.row_bytes);
  check_cuda(cudaMemset(padded, 1, size_t(c.rows() * c.row_bytes)), "padded batch");
  Pack call = {.shape = {.batch = c.batch, .length = c.length},
               .row_bytes = c.row_bytes,
               .capacity = c.tokens(),
               .keep = token_rows(c, by_mask, memory),
               .padded = padded,
               .tokens = memory.take<char>(c.tokens() * c.row_bytes),
               .cu_seqlens = memory.take<int32_t>(c.batch + 1),
               .indices = memory.take<int64_t>(c.tokens()),
               .workspace = nullptr};
  call.workspace = memory.take<char>(int64_t(pack_workspace(call)));
  return call;
}

void packing(nvbench::state& state) {
  const PackingCase& c = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const Pack call = prepare(c, state.get_string("By") == "mask", memory);
  measure(state, [&](cudaStream_t stream) { pack(call, stream); });
  add_bytes(state, double(c.bytes(true)));
}

void unpacking(nvbench::state& state) {
  const PackingCase& c = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const Pack packed = prepare(c, false, memory);
  pack(packed, nullptr);
  check_cuda(cudaDeviceSynchronize(), "pack");
  const bool by_indices = state.get_string("By") == "indices";
  const Unpack call = {.shape = packed.shape,
                       .row_bytes = c.row_bytes,
                       .capacity = packed.capacity,
                       .places = {.indices = by_indices ? packed.indices : nullptr,
                                  .cu_seqlens = by_indices ? nullptr : packed.cu_seqlens},
                       .tokens = packed.tokens,
                       .padded = memory.take<char>(c.rows() * c.row_bytes),
                       .fill = nullptr};
  measure(state, [&](cudaStream_t stream) { unpack(call, stream); });
  add_bytes(state, double(c.bytes(false)));
}

NVBENCH_BENCH(packing)
    .set_name("pack")
    .add_string_axis("Case", names_of(cases()))
    .add_string_axis("By", {"mask", "lengths"})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(unpacking)
    .set_name("unpack")
    .add_string_axis("Case", names_of(cases()))
    .add_string_axis("By", {"indices", "cu_seqlens"})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);

}  // namespace
}  // namespace packseq::bench
