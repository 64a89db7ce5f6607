// The gradients of a piece: some sequences, in the order of their sizes, and a tile of channels.
//
// dx is the correlation of the filters and dy, the gradients of the filters those of x and dy. The latter are added up
// as spectra over some sequences of one size, come back by one transform, and are added up in double from there.
#pragma once
#include "longconv/long_conv_rows_cpu.h"

namespace packseq::PACKSEQ_ISA {

// What run() does with the values between its ways down and up.
template <class Real>
struct ConvolveAndKeep {
  static constexpr bool kDown = true, kUp = true;
  const Real* filter;
  Real* kept;
  PACKSEQ_INLINE void operator()(int64_t at, Point<Real>& v) const {
    store_point(kept + at, v);
    v = v * load_point(filter + at);
  }
};

template <class Real>
struct Correlate {
  static constexpr bool kDown = true, kUp = true;
  const Real *filter, *x;
  Real* dfilter;
  PACKSEQ_INLINE void operator()(int64_t at, Point<Real>& v) const {
    store_point(dfilter + at, load_point(dfilter + at) + times_conjugate(v, load_point(x + at)));
    v = times_conjugate(v, load_point(filter + at));
  }
};

template <class T>
class LongConvBackwardPiece {
  using Real = typename RealOf<T>::type;
  static constexpr int lanes = kLanes<Real>;

 public:
  LongConvBackwardPiece(const LongConvBackward& b, int64_t points, Scratch& s)
      : b_(b),
        p_(b.problem),
        tile_(long_conv_tile(p_.dtype)),
        vectors_(tile_ / lanes),
        filter_numbers_(Filter<T>::numbers(points)),
        row_numbers_(most(2 * points, kDirectRows) * lanes),
        filters_(s.take<Real>(vectors_ * filter_numbers_)),
        dfilters_(s.take<Real>(vectors_ * filter_numbers_)),
        x_(s.take<Real>(vectors_ * row_numbers_)),
        y_(s.take<Real>(vectors_ * row_numbers_)),
        dy_(s.take<Real>(vectors_ * row_numbers_)),
        dx_(s.take<Real>(vectors_ * row_numbers_)),
        x_points_(s.take<Real>(2 * points * lanes)),
        points_(s.take<Real>(2 * points * lanes)) {}

  // Adds to the sums.
  void run(const LongConvPiece& piece, const LongConvSums& sums) const {
    const Span& channels = piece.channels;
    const LongConvSize* size = nullptr;
    int64_t spectra = 0, longest = 0;
    const auto finish = [&] {
      if (size && size->plan.points > 0) {
        for_lanes<T>(channels, [&](int64_t i, const Lanes<T>&) { add_spectrum(*size, longest, i, sums); });
      }
      spectra = longest = 0;
    };
    for (const LongConvSequence* sequence = piece.first; sequence < piece.last; ++sequence) {
      if (sequence->size != size || spectra == kMostSpectra) finish();
      if (sequence->size != size) {
        size = sequence->size;
        for_lanes<T>(channels, [&](int64_t i, const Lanes<T>& columns) {
          Filter<T>::prepare(p_, *size, columns, filters_ + i * filter_numbers_, x_);
        });
      }
      const Timeline time(sequence->rows, p_.reverse);
      load_rows<T>(time, channels, p_.u, p_.pre_gate, x_, row_numbers_);
      load_rows<T>(time, channels, b_.dout, p_.gate, dy_, row_numbers_);
      for_lanes<T>(channels, [&](int64_t i, const Lanes<T>&) {
        if (spectra == 0) clear_rows(dfilters_ + i * filter_numbers_, 0, 2 * size->plan.points);
        size->plan.points == 0 ? products(*size, time.length, i, sums) : transforms(*size, time.length, i);
        if (p_.D) add_dD(time.length, i, sums);
      });
      store_rows(time, channels);
      ++spectra;
      longest = most(longest, time.length);
    }
    finish();
  }

 private:
  static constexpr int64_t kMostSpectra = 16;  // that are added up before they come back

  // Of one sequence and vector number i: y where it is needed, dx, and what the filters' gradients get.
  void products(const LongConvSize& size, int64_t length, int64_t i, const LongConvSums& all) const {
    const LongConvSums sums = of_vector(all, i);
    const Real *const taps = filters_ + i * filter_numbers_, *const taps_after = Filter<T>::after(taps);
    const Real *const x = x_ + i * row_numbers_, *const dy = dy_ + i * row_numbers_;
    if (p_.gate.data) convolve_directly(size, length, taps, taps_after, x, y_ + i * row_numbers_);
    correlate_directly(size, length, taps, taps_after, dy, dx_ + i * row_numbers_);
    // dk[j] is the product number length - 1 - j of x and dy backwards, dk_after[j] number length - 2 - j of dy and x
    // backwards.
    alignas(64) Real dtaps[kDirectRows * lanes];
    const int64_t last = (length - 1) * lanes, count = least(size.taps, length);
    const int64_t count_after = least(size.taps_after, length - 1);
    clear_rows(dtaps, 0, count);
    add_products(dtaps + last, -1, dy + last, -1, x, length, length - count, length);
    add_rows(dtaps, 1, count, 1, sums.rows);
    clear_rows(dtaps, 0, count_after);
    add_products(dtaps + last - lanes, -1, x + last, -1, dy, length, length - 1 - count_after, length - 1);
    add_rows(dtaps, 1, count_after, 1, sums.rows + sums.taps * tile_);
  }

