// The S4 step on the CPU: every sequence and block of channels is a piece of work of its own.
#include "core/cpu/memory.h"
#include "longconv/filter_parts_cpu.h"
#include "longconv/s4_step.h"

namespace packseq {

void s4_step(const S4Step& s, const Executor& executor) {
  const size_t row = size_t(s.filters * s.channels) * size_of(s.dtype);
  const size_t states = size_t(2 * s.channels * s.poles) * (s.dtype == Dtype::f64 ? 8 : 4);
  const auto rows_of = [&](int64_t i) { return span_of(s.cu_seqlens, s.sequences, s.total, i); };
  const auto slot_of = [&](int64_t i) { return s.indices ? int64_t(s.indices[i]) : i; };
  const auto known = [&](int64_t i) { return slot_of(i) >= 0 && slot_of(i) < s.slots; };
  for (int64_t i = 0; i <= s.sequences; ++i) {
    if (i == s.sequences || !known(i)) zero_rows(s.out, rows_of(i), row);
  }

  const StepKernels kernels = PACKSEQ_BY_ISA(step_kernels(s.dtype));
  const size_t bytes = kernels.parameter_bytes(s);
  const AlignedMemory parameters(1, bytes * size_t(s.channels));
  const double cost = double(s.poles) * double(8 + 4 * s.rank + 2 * s.filters);  // of a channel's token
  for_ranges(executor, s.channels, 16 * cost, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t c = begin; c < end; ++c) kernels.prepare(s, c, parameters[0] + c * bytes);
  });

  // A block's sequences go one after another: they share its parameters.
  const int64_t blocks = divide_up(s.channels, kStepChannels);
  const double tokens = double(s.total + s.sequences) / double(std::max<int64_t>(1, s.sequences));
  for_ranges(executor, s.sequences * blocks, cost * tokens * kStepChannels, kernels.scratch(s),
             [&](int64_t begin, int64_t end, void* scratch) {
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t sequence = i % s.sequences;
                 const Span rows = rows_of(sequence);
                 if (!known(sequence) || rows.size() == 0) continue;
                 kernels.step(s, rows, static_cast<char*>(s.pool) + size_t(slot_of(sequence)) * states,
                              i / s.sequences * kStepChannels, parameters[0], scratch);
               }
             });
}

}  // namespace packseq
