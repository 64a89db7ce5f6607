// The selective scan on the CPU: lays out the work and hands it to the kernels of the machine's instruction set.
//
// Channels do not know of each other but in dB and dC of every token: these are summed over slices of a group's
// channels, then over the slices in their order. Gradients of what all sequences share are summed over runs of
// sequences, then over the runs. Slices depend on the channels alone and runs on the lengths, never on the number of
// threads.
#include <algorithm>
#include <vector>

#include "core/cpu/memory.h"
#include "core/cpu/work_list.h"
#include "core/divide_up.h"
#include "scan/scan.h"
#include "scan/scan_kernels_cpu.h"

namespace packseq {

namespace {

size_t parameter_size(const ScanProblem& p) { return p.dtype == Dtype::f64 ? 8 : 4; }
int64_t blocks_of(const ScanProblem& p) { return int64_t(blocks_per_group(p)) * p.groups; }
Span rows_of(const ScanProblem& p, int64_t i) { return span_of(p.cu_seqlens, p.sequences, p.total, i); }

// The states of sequence or slot i in a [.., channels, states] tensor that may be nullptr.
template <class Void>
Void* states_at(Void* states, const ScanProblem& p, int64_t i) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return states ? static_cast<Byte*>(states) + i * p.channels * state_width(p) * parameter_size(p) : nullptr;
}

// Sequences first .. last, which one thread goes through in this order.
struct Run {
  int64_t first, last, tokens, number;
};

// Few runs, as each has sums of its own, but enough to share out among threads.
std::vector<Run> runs_of(const ScanProblem& p) {
  constexpr int64_t most = 64;
  const int64_t enough = std::max((p.total + p.sequences) / most, 4 * state_width(p));
  std::vector<Run> runs;
  Run run = {};
  for (int64_t i = 0; i < p.sequences; ++i) {
    run.tokens += rows_of(p, i).size();
    run.last = i + 1;
    if (run.tokens + run.last - run.first < enough && run.last < p.sequences) continue;
    runs.push_back(run);
    run = {.first = run.last, .last = run.last, .tokens = 0, .number = run.number + 1};
  }
  return runs;
}

// Multiply-adds of a run in one block of channels. A sequence costs a token more: its states are loaded and stored.
double run_cost(const ScanProblem& p, const Run& run) {
  return double(run.tokens + run.last - run.first) * double(kScanBlock * (p.complex ? 40 : 12)) * double(p.states + 2);
}

// sequence_at(i) says where a sequence is and where its states are.
template <class SequenceAt>
void scan_sequences(const ScanProblem& p, void* out, const Executor& executor, const SequenceAt& sequence_at) {
  WorkList<Run> work;
  for (const Run& run : runs_of(p)) work.add(run, run_cost(p, run));
  const ScanKernels kernels = PACKSEQ_BY_ISA(scan_kernels(p));
  const int workers = work.workers(executor, blocks_of(p));
  const AlignedMemory parameters(1, kernels.parameter_bytes(p)), scratch(workers, kernels.forward_scratch(p));
  kernels.prepare(p, parameters[0]);
  using Piece = WorkList<Run>::Piece;
  work.run(executor, workers, blocks_of(p), [&](const Piece& piece, const Piece&, int64_t worker) {
    for (int64_t i = piece.item->first; i < piece.item->last; ++i) {
      const ScanSequence sequence = sequence_at(i);
      if (sequence.rows.size() == 0 && sequence.initial == sequence.final) continue;
      kernels.forward(p, out, sequence, piece.copy, parameters[0], scratch[worker]);
    }
  });
}

}  // namespace

void scan_forward(const ScanForward& f, const Executor& executor) {
  const ScanProblem& p = f.problem;
  zero_rows(f.out, rows_of(p, p.sequences), p.channels * size_of(p.dtype));
  scan_sequences(p, f.out, executor, [&](int64_t i) {
    return ScanSequence{rows_of(p, i), states_at(p.initial_states, p, i), states_at(f.final_states, p, i)};
  });
}

void scan_step(const ScanStep& s, const Executor& executor) {
  const ScanProblem& p = s.problem;
  const auto slot = [&](int64_t i) { return s.indices ? int64_t(s.indices[i]) : i; };
  const auto known = [&](int64_t i) { return slot(i) >= 0 && slot(i) < s.slots; };
  for (int64_t i = 0; i <= p.sequences; ++i) {
    if (i == p.sequences || !known(i)) zero_rows(s.out, rows_of(p, i), p.channels * size_of(p.dtype));
  }
  scan_sequences(p, s.out, executor, [&](int64_t i) {
    if (!known(i)) return ScanSequence{};
    void* const states = states_at(s.pool, p, slot(i));
    return ScanSequence{rows_of(p, i), states, states};
  });
}

namespace {

// A group's channels in slices of whole blocks. A slice is wide enough that all slices' dB and dC are no larger than u.
struct Slices {
  int blocks, per_group;

