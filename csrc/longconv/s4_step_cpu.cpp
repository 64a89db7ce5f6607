// The S4 step on the CPU: work is cut into blocks of channels and runs of sequences, which do not know of each other.
#include "core/cpu/memory.h"
#include "core/cpu/work_list.h"
#include "longconv/filter_parts_cpu.h"
#include "longconv/s4_step.h"

namespace packseq {

void s4_step(const S4Step& s, const Executor& executor) {
  constexpr double kPartCost = 1 << 17;  // enough that it does not matter who takes a part
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
  // Of a channel's token: multiply-adds in double, each worth two.
  const double cost = 2 * double(s.poles) * double(8 + 4 * s.rank + 2 * s.filters);
  for_ranges(executor, s.channels, 8 * cost, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t c = begin; c < end; ++c) kernels.prepare(s, c, parameters[0] + c * bytes);
  });

  // Some sequences in a block of channels: they go one after another, as they share its parameters.
  struct Part {
    int64_t channel;
    Span sequences;
  };
  WorkList<Part> work;
  for (int64_t channel = 0; channel < s.channels; channel += kStepChannels) {
    for (int64_t first = 0, last = 0; first < s.sequences; first = last) {
      double part = 0;  // a sequence costs a token more: its states are loaded and stored
      while (last < s.sequences && part < kPartCost) part += cost * kStepChannels * double(rows_of(last++).size() + 1);
      work.add({channel, {first, last}}, part);
    }
  }
  const int workers = work.workers(executor, 1);
  const AlignedMemory scratch(workers, kernels.scratch(s));
  using Piece = WorkList<Part>::Piece;
  work.run(executor, workers, 1, [&](const Piece& piece, const Piece&, int64_t worker) {
    for (int64_t i = piece.item->sequences.begin; i < piece.item->sequences.end; ++i) {
      if (!known(i) || rows_of(i).size() == 0) continue;
      void* const state = static_cast<char*>(s.pool) + size_t(slot_of(i)) * states;
      kernels.step(s, rows_of(i), state, piece.item->channel, parameters[0], scratch[worker]);
    }
  });
}

}  // namespace packseq
