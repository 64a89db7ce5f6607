// How the filters' host code shares out its work: rows cut into segments, the same whatever the number of threads.
#pragma once
#include <algorithm>

#include "core/cpu/memory.h"
#include "core/divide_up.h"
#include "core/executor.h"
#include "longconv/filters_kernels_cpu.h"

namespace packseq {

// f(begin, end, scratch) over ranges of items that are worth a thread each; cost: about the multiply-adds of an item.
template <class F>
void for_ranges(const Executor& executor, int64_t items, double cost, size_t scratch_bytes, const F& f) {
  constexpr double thread_cost = 1 << 19;
  const int64_t grain = 1 + int64_t(std::min(thread_cost / std::max(cost, 1.0), 1e9));
  executor.parallel_for(items, grain, [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch(1, scratch_bytes);
    f(begin, end, scratch[0]);
  });
}

// Rows of `length` items, cut into segments; `run` rows go one after another.
struct RowParts {
  int64_t rows, length, segment, run = 1;

  int64_t per_row() const { return divide_up(length, segment); }
  int64_t runs() const { return divide_up(rows, run); }

  // f(part, which part of all, which run, scratch)
  template <class F>
  void each(const Executor& executor, double cost_of_item, size_t scratch_bytes, const F& f) const {
    const double cost = cost_of_item * double(std::min(segment, length)) * double(run);
    for_ranges(executor, runs() * per_row(), cost, scratch_bytes, [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t which = i / per_row(), from = i % per_row() * segment;
        const Span span = {from, std::min(from + segment, length)};
        for (int64_t row = which * run; row < std::min(rows, (which + 1) * run); ++row) {
          f(FilterPart{row, span}, row * per_row() + i % per_row(), which, scratch);
        }
      }
    });
  }
};

}  // namespace packseq