  explicit Slices(const ScanProblem& p) {
    constexpr int64_t most = 16;
    const int64_t all = blocks_per_group(p), width = std::max<int64_t>(64, 2 * state_width(p));
    blocks = int(std::max(divide_up(all, most), width / kScanBlock));
    per_group = int(divide_up(all, blocks));
  }
};

// Gradient [channels, states] or [channels] from rows `first` .. `first + width` of every run's sums.
void add_runs(const ScanProblem& p, void* gradient, int64_t width, const std::vector<double>& sums, int64_t first,
              int64_t runs, int64_t block) {
  if (!gradient) return;
  const ScanBlock channels = block_of(p, block);
  for (int c = 0; c < channels.channels; ++c) {
    for (int64_t n = 0; n < width; ++n) {
      double sum = 0;
      for (int64_t r = 0; r < runs; ++r) {
        sum += sums[((r * blocks_of(p) + block) * ScanSums::count(p) + first + n) * kScanBlock + c];
      }
      const int64_t at = (channels.first + c) * width + n;
      if (p.dtype == Dtype::f64) {
        static_cast<double*>(gradient)[at] = sum;
      } else {
        static_cast<float*>(gradient)[at] = float(sum);
      }
    }
  }
}

}  // namespace

void scan_backward(const ScanBackward& b, const Executor& executor) {
  const ScanProblem& p = b.problem;
  const Span slack = rows_of(p, p.sequences);
  for (void* x : {b.du, b.ddelta, p.z.data ? b.dz : nullptr}) zero_rows(x, slack, p.channels * size_of(p.dtype));
  const size_t matrix_row = p.groups * state_width(p) * (p.complex ? parameter_size(p) : size_of(p.dtype));
  if (!p.B.constants) zero_rows(b.dB, slack, matrix_row);
  if (!p.C.constants) zero_rows(b.dC, slack, matrix_row);

  WorkList<Run> work;
  const std::vector<Run> runs = runs_of(p);
  for (const Run& run : runs) work.add(run, 4 * run_cost(p, run));
  int64_t longest = 0, end = 0;
  for (int64_t i = 0; i < p.sequences; ++i) {
    longest = std::max(longest, rows_of(p, i).size());
    end = std::max(end, rows_of(p, i).end);
  }

  const Slices cut(p);
  const int64_t slices = int64_t(cut.per_group) * p.groups, all_blocks = blocks_of(p);
  const size_t matrix = size_t(end) * state_width(p) * parameter_size(p), dB = p.B.constants ? 0 : matrix;
  const AlignedMemory parts(slices, dB + (p.C.constants ? 0 : matrix));
  std::vector<ScanSlice> matrices;
  for (int64_t i = 0; i < slices; ++i) matrices.push_back({parts[i], parts[i] + dB, false});

  const ScanKernels kernels = PACKSEQ_BY_ISA(scan_kernels(p));
  const int workers = work.workers(executor, slices);
  const AlignedMemory parameters(1, kernels.parameter_bytes(p)), scratch(workers, kernels.backward_scratch(p, longest));
  kernels.prepare(p, parameters[0]);
  const int64_t sum_size = ScanSums::count(p) * kScanBlock;
  std::vector<double> sums(runs.size() * all_blocks * sum_size);
  using Piece = WorkList<Run>::Piece;
  work.run(executor, workers, slices, [&](const Piece& piece, const Piece&, int64_t worker) {
    const Run& run = *piece.item;
    const int64_t group = piece.copy / cut.per_group, first = piece.copy % cut.per_group * cut.blocks;
    const int64_t last = std::min<int64_t>(first + cut.blocks, blocks_per_group(p));
    for (int64_t i = run.first; i < run.last; ++i) {
      const ScanSequenceBackward sequence = {rows_of(p, i), states_at(p.initial_states, p, i),
                                             states_at(b.dfinal_states, p, i), states_at(b.dinitial_states, p, i)};
      for (int64_t in_group = first; in_group < last; ++in_group) {
        const int64_t block = group * blocks_per_group(p) + in_group;
        ScanSlice slice = matrices[piece.copy];
        slice.first = in_group == first;
        kernels.backward(b, sequence, block, {sums.data() + (run.number * all_blocks + block) * sum_size}, slice,
                         parameters[0], scratch[worker]);
      }
    }
  });

  executor.parallel_for(
      end, 1024, [&](int64_t first, int64_t last) { kernels.merge(b, matrices.data(), cut.per_group, first, last); });
  const int64_t width = state_width(p), count = int64_t(runs.size());
  executor.parallel_for(all_blocks, 8, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      add_runs(p, b.dA, width, sums, 0, count, block);
      if (p.B.constants) add_runs(p, b.dB, width, sums, ScanSums::dB(p), count, block);
      if (p.C.constants) add_runs(p, b.dC, width, sums, ScanSums::dC(p), count, block);
      add_runs(p, b.dD, 1, sums, ScanSums::dD(p), count, block);
      add_runs(p, b.ddelta_bias, 1, sums, ScanSums::ddelta_bias(p), count, block);
    }
  });
}

}  // namespace packseq
