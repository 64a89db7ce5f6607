// Fourier transforms of one vector of channels at once, for convolutions: every lane goes through the same steps, and
// nothing passes from one lane to another.
//
// A real sequence x of 2 M values is a polynomial; z[n] = x[n] + i x[n + M] is what remains of it modulo X^M - i. That
// is split by X^n - c = product over j of (X^(n/r) - c_j), c_j the r-th roots of c, pass by pass, down to polynomials
// of one value: x at the M roots of X^M = i. Products of these values, and the same passes back, give products modulo
// X^M - i, whose real and imaginary parts are the two halves of the real convolution modulo X^(2M) + 1: what runs
// over the end comes back with its sign changed. So M complex points convolve 2 M real values without a split into
// spectra of even and odd values, a block's factors are the same for all its points, and nobody needs the values in
// order. At |X| = 1, the conjugate of a real polynomial's value is its value at 1 / X: the one of x backwards.
//
// The passes go depth first, and down and up again within a block that fits the nearest cache.
#pragma once
#include <type_traits>

#include "core/cpu/complex.h"
#include "core/cpu/scratch.h"
#include "longconv/long_conv_kernels_cpu.h"

namespace packseq::PACKSEQ_ISA {

// A point is a vector of real parts and, behind it, one of imaginary parts.
template <class Real>
using Point = Complex<Vec<Real>>;

template <class Real>
PACKSEQ_INLINE Point<Real> load_point(const Real* p) {
  return load_complex(p, p + kLanes<Real>);
}

template <class Real>
PACKSEQ_INLINE void store_point(Real* p, const Point<Real>& v) {
  store_complex(p, p + kLanes<Real>, v);
}

template <class V>
using ElementOf = std::remove_cvref_t<decltype(V{}[0])>;

template <class V>
PACKSEQ_INLINE Complex<V> operator*(ElementOf<V> a, const Complex<V>& b) {
  return {a * b.re, a * b.im};
}

template <class V>
PACKSEQ_INLINE Complex<V> times_conjugate(const Complex<V>& a, const Complex<V>& b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}

// a + i b, and a - i b on the way back.
template <bool kBack, class V>
PACKSEQ_INLINE Complex<V> plus_turned(const Complex<V>& a, const Complex<V>& b) {
  if constexpr (kBack) return {a.re + b.im, a.im - b.re};
  return {a.re - b.im, a.im + b.re};
}

// v[j] becomes the sum over m of v[m] exp(2 pi i j m / radix), or exp(-...) on the way back.
template <bool kBack, class V>
PACKSEQ_INLINE void small_dft(Complex<V> (&v)[2]) {
  const Complex<V> a = v[0];
  v[0] = a + v[1];
  v[1] = a - v[1];
}

template <bool kBack, class V>
PACKSEQ_INLINE void small_dft(Complex<V> (&v)[3]) {
  using Real = ElementOf<V>;
  constexpr Real sin_third = Real(0.86602540378443864676);
  const Complex<V> sum = v[1] + v[2], turned = sin_third * (v[1] - v[2]);
  const Complex<V> middle = v[0] - Real(0.5) * sum;
  v[0] = v[0] + sum;
  v[1] = plus_turned<kBack>(middle, turned);
  v[2] = plus_turned<!kBack>(middle, turned);
}

template <bool kBack, class V>
PACKSEQ_INLINE void small_dft(Complex<V> (&v)[4]) {
  const Complex<V> even = v[0] + v[2], odd = v[1] + v[3], even_rest = v[0] - v[2], odd_rest = v[1] - v[3];
  v[0] = even + odd;
  v[1] = plus_turned<kBack>(even_rest, odd_rest);
  v[2] = even - odd;
  v[3] = plus_turned<!kBack>(even_rest, odd_rest);
}

template <bool kBack, class V>
PACKSEQ_INLINE void small_dft(Complex<V> (&v)[5]) {
  using Real = ElementOf<V>;
  constexpr Real cos1 = Real(0.30901699437494742410), cos2 = Real(-0.80901699437494742410);
  constexpr Real sin1 = Real(0.95105651629515357212), sin2 = Real(0.58778525229247312917);
  const Complex<V> sum1 = v[1] + v[4], rest1 = v[1] - v[4], sum2 = v[2] + v[3], rest2 = v[2] - v[3];
  const Complex<V> middle1 = v[0] + cos1 * sum1 + cos2 * sum2, turned1 = sin1 * rest1 + sin2 * rest2;
  const Complex<V> middle2 = v[0] + cos2 * sum1 + cos1 * sum2, turned2 = sin2 * rest1 - sin1 * rest2;
  v[0] = v[0] + sum1 + sum2;
  v[1] = plus_turned<kBack>(middle1, turned1);
  v[2] = plus_turned<kBack>(middle2, turned2);
  v[3] = plus_turned<!kBack>(middle2, turned2);
  v[4] = plus_turned<!kBack>(middle1, turned1);
}

template <int kRadix>
struct Radix {
  static constexpr int value = kRadix;
};

template <class F>
PACKSEQ_INLINE void with_radix(int radix, const F& f) {
  switch (radix) {
    case 2:
      return f(Radix<2>{});
    case 3:
      return f(Radix<3>{});
    case 4:
      return f(Radix<4>{});
    default:
      return f(Radix<5>{});
  }
}

// The step of one pass: `radix` values that stand for a block's parts 0, 1, ... become one value of each of its roots'
// blocks, and back. Both ways together multiply by the radix.
template <int kRadix, class Real>
struct Butterfly {
  Point<Real> factor[kRadix];  // powers of the root; the first, 1, is left out

