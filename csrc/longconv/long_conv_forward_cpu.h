// The long convolution of a piece: some sequences, in the order of their sizes, and a tile of channels.
#pragma once
#include "longconv/long_conv_rows_cpu.h"

namespace packseq::PACKSEQ_ISA {

template <class T>
class LongConvForwardPiece {
  using Real = typename RealOf<T>::type;
  static constexpr int lanes = kLanes<Real>;

 public:
  LongConvForwardPiece(const LongConvForward& f, int64_t points, Scratch& s)
      : f_(f),
        p_(f.problem),
        vectors_(long_conv_tile(p_.dtype) / lanes),
        filter_numbers_(Filter<T>::numbers(points)),
        row_numbers_(most(2 * points, kDirectRows) * lanes),
        filters_(s.take<Real>(vectors_ * filter_numbers_)),
        x_(s.take<Real>(vectors_ * row_numbers_)),
        y_(s.take<Real>(vectors_ * row_numbers_)),
        points_(s.take<Real>(2 * points * lanes)) {}

  void run(const LongConvPiece& piece) const {
    const LongConvSize* size = nullptr;
    for (const LongConvSequence* sequence = piece.first; sequence < piece.last; ++sequence) {
      if (sequence->size != size) {
        size = sequence->size;
        for_lanes<T>(piece.channels, [&](int64_t i, const Lanes<T>& columns) {
          Filter<T>::prepare(p_, *size, columns, filters_ + i * filter_numbers_, x_);
        });
      }
      const Timeline time(sequence->rows, p_.reverse);
      load_rows<T>(time, piece.channels, p_.u, p_.pre_gate, x_, row_numbers_);
      for_lanes<T>(piece.channels, [&](int64_t i, const Lanes<T>&) {
        convolve(*size, time.length, filters_ + i * filter_numbers_, x_ + i * row_numbers_, y_ + i * row_numbers_);
      });
      store_out(time, piece.channels);
    }
  }

 private:
  void convolve(const LongConvSize& size, int64_t length, const Real* filter, Real* x, Real* y) const {
    if (size.plan.points == 0) return convolve_directly(size, length, filter, Filter<T>::after(filter), x, y);
    const Transform<Real> transform(size.plan);
    const bool both = needs_both(size, length);
    pad_rows(size, length, x);
    transform.from_rows(x, both, points_);
    transform.run(points_, Convolve<Real>{filter});
    transform.to_rows(points_, y, both);
  }

  void store_out(const Timeline time, const Span& channels) const {
    void* const out = f_.out;
    const Rows gate = p_.gate;
    const Real *const D = static_cast<const Real*>(p_.D), *const x = x_, *const y = y_;
    const int64_t width = p_.channels, next = row_numbers_;
    for_rows<T>(
        time, channels, [=](int64_t t, int64_t i, const Lanes<T>& columns) __attribute__((always_inline)) {
          const int64_t at = i * next + t * lanes;
          Vec<Real> v = load(y + at);
          if (D) v += columns.load(D) * load(x + at);
          if (gate.data) v *= columns.load(gate, time.row(t));
          columns.store(out, time.row(t), width, v);
        });
  }

  const LongConvForward& f_;
  const LongConvProblem& p_;
  int64_t vectors_, filter_numbers_, row_numbers_;  // numbers: of a vector's filter or rows
  Real *filters_, *x_, *y_, *points_;
};

}  // namespace packseq::PACKSEQ_ISA
