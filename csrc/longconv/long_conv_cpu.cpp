// The long convolution on the CPU: lays out the work and hands it to the kernels of the machine's instruction set.
//
// A piece of work is some sequences of nearly the same length and a tile of channels. A sequence's own results do not
// depend on how pieces are cut. The gradients of the filters and of D are added up piece by piece, then over the pieces
// in their order; how many these are depends on the sequences and the channels, not on the number of threads.
#include <algorithm>
#include <vector>

#include "core/cpu/memory.h"
#include "core/cpu/work_list.h"
#include "core/divide_up.h"
#include "longconv/long_conv_kernels_cpu.h"
#include "longconv/long_conv_plan_cpu.h"
#include "longconv/longconv.h"

namespace packseq {

namespace {

// Of a [total, channels] tensor.
void zero_slack(const LongConvProblem& p, void* x) {
  zero_rows(x, span_of(p.cu_seqlens, p.sequences, p.total, p.sequences), size_t(p.channels) * size_of(p.dtype));
}

// f(run, tile, scratch) for all runs and tiles. scratch_for(points) says how many bytes a run needs.
template <class ScratchFor, class F>
void for_pieces(const LongConvPlan& plan, const std::vector<LongConvPlan::Run>& runs, const Executor& executor,
                const ScratchFor& scratch_for, const F& f) {
  WorkList<LongConvPlan::Run> work;
  size_t scratch = 0;
  for (const LongConvPlan::Run& run : runs) {
    work.add(run, run.cost);
    scratch = std::max(scratch, scratch_for(plan.points(run)));
  }
  const int workers = work.workers(executor, plan.tiles());
  const AlignedMemory memory(workers, scratch);
  using Piece = WorkList<LongConvPlan::Run>::Piece;
  work.run(executor, workers, plan.tiles(),
           [&](const Piece& piece, const Piece&, int64_t worker) { f(*piece.item, piece.copy, memory[worker]); });
}

// The gradients that sequences share. Where a tile has one run alone, whoever computes it stores them; otherwise they
// are kept until all are there.
class SharedGradients {
 public:
  SharedGradients(const LongConvBackward& b, const LongConvPlan& plan, const std::vector<LongConvPlan::Run>& runs)
      : b_(b), plan_(plan) {
    const LongConvProblem& p = b.problem;
    for (const LongConvPlan::Run& run : runs) {
      const int64_t longest = plan.sequences()[size_t(run.last - 1)].rows.size();
      const int64_t taps = std::min(p.taps, longest);
      sums_.push_back({nullptr, taps, p.k_after ? std::min(p.taps_after, longest - 1) : 0});
      starts_.push_back(numbers_);
      numbers_ += sums_.back().count() * plan.tile();
    }
    if (keeps()) kept_.resize(size_t(numbers_ * plan.tiles()));
  }

  size_t scratch() const { return keeps() ? 0 : size_t(numbers_) * sizeof(double); }

  // Room for a run's sums over a tile, cleared. memory: scratch() bytes
  LongConvSums sums(int64_t run, int64_t tile, void* memory) {
    LongConvSums sums = sums_[size_t(run)];
    if (keeps()) {
      sums.rows = kept_.data() + tile * numbers_ + starts_[size_t(run)];
    } else {
      sums.rows = static_cast<double*>(memory);
      std::fill_n(sums.rows, numbers_, 0.0);
    }
    return sums;
  }

  void finish(const LongConvSums& sums, int64_t tile) const {
    if (!keeps()) store(&sums, 1, tile);
  }