  PACKSEQ_INLINE explicit Butterfly(const Real* factors) {
    PACKSEQ_UNROLL
    for (int m = 1; m < kRadix; ++m) factor[m] = {splat(factors[2 * m - 2]), splat(factors[2 * m - 1])};
  }

  PACKSEQ_INLINE void down(Point<Real> (&v)[kRadix]) const {
    PACKSEQ_UNROLL
    for (int m = 1; m < kRadix; ++m) v[m] = v[m] * factor[m];
    small_dft<false>(v);
  }

  PACKSEQ_INLINE void down_real(Point<Real> (&v)[kRadix]) const {  // only v.re holds something
    v[0].im = Vec<Real>{};
    PACKSEQ_UNROLL
    for (int m = 1; m < kRadix; ++m) v[m] = {v[m].re * factor[m].re, v[m].re * factor[m].im};
    small_dft<false>(v);
  }

  PACKSEQ_INLINE void up(Point<Real> (&v)[kRadix]) const {
    small_dft<true>(v);
    PACKSEQ_UNROLL
    for (int m = 1; m < kRadix; ++m) v[m] = times_conjugate(v[m], factor[m]);
  }
};

// Points, and rows, which are vectors of real values.
template <class Real>
class Transform {
 public:
  static constexpr int lanes = kLanes<Real>;
  static constexpr int64_t kPoint = 2 * lanes;  // numbers of a point

  explicit Transform(const FftPlan& plan) : plan_(plan) {}

  // The first pass. There are as many rows as points, or, with `both` halves, twice as many.
  void from_rows(const Real* rows, bool both, Real* points) const {
    with_radix(plan_.radix[0], [&](auto radix) {
      both ? first_pass<radix.value, true>(rows, points) : first_pass<radix.value, false>(rows, points);
    });
  }

  // The last pass, back to rows; they come back times the number of points.
  void to_rows(const Real* points, Real* rows, bool both) const {
    with_radix(plan_.radix[0], [&](auto radix) {
      both ? last_pass<radix.value, true>(points, rows) : last_pass<radix.value, false>(points, rows);
    });
  }

  // All other passes: down where Leaf::kDown, leaf(at, value) for each value, where `at` counts numbers from `points`
  // on, and up again where Leaf::kUp. The values are stored as the leaf leaves them where it does not go up.
  template <class Leaf>
  void run(Real* points, const Leaf& leaf) const {
    for (int j = 0; j < plan_.radix[0]; ++j) block(1, plan_.points / plan_.radix[0], j, points, leaf);
  }

 private:
  static constexpr int64_t kNear = 16 * 1024;  // bytes, with room for a spectrum's beside them

  template <int kRadix, bool kBoth>
  void first_pass(const Real* rows, Real* points) const {
    const int64_t part = plan_.points / kRadix;
    const Butterfly<kRadix, Real> butterfly(factors(0));
    for (int64_t i = 0; i < part; ++i) {
      Point<Real> v[kRadix];
      PACKSEQ_UNROLL
      for (int m = 0; m < kRadix; ++m) {
        v[m].re = load(rows + (m * part + i) * lanes);
        if constexpr (kBoth) v[m].im = load(rows + (plan_.points + m * part + i) * lanes);
      }
      if constexpr (kBoth) {
        butterfly.down(v);
      } else {
        butterfly.down_real(v);
      }
      PACKSEQ_UNROLL
      for (int m = 0; m < kRadix; ++m) store_point(points + (m * part + i) * kPoint, v[m]);
    }
  }

