// What the long convolution's directions share: rows of tensors and filters as vectors of channels, sums taken one
// after another, and convolutions by transforms.
#pragma once
#include "core/cpu/lanes.h"
#include "core/cpu/transpose.h"
#include "longconv/fft_cpu.h"

namespace packseq::PACKSEQ_ISA {

template <class Real>
PACKSEQ_INLINE void clear_rows(Real* rows, int64_t begin, int64_t end) {
  if (begin < end) __builtin_memset(rows + begin * kLanes<Real>, 0, (end - begin) * kLanes<Real> * sizeof(Real));
}

// f(t, number, columns) for each row and each vector of a tile of channels: whole rows, which are whole cache lines of
// float32, as the next row lies in another place.
template <class T, class F>
PACKSEQ_INLINE void for_rows(const Timeline& time, const Span& channels, const F& f) {
  constexpr int vectors = kTileBytes / kVectorBytes, lanes = Lanes<T>::lanes;
  if (channels.size() == vectors * lanes) {
    for (int64_t t = 0; t < time.length; ++t) {
      PACKSEQ_UNROLL
      for (int i = 0; i < vectors; ++i) f(t, i, Lanes<T>{channels.begin + i * lanes, lanes});
    }
  } else {
    for (int64_t t = 0; t < time.length; ++t) {
      for_lanes<T>(
          channels, [&](int64_t i, const Lanes<T>& columns) __attribute__((always_inline)) { f(t, i, columns); });
    }
  }
}

// rows[t] = a[t] b[t], or a[t] where b has no data; the next vector's rows are `next` numbers further on.
template <class T, class Real>
inline void load_rows(const Timeline time, const Span& channels, const Rows a, const Rows b, Real* rows, int64_t next) {
  for_rows<T>(
      time, channels, [=](int64_t t, int64_t i, const Lanes<T>& columns) __attribute__((always_inline)) {
        Vec<Real> v = columns.load(a, time.row(t));
        if (b.data) v *= columns.load(b, time.row(t));
        store(rows + i * next + t * kLanes<Real>, v);
      });
}

// rows[step * j] = sign * filter[channel][j] for the first `taps` of each channel's `all` taps.
template <class T, class Real>
inline void load_filter(const Lanes<T>& columns, const void* filter, int64_t all, int64_t taps, Real sign, Real* rows,
                        int64_t step) {
  constexpr int lanes = kLanes<Real>;
  const Real* const from = static_cast<const Real*>(filter) + columns.first * all;
  alignas(64) Real square[lanes * lanes] = {};
  for (int64_t j = 0; j < taps; j += lanes) {
    const int64_t count = least(lanes, taps - j);
    if (count == lanes && columns.count == lanes) {
      transpose(from + j, all, square, lanes);
    } else {
      for (int64_t c = 0; c < columns.count; ++c)
        for (int64_t i = 0; i < count; ++i) square[i * lanes + c] = from[c * all + j + i];
    }
    for (int64_t i = 0; i < count; ++i) store(rows + step * (j + i) * lanes, sign * load(square + i * lanes));
  }
}

// y[s] += sum over j <= s, j < taps, of k[j] x[s - j], for s in begin .. end: products in the order of j. The steps are
// those from one y or x to the next, 1 or -1.
template <class Real>
inline void add_products(Real* y, int64_t y_step, const Real* x, int64_t x_step, const Real* k, int64_t taps,
                         int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<Real>;
  if (taps == 0) return;
  constexpr int together = 4;  // sums at once, as one alone would wait for each of its products
  const auto x_at = [&](int64_t t) { return load(x + t * x_step * lanes); };
  const auto k_at = [&](int64_t j) { return load(k + j * lanes); };
  for (int64_t s = begin; s < end; s += together) {
    const int64_t count = least(together, end - s), shared = least(taps, s + 1);
    Vec<Real> sum[together] = {};
    if (count == together) {
      for (int64_t j = 0; j < shared; ++j) {
        const Vec<Real> tap = k_at(j);
        PACKSEQ_UNROLL
        for (int i = 0; i < together; ++i) sum[i] += tap * x_at(s + i - j);
      }
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < shared; ++j) sum[i] += k_at(j) * x_at(s + i - j);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = shared; j < least(taps, s + i + 1); ++j) sum[i] += k_at(j) * x_at(s + i - j);
      Real* const to = y + (s + i) * y_step * lanes;
      store(to, load(to) + sum[i]);
    }
  }
}

