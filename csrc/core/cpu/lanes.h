// Channels in the lanes of vectors, and a sequence's rows in the order of its time.
#pragma once
#include "core/cpu/convert.h"
#include "core/cpu/scratch.h"
#include "core/packed.h"

namespace packseq::PACKSEQ_ISA {

// `count` neighbouring channels from `first` on: a vector of them or fewer, the other lanes being zeros.
template <class T>
struct Lanes {
  using Real = typename RealOf<T>::type;
  static constexpr int lanes = kLanes<Real>;
  int64_t first, count;

  template <class U>
  PACKSEQ_INLINE Vec<Real> load(const U* row) const {
    if (count == lanes) return load_real(row + first);
    U some[lanes] = {};
    __builtin_memcpy(some, row + first, count * sizeof(U));
    return load_real(some);
  }

  PACKSEQ_INLINE Vec<Real> load(const Rows& x, int64_t row) const {
    return load(static_cast<const T*>(x.data) + row * x.token);
  }

  // To a row of a contiguous [total, channels] tensor.
  PACKSEQ_INLINE void store(void* x, int64_t row, int64_t channels, Vec<Real> v) const {
    T* const to = static_cast<T*>(x) + row * channels + first;
    if (count == lanes) return store_real(to, v);
    T some[lanes];
    store_real(some, v);
    __builtin_memcpy(to, some, count * sizeof(T));
  }

  // Column `column` of a contiguous [channels, columns] matrix.
  template <class U>
  PACKSEQ_INLINE Vec<Real> gather(const U* matrix, int64_t columns, int64_t column) const {
    U some[lanes] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = matrix[(first + i) * columns + column];
    return load_real(some);
  }

  PACKSEQ_INLINE void scatter(T* matrix, int64_t columns, int64_t column, Vec<Real> v) const {
    T some[lanes];
    store_real(some, v);
    for (int64_t i = 0; i < count; ++i) matrix[(first + i) * columns + column] = some[i];
  }
};

// f(number, lanes) for the channels, a vector of them at a time.
template <class T, class F>
PACKSEQ_INLINE void for_lanes(const Span& channels, const F& f) {
  constexpr int64_t lanes = Lanes<T>::lanes;
  for (int64_t c = channels.begin, i = 0; c < channels.end; c += lanes, ++i) {
    f(i, Lanes<T>{c, least(lanes, channels.end - c)});
  }
}

// A sequence's rows in the order of its time.
struct Timeline {
  int64_t first, step, length;

  PACKSEQ_INLINE Timeline(const Span& rows, bool reverse)
      : first(reverse ? rows.end - 1 : rows.begin), step(reverse ? -1 : 1), length(rows.size()) {}
  PACKSEQ_INLINE int64_t row(int64_t t) const { return first + step * t; }
};

}  // namespace packseq::PACKSEQ_ISA