  template <int kRadix, bool kBoth>
  void last_pass(const Real* points, Real* rows) const {
    const int64_t part = plan_.points / kRadix;
    const Butterfly<kRadix, Real> butterfly(factors(0));
    for (int64_t i = 0; i < part; ++i) {
      Point<Real> v[kRadix];
      PACKSEQ_UNROLL
      for (int m = 0; m < kRadix; ++m) v[m] = load_point(points + (m * part + i) * kPoint);
      butterfly.up(v);
      PACKSEQ_UNROLL
      for (int m = 0; m < kRadix; ++m) {
        store(rows + (m * part + i) * lanes, v[m].re);
        if constexpr (kBoth) store(rows + (plan_.points + m * part + i) * lanes, v[m].im);
      }
    }
  }

  // A block of the level has `size` points.
  template <class Leaf>
  void block(int level, int64_t size, int64_t number, Real* points, const Leaf& leaf) const {
    if (size * kPoint * int64_t(sizeof(Real)) <= kNear) return near_block(level, size, number, points, leaf);
    const int radix = plan_.radix[level];
    if constexpr (Leaf::kDown) pass<false>(level, size, number, 1, points);
    for (int j = 0; j < radix; ++j) block(level + 1, size / radix, number * radix + j, points, leaf);
    if constexpr (Leaf::kUp) pass<true>(level, size, number, 1, points);
  }

  template <class Leaf>
  void near_block(int level, int64_t size, int64_t number, Real* points, const Leaf& leaf) const {
    const int first = level, last = plan_.levels - 1;
    int64_t blocks = 1;
    for (; level < last; ++level) {
      if constexpr (Leaf::kDown) pass<false>(level, size, number, blocks, points);
      const int radix = plan_.radix[level];
      size /= radix, number *= radix, blocks *= radix;
    }
    leaves(number, blocks, points, leaf);
    if constexpr (Leaf::kUp) {
      while (level-- > first) {
        const int radix = plan_.radix[level];
        size *= radix, number /= radix, blocks /= radix;
        pass<true>(level, size, number, blocks, points);
      }
    }
  }

  template <bool kBack>
  void pass(int level, int64_t size, int64_t number, int64_t blocks, Real* points) const {
    with_radix(plan_.radix[level], [&](auto radix) {
      pass_of<radix.value, kBack>(points + number * size * kPoint, size / radix.value, blocks,
                                  factors(level) + number * 2 * (radix.value - 1));
    });
  }

  template <int kRadix, bool kBack>
  static __attribute__((noinline)) void pass_of(Real* points, int64_t part, int64_t blocks, const Real* factors) {
    for (int64_t b = 0; b < blocks; ++b, factors += 2 * (kRadix - 1), points += kRadix * part * kPoint) {
      const Butterfly<kRadix, Real> butterfly(factors);
      for (int64_t i = 0; i < part; ++i) {
        Point<Real> v[kRadix];
        PACKSEQ_UNROLL
        for (int m = 0; m < kRadix; ++m) v[m] = load_point(points + (m * part + i) * kPoint);
        if constexpr (kBack) {
          butterfly.up(v);
        } else {
          butterfly.down(v);
        }
        PACKSEQ_UNROLL
        for (int m = 0; m < kRadix; ++m) store_point(points + (m * part + i) * kPoint, v[m]);
      }
    }
  }

  // Blocks of the last level, which are as large as its radix.
  template <class Leaf>
  void leaves(int64_t number, int64_t blocks, Real* points, const Leaf& leaf) const {
    constexpr int radix = FftPlan::kLastRadix;
    const Real* factor = factors(plan_.levels - 1) + number * 2 * (radix - 1);
    int64_t at = number * radix * kPoint;
    for (int64_t b = 0; b < blocks; ++b, factor += 2 * (radix - 1), at += radix * kPoint) {
      const Butterfly<radix, Real> butterfly(factor);
      Point<Real> v[radix];
      PACKSEQ_UNROLL
      for (int m = 0; m < radix; ++m) v[m] = load_point(points + at + m * kPoint);
      if constexpr (Leaf::kDown) butterfly.down(v);
      PACKSEQ_UNROLL
      for (int m = 0; m < radix; ++m) leaf(at + m * kPoint, v[m]);
      if constexpr (Leaf::kUp) butterfly.up(v);
      PACKSEQ_UNROLL
      for (int m = 0; m < radix; ++m) store_point(points + at + m * kPoint, v[m]);
    }
  }

  const Real* factors(int level) const { return static_cast<const Real*>(plan_.factors[level]); }

  const FftPlan& plan_;
};

}  // namespace packseq::PACKSEQ_ISA