  void transforms(const LongConvSize& size, int64_t length, int64_t i) const {
    const Real* const filter = filters_ + i * filter_numbers_;
    Real *const x = x_ + i * row_numbers_, *const dy = dy_ + i * row_numbers_;
    const Transform<Real> transform(size.plan);
    const bool both = needs_both(size, length);
    pad_rows(size, length, x);
    pad_rows(size, length, dy);
    if (p_.gate.data) {
      transform.from_rows(x, both, points_);
      transform.run(points_, ConvolveAndKeep<Real>{filter, x_points_});
      transform.to_rows(points_, y_ + i * row_numbers_, both);
    } else {
      transform.from_rows(x, both, x_points_);
      transform.run(x_points_, KeepSpectrum<Real>{1});
    }
    transform.from_rows(dy, both, points_);
    transform.run(points_, Correlate<Real>{filter, x_points_, dfilters_ + i * filter_numbers_});
    transform.to_rows(points_, dx_ + i * row_numbers_, both);
  }

  // What has come together in dfilters_, to the sums. Nothing is added for taps that no sequence reaches.
  void add_spectrum(const LongConvSize& size, int64_t longest, int64_t i, const LongConvSums& sums) const {
    const int64_t points = size.plan.points;
    const Transform<Real> transform(size.plan);
    const bool both = size.taps_after > 0;
    Real* const dfilter = dfilters_ + i * filter_numbers_;
    transform.run(dfilter, FromSpectrum<Real>());
    transform.to_rows(dfilter, x_, both);
    const LongConvSums own = of_vector(sums, i);
    add_rows(x_, 1, least(size.taps, longest), 1.0 / double(points), own.rows);
    add_rows(x_ + (2 * points - 1) * lanes, -1, least(size.taps_after, longest - 1), -1.0 / double(points),
             own.rows + sums.taps * tile_);
  }

  void store_rows(const Timeline time, const Span& channels) const {
    void *const du = b_.du, *const dgate = b_.dgate, *const dpre_gate = b_.dpre_gate;
    const Rows u = p_.u, pre_gate = p_.pre_gate, dout = b_.dout;
    const Real* const D = static_cast<const Real*>(p_.D);
    const Real *const x = x_, *const y = y_, *const dy = dy_, *const dx = dx_;
    const int64_t width = p_.channels, next = row_numbers_;
    for_rows<T>(
        time, channels, [=](int64_t t, int64_t i, const Lanes<T>& columns) __attribute__((always_inline)) {
          const int64_t at = i * next + t * lanes, row = time.row(t);
          if (dgate) {
            Vec<Real> v = load(y + at);
            if (D) v += columns.load(D) * load(x + at);
            columns.store(dgate, row, width, v * columns.load(dout, row));
          }
          Vec<Real> v = load(dx + at);
          if (D) v += columns.load(D) * load(dy + at);
          if (pre_gate.data) {
            columns.store(dpre_gate, row, width, v * columns.load(u, row));
            v *= columns.load(pre_gate, row);
          }
          columns.store(du, row, width, v);
        });
  }

  void add_dD(int64_t length, int64_t i, const LongConvSums& all) const {
    constexpr int64_t together = 64;  // products that are added up before they go to the double
    const LongConvSums sums = of_vector(all, i);
    for (int64_t begin = 0; begin < length; begin += together) {
      Vec<Real> sum = {};
      for (int64_t t = begin; t < least(begin + together, length); ++t) {
        sum += load(dy_ + i * row_numbers_ + t * lanes) * load(x_ + i * row_numbers_ + t * lanes);
      }
      alignas(64) Real row[lanes];
      store(row, sum);
      add_rows(row, 1, 1, 1, sums.rows + (sums.count() - 1) * tile_);
    }
  }

  LongConvSums of_vector(LongConvSums sums, int64_t i) const {
    sums.rows += i * lanes;
    return sums;
  }

  void add_rows(const Real* rows, int64_t step, int64_t count, double scale, double* sums) const {
    for (int64_t j = 0; j < count; ++j)
      for (int l = 0; l < lanes; ++l) sums[j * tile_ + l] += scale * double(rows[step * j * lanes + l]);
  }

  const LongConvBackward& b_;
  const LongConvProblem& p_;
  int64_t tile_, vectors_, filter_numbers_, row_numbers_;  // numbers: of a vector's filter or rows
  Real *filters_, *dfilters_, *x_, *y_, *dy_, *dx_, *x_points_, *points_;
};

}  // namespace packseq::PACKSEQ_ISA