  void finish_all(const Executor& executor) {
    if (sums_.size() == 1) return;
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, numbers_));
    executor.parallel_for(plan_.tiles(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        std::vector<LongConvSums> parts;
        for (size_t run = 0; run < sums_.size(); ++run) parts.push_back(sums(int64_t(run), tile, nullptr));
        store(parts.data(), parts.size(), tile);
      }
    });
  }

 private:
  bool keeps() const { return sums_.size() > 1; }

  void store(const LongConvSums* parts, size_t count, int64_t tile) const {
    b_.problem.dtype == Dtype::f64 ? store_as<double>(parts, count, tile) : store_as<float>(parts, count, tile);
  }

  template <class Real>
  void store_as(const LongConvSums* parts, size_t count, int64_t tile) const {
    const LongConvProblem& p = b_.problem;
    const int64_t width = plan_.tile(), channel = tile * width, channels = std::min(width, p.channels - channel);
    // to[channel][j]: row_of(part, j) says which of the part's rows that is, or -1 for none.
    const auto add_up = [&](void* to, int64_t all, const auto& row_of) {
      for (int64_t j = 0; j < all; ++j) {
        double sum[long_conv_tile(Dtype::f32)] = {};  // the wider tile
        for (size_t i = 0; i < count; ++i) {
          const int64_t row = row_of(parts[i], j);
          for (int64_t c = 0; row >= 0 && c < width; ++c) sum[c] += parts[i].rows[row * width + c];
        }
        for (int64_t c = 0; c < channels; ++c) static_cast<Real*>(to)[(channel + c) * all + j] = Real(sum[c]);
      }
    };
    add_up(b_.dk, p.taps, [](const LongConvSums& s, int64_t j) { return j < s.taps ? j : -1; });
    if (p.k_after) {
      add_up(b_.dk_after, p.taps_after,
             [](const LongConvSums& s, int64_t j) { return j < s.taps_after ? s.taps + j : -1; });
    }
    if (p.D) add_up(b_.dD, 1, [](const LongConvSums& s, int64_t) { return s.count() - 1; });
  }

  const LongConvBackward& b_;
  const LongConvPlan& plan_;
  std::vector<LongConvSums> sums_;
  std::vector<int64_t> starts_;
  int64_t numbers_ = 0;  // of a tile
  std::vector<double> kept_;
};

}  // namespace

void long_conv_forward(const LongConvForward& f, const Executor& executor) {
  const LongConvProblem& p = f.problem;
  zero_slack(p, f.out);
  if (p.channels == 0) return;
  const LongConvKernels kernels = PACKSEQ_BY_ISA(long_conv_kernels(p.dtype));
  const LongConvPlan plan(p, executor);
  const auto runs = plan.runs(std::max<int64_t>(1, divide_up(4 * executor.threads(), plan.tiles())));
  for_pieces(
      plan, runs, executor, [&](int64_t points) { return kernels.forward_scratch(p, points); },
      [&](const LongConvPlan::Run& run, int64_t tile, char* memory) {
        kernels.forward(f, plan.piece(run, tile), memory);
      });
}

void long_conv_backward(const LongConvBackward& b, const Executor& executor) {
  constexpr int64_t kPieces = 32;  // enough to share out, few enough that filters are not transformed again and again
  const LongConvProblem& p = b.problem;
  for (void* gradient : {b.du, b.dpre_gate, b.dgate}) zero_slack(p, gradient);
  if (p.channels == 0) return;
  const LongConvKernels kernels = PACKSEQ_BY_ISA(long_conv_kernels(p.dtype));
  const LongConvPlan plan(p, executor);
  const auto runs = plan.runs(divide_up(kPieces, plan.tiles()));
  SharedGradients shared(b, plan, runs);
  const size_t own = (shared.scratch() + 63) / 64 * 64;
  for_pieces(
      plan, runs, executor, [&](int64_t points) { return own + kernels.backward_scratch(p, points); },
      [&](const LongConvPlan::Run& run, int64_t tile, char* memory) {
        const LongConvSums sums = shared.sums(run.number, tile, memory);
        kernels.backward(b, plan.piece(run, tile), sums, memory + own);
        shared.finish(sums, tile);
      });
  shared.finish_all(executor);
}

}  // namespace packseq
