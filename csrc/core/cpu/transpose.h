// Transposes a square of one vector's lanes in registers.
#pragma once
#include <utility>

#include "core/cpu/vector.h"

namespace packseq::PACKSEQ_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PACKSEQ_SHUFFLEVECTOR 1
#endif
#endif

template <class Real, int kStep>
struct Exchange {
  static constexpr int lanes = kLanes<Real>;
  // Lane l of the new pair of rows, counted through both old rows: where bit kStep of the lane's number differs from
  // the row's, the value comes from the other row.
  static constexpr int low(int l) { return l & kStep ? lanes + l - kStep : l; }
  static constexpr int high(int l) { return l & kStep ? lanes + l : l + kStep; }

  template <size_t... L>
  static PACKSEQ_INLINE void run(Vec<Real>& a, Vec<Real>& b, std::index_sequence<L...>) {
#ifdef PACKSEQ_SHUFFLEVECTOR
    const Vec<Real> x = __builtin_shufflevector(a, b, low(int(L))...);
    const Vec<Real> y = __builtin_shufflevector(a, b, high(int(L))...);
#else
    const Vec<Real> x = __builtin_shuffle(a, b, Vec<Int<Real>>{low(int(L))...});
    const Vec<Real> y = __builtin_shuffle(a, b, Vec<Int<Real>>{high(int(L))...});
#endif
    a = x;
    b = y;
  }
};

template <class Real, int kStep = 1>
PACKSEQ_INLINE void transpose_rows(Vec<Real> (&rows)[kLanes<Real>]) {
  if constexpr (kStep < kLanes<Real>) {
    PACKSEQ_UNROLL
    for (int i = 0; i < kLanes<Real>; ++i) {
      if (!(i & kStep)) {
        Exchange<Real, kStep>::run(rows[i], rows[i | kStep], std::make_index_sequence<kLanes<Real>>());
      }
    }
    transpose_rows<Real, 2 * kStep>(rows);
  }
}

// to[c][r] = from[r][c] for one square; the strides count elements from one row to the next.
template <class Real>
inline void transpose(const Real* from, int64_t from_stride, Real* to, int64_t to_stride) {
  Vec<Real> rows[kLanes<Real>];
  PACKSEQ_UNROLL
  for (int i = 0; i < kLanes<Real>; ++i) rows[i] = load(from + i * from_stride);
  transpose_rows<Real>(rows);
  PACKSEQ_UNROLL
  for (int i = 0; i < kLanes<Real>; ++i) store(to + i * to_stride, rows[i]);
}

}  // namespace packseq::PACKSEQ_ISA
