// What is done row by row where keys come in parts, before and after them.
#pragma once
#include "attention/attention.h"
#include "core/cpu/lanes.h"

namespace packseq::PACKSEQ_ISA {

template <class T>
void finish_rows(const AttentionFinish& f, const Span& rows) {
  using Real = typename RealOf<T>::type;
  constexpr double ln2 = 0.693147180559945309417232121458, none = -__builtin_huge_val();
  const Real* const sinks = static_cast<const Real*>(f.sinks);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const Real* const sums = static_cast<const Real*>(f.sums) + 2 * row;
    const bool seen = sums[1] != 0;
    const double sink = sinks ? double(sinks[row % f.heads]) / ln2 : none;
    const double top = seen && sums[0] > sink ? sums[0] : sink;
    const double keep = seen ? __builtin_exp2(sums[0] - top) : 0;  // not of -inf - -inf
    const double weight = sums[1] * keep + (sink == none ? 0 : __builtin_exp2(sink - top));
    static_cast<Real*>(f.lse)[row] = Real(seen || sink != none ? top * ln2 + __builtin_log(weight) : none);
    const Real by = seen ? Real(keep / weight) : Real(0);
    const Real* const total = static_cast<const Real*>(f.total) + row * f.dim_v;
    for_lanes<T>({0, f.dim_v}, [&](int64_t, const Lanes<T>& columns) {
      columns.store(f.out, row, f.dim_v, seen ? columns.load(total) * by : Vec<Real>{});
    });
  }
}

template <class T>
void delta_rows(const AttentionDelta& d, const Span& rows) {
  using Real = typename RealOf<T>::type;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* const dout =
        static_cast<const T*>(d.dout.data) + row / d.heads * d.dout.token + row % d.heads * d.dout.head;
    const T* const out = static_cast<const T*>(d.out) + row * d.dim_v;
    Vec<Real> sums{};
    for_lanes<T>({0, d.dim_v},
                 [&](int64_t, const Lanes<T>& columns) { sums += columns.load(dout) * columns.load(out); });
    Real sum = 0;
    for (int i = 0; i < kLanes<Real>; ++i) sum += sums[i];
    static_cast<Real*>(d.delta)[row] = sum - (d.dlse ? static_cast<const Real*>(d.dlse)[row] : 0);
  }
}

}  // namespace packseq::PACKSEQ_ISA