// What run() does with the values between its ways down and up.
template <class Real>
struct KeepSpectrum {
  static constexpr bool kDown = true, kUp = false;
  Real scale;
  PACKSEQ_INLINE void operator()(int64_t, Point<Real>& v) const { v = scale * v; }
};

template <class Real>
struct FromSpectrum {
  static constexpr bool kDown = false, kUp = true;
  PACKSEQ_INLINE void operator()(int64_t, Point<Real>&) const {}
};

template <class Real>
struct Convolve {
  static constexpr bool kDown = true, kUp = true;
  const Real* filter;
  PACKSEQ_INLINE void operator()(int64_t at, Point<Real>& v) const { v = v * load_point(filter + at); }
};

// The filters of a vector of channels, ready for sequences of one size: their taps side by side, or their spectrum,
// over the number of points.
template <class T>
struct Filter {
  using Real = typename RealOf<T>::type;
  static constexpr int lanes = kLanes<Real>;

  static int64_t numbers(int64_t points) { return most(2 * points, 2 * kDirectRows) * lanes; }

  // rows: room for twice the points.
  static void prepare(const LongConvProblem& p, const LongConvSize& size, const Lanes<T>& columns, Real* filter,
                      Real* rows) {
    const FftPlan& plan = size.plan;
    if (plan.points == 0) {
      load_filter(columns, p.k, p.taps, size.taps, Real(1), filter, 1);
      load_filter(columns, p.k_after, p.taps_after, size.taps_after, Real(1), after(filter), 1);
      return;
    }
    // Taps before the present are taps at the end, with the sign of what has gone once around.
    const bool both = size.taps_after > 0;
    const int64_t end = both ? 2 * plan.points : plan.points;
    load_filter(columns, p.k, p.taps, size.taps, Real(1), rows, 1);
    clear_rows(rows, size.taps, end - size.taps_after);
    load_filter(columns, p.k_after, p.taps_after, size.taps_after, Real(-1), rows + (end - 1) * lanes, -1);
    const Transform<Real> transform(plan);
    transform.from_rows(rows, both, filter);
    transform.run(filter, KeepSpectrum<Real>{Real(1) / Real(plan.points)});
  }

  static Real* after(Real* filter) { return filter + kDirectRows * lanes; }
  static const Real* after(const Real* filter) { return filter + kDirectRows * lanes; }
};

// A sequence longer than there are points needs both halves of the rows.
PACKSEQ_INLINE bool needs_both(const LongConvSize& size, int64_t length) { return length > size.plan.points; }

// Zeros behind the sequence, as far as the transform looks.
template <class Real>
PACKSEQ_INLINE void pad_rows(const LongConvSize& size, int64_t length, Real* rows) {
  clear_rows(rows, length, needs_both(size, length) ? 2 * size.plan.points : size.plan.points);
}

// y = x * filters, over a sequence's rows.
template <class Real>
inline void convolve_directly(const LongConvSize& size, int64_t length, const Real* taps, const Real* taps_after,
                              const Real* x, Real* y) {
  constexpr int lanes = kLanes<Real>;
  const int64_t last = (length - 1) * lanes;
  clear_rows(y, 0, length);
  add_products(y, 1, x, 1, taps, size.taps, 0, length);
  add_products(y + last - lanes, -1, x + last, -1, taps_after, size.taps_after, 0, length - 1);
}

// dx from dy: the same with time running backwards.
template <class Real>
inline void correlate_directly(const LongConvSize& size, int64_t length, const Real* taps, const Real* taps_after,
                               const Real* dy, Real* dx) {
  constexpr int lanes = kLanes<Real>;
  const int64_t last = (length - 1) * lanes;
  clear_rows(dx, 0, length);
  add_products(dx + last, -1, dy + last, -1, taps, size.taps, 0, length);
  add_products(dx + lanes, 1, dy, 1, taps_after, size.taps_after, 0, length - 1);
}

// The largest transform of a piece: sequences are in the order of their sizes.
PACKSEQ_INLINE int64_t most_points(const LongConvPiece& piece) { return piece.last[-1].size->plan.points; }

}  // namespace packseq::PACKSEQ_ISA
