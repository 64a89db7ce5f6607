// exp(x l) for complex x and whole numbers l, in double and accurate for large l too: a product of x and l is kept in
// two parts, exact for l up to 2^22.
#pragma once
#include "core/cpu/complex.h"
#include "core/cpu/math.h"

namespace packseq::PACKSEQ_ISA {

// x times l as a sum of two numbers, the second below half an ulp of the first.
struct TwoPartProduct {
  Vec<double> high, low;

  PACKSEQ_INLINE TwoPartProduct(Vec<double> x, double l) {
    const Vec<double> first = (Vec<double>)(bits_of<double>(x) & ~((int64_t(1) << 22) - 1));
    const Vec<double> a = first * l, b = (x - first) * l;
    high = a + b;
    low = b - (high - a);
  }
};

// exp(high + low), and exp(...) - 1. Overflows and underflows where they do.
struct Exponential {
  Vec<double> value, minus_one;

  PACKSEQ_INLINE explicit Exponential(Vec<double> high, Vec<double> low = Vec<double>{}) {
    using C = Parts<double>;
    constexpr double most = 1400;  // 2^2020, as a product of two powers
    const Vec<double> x = max<double>(splat(-most), min<double>(splat(most), high));
    const Vec<double> n = (x * kLog2e + C::shifter) - C::shifter;
    const Vec<double> half = (n * 0.5 + C::shifter) - C::shifter;
    const Vec<double> rest = exp2_rest<double>((((x - n * C::ln2[0]) - n * C::ln2[1]) + low) * kLog2e);
    const Vec<double> a = Exp2Parts<double>(half).power, b = Exp2Parts<double>(n - half).power;
    value = (rest + 1.0) * a * b;
    minus_one = a * rest * b + (a * b - 1.0);
  }
};

PACKSEQ_INLINE Complex<Vec<double>> power(const Complex<Vec<double>>& x, double l) {
  const TwoPartProduct size(x.re, l), angle(x.im, l);
  const Vec<double> e = Exponential(size.high, size.low).value;
  const Circle<double> circle(angle.high);
  return {e * (circle.cos - angle.low * circle.sin), e * (circle.sin + angle.low * circle.cos)};
}

// exp(x) - 1, accurate for small x.
PACKSEQ_INLINE Complex<Vec<double>> exp_minus_one(const Complex<Vec<double>>& x) {
  const Exponential e(x.re);
  const Circle<double> half(x.im * 0.5);
  return {e.minus_one - 2.0 * e.value * half.sin * half.sin, 2.0 * e.value * half.sin * half.cos};
}

}  // namespace packseq::PACKSEQ_ISA
