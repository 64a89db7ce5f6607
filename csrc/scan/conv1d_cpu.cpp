// The causal convolution on the CPU: cuts the work into tiles of rows and channels, and hands them to the kernels of
// the machine's instruction set.
//
// A row's output and dx depend on its own sequence alone, so how rows are cut does not show. The gradients of the taps
// are sums over all rows: rows go to a fixed number of slots by their place, each slot adds its tiles in order, and the
// slots are added in order; the number of threads does not show either.
#include <algorithm>
#include <vector>

#include "core/cpu/memory.h"
#include "core/divide_up.h"
#include "scan/conv1d.h"
#include "scan/conv1d_kernels_cpu.h"

namespace packseq {

namespace {

constexpr int64_t kTileSequences = 16;        // where work goes by sequences
constexpr int64_t kSlots = 32;                // of the sums over rows
constexpr int64_t kThreadElements = 1 << 15;  // fewer are not worth a thread

// Of a [total, channels] tensor.
void zero_slack(const Conv1dProblem& p, void* x) {
  zero_rows(x, span_of(p.cu_seqlens, p.sequences, p.total, p.sequences), size_t(p.channels) * size_of(p.dtype));
}

// f(block, tile) for tiles of `step` items (rows or sequences) and some channels; block counts the tiles' items.
template <class F>
void for_tiles(const Conv1dProblem& p, int64_t items, int64_t step, const Executor& executor, const F& f) {
  const int64_t columns = divide_up(p.channels, kConvTileChannels);
  const int64_t elements = std::max<int64_t>(1, step * std::min<int64_t>(p.channels, kConvTileChannels));
  executor.parallel_for(divide_up(items, step) * columns, divide_up(kThreadElements, elements),
                        [&](int64_t first, int64_t last) {
                          for (int64_t tile = first; tile < last; ++tile) {
                            const int64_t block = tile / columns, item = block * step;
                            const int64_t channel = tile % columns * kConvTileChannels;
                            f(block, ConvTile{{item, std::min(item + step, items)},
                                              {channel, std::min<int64_t>(channel + kConvTileChannels, p.channels)}});
                          }
                        });
}

template <class Real>
void store_sums(const Conv1dBackward& b, const std::vector<double>& sums, int64_t slots) {
  const int64_t channels = b.problem.channels, width = b.problem.width;
  Real* const dweight = static_cast<Real*>(b.dweight);
  Real* const dbias = static_cast<Real*>(b.dbias);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k <= width; ++k) {
      double sum = 0;
      for (int64_t slot = 0; slot < slots; ++slot) sum += sums[size_t((slot * (width + 1) + k) * channels + c)];
      if (k < width) dweight[c * width + k] = Real(sum);
      if (k == width && dbias) dbias[c] = Real(sum);
    }
}

}  // namespace

void conv1d_forward(const Conv1dForward& f, const Executor& executor) {
  const Conv1dProblem& p = f.problem;
  const Conv1dKernels kernels = PACKSEQ_BY_ISA(conv1d_kernels(p.dtype));
  zero_slack(p, f.out);
  for_tiles(p, p.total, kConvTileRows, executor, [&](int64_t, const ConvTile& tile) { kernels.forward(f, tile); });
  if (!f.final_states) return;
  for_tiles(p, p.sequences, kTileSequences, executor,
            [&](int64_t, const ConvTile& tile) { kernels.final_states(f, tile); });
}

void conv1d_backward(const Conv1dBackward& b, const Executor& executor) {
  const Conv1dProblem& p = b.problem;
  const Conv1dKernels kernels = PACKSEQ_BY_ISA(conv1d_kernels(p.dtype));
  zero_slack(p, b.dx);
  const int64_t slot_rows = divide_up(divide_up(p.total, kConvTileRows), kSlots) * kConvTileRows;
  const int64_t slots = slot_rows ? divide_up(p.total, slot_rows) : 0, slot_sums = int64_t(p.width + 1) * p.channels;
  std::vector<double> sums(size_t(slots * slot_sums));
  for_tiles(p, p.total, std::max<int64_t>(1, slot_rows), executor, [&](int64_t slot, const ConvTile& tile) {
    for (int64_t row = tile.items.begin; row < tile.items.end; row += kConvTileRows) {
      const Span rows{row, std::min(row + kConvTileRows, tile.items.end)};
      kernels.backward(b, {rows, tile.channels}, sums.data() + slot * slot_sums);
    }
  });
  p.dtype == Dtype::f64 ? store_sums<double>(b, sums, slots) : store_sums<float>(b, sums, slots);
  if (!b.dinitial_states) return;
  for_tiles(p, p.sequences, kTileSequences, executor,
            [&](int64_t, const ConvTile& tile) { kernels.initial_states(b, tile); });
}

void conv1d_step(const Conv1dStep& s, const Executor& executor) {
  const Conv1dProblem& p = s.problem;
  const Conv1dKernels kernels = PACKSEQ_BY_ISA(conv1d_kernels(p.dtype));
  zero_slack(p, s.out);
  for_tiles(p, p.sequences, kTileSequences, executor, [&](int64_t, const ConvTile& tile) { kernels.step(s, tile); });
}

}  // namespace packseq
