// Vectorised elementary functions, accurate to an ulp or two.
#pragma once
#include <cmath>

#include "core/cpu/vector.h"

namespace packseq::PACKSEQ_ISA {

constexpr double kLog2e = 1.4426950408889634074;

// (2^r - 1) / r for |r| <= 1/2: minimax polynomials, relative error 1.1e-8 and 1.8e-17.
template <class Real>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<float> {
  static constexpr float c[] = {0.693147187927f,   0.240226497949f,   0.0555035743334f,
                                0.00961823747755f, 0.00133907356328f, 0.000154035196748f};
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Exp2Polynomial<double> {
  static constexpr double c[] = {0.6931471805599453112,    0.2402265069591009788,    0.055504108664821235882,
                                 0.0096181291076070703607, 0.001333355814653188958,  0.00015403530441474036939,
                                 1.5252733700882154692e-5, 1.3215442727695009082e-6, 1.0178121466463365141e-7,
                                 7.0725611032379506663e-9, 4.4455087303650369662e-10};
  static constexpr int mantissa = 52, bias = 1023;
};

// 2^r - 1 for |r| <= 1/2.
template <class Real>
PACKSEQ_INLINE Vec<Real> exp2_rest(Vec<Real> r) {
  using P = Exp2Polynomial<Real>;
  constexpr int terms = sizeof(P::c) / sizeof(P::c[0]);
  Vec<Real> q = splat(P::c[terms - 1]);
  PACKSEQ_UNROLL
  for (int i = terms - 2; i >= 0; --i) q = q * r + P::c[i];
  return q * r;
}

// x = n + r with n whole and |r| <= 1/2: gives 2^n and 2^r - 1. x lies in [-bias, bias + 1], or is NaN.
template <class Real>
struct Exp2Parts {
  Vec<Real> power, rest;

  PACKSEQ_INLINE explicit Exp2Parts(Vec<Real> x) {
    const Vec<Real> shifted = x + shifter;
    set(shifted, x - (shifted - shifter));
  }

  // x = a b, which need not be rounded.
  PACKSEQ_INLINE Exp2Parts(Vec<Real> a, Vec<Real> b) {
    const Vec<Real> shifted = multiply_add(a, b, splat(shifter));
    set(shifted, multiply_subtract(a, b, shifted - shifter));
  }

 private:
  // Adding this rounds x to a whole number and leaves n + bias in the lowest bits.
  static constexpr Real shifter =
      Real(1.5) * Real(int64_t(1) << Exp2Polynomial<Real>::mantissa) + Real(Exp2Polynomial<Real>::bias);

  PACKSEQ_INLINE void set(Vec<Real> shifted, Vec<Real> r) {
    power = (Vec<Real>)(bits_of<Real>(shifted) << Exp2Polynomial<Real>::mantissa);
    rest = exp2_rest<Real>(r);
  }
};

// 2^x for x that is at most a little above 0; -inf and what would be denormal give 0.
template <class Real>
PACKSEQ_INLINE Vec<Real> exp2_down(Vec<Real> x) {
  const Exp2Parts<Real> parts(max<Real>(splat(Real(-Exp2Polynomial<Real>::bias)), x));
  return parts.power * parts.rest + parts.power;
}

// 2^x for any x.
template <class Real>
PACKSEQ_INLINE Vec<Real> exp2(Vec<Real> x) {
  constexpr int bias = Exp2Polynomial<Real>::bias;
  const Exp2Parts<Real> parts(max<Real>(splat(Real(-bias)), min<Real>(splat(Real(bias + 1)), x)));
  return (parts.rest + Real(1)) * parts.power;  // not as above: infinity times a rest of 0
}

// 2^(a b) for any a and b; where `bounded` it must be neither denormal nor infinite.
template <class Real>
PACKSEQ_INLINE Vec<Real> exp2_of_product(Vec<Real> a, Vec<Real> b, bool bounded) {
  constexpr int bias = Exp2Polynomial<Real>::bias;
  const Exp2Parts<Real> parts(a, b);
  const Vec<Real> result = (parts.rest + Real(1)) * parts.power;
  if (bounded) return result;
  const Vec<Real> x = a * b;
  return x < Real(-bias) ? Vec<Real>{} : x > Real(bias + 1) ? splat(Real(INFINITY)) : result;
}

// Small arguments keep their relative accuracy: tanh(x) = e / (e + 2) with e = exp(2 |x|) - 1.
template <class Real>
PACKSEQ_INLINE Vec<Real> tanh(Vec<Real> x) {
  constexpr Real saturated = sizeof(Real) == 4 ? 20 : 40;
  const Vec<Real> z = min<Real>(splat(saturated), abs<Real>(x) * Real(2));
  const Exp2Parts<Real> parts(z * Real(kLog2e));
  const Vec<Real> e = parts.power * parts.rest + (parts.power - Real(1));
  const Vec<Real> t = e / (e + Real(2));
  return x < Real(0) ? -t : t;
}

// Constants in parts, the first ones short: multiples of them by small whole numbers are exact.
template <class Real>
struct Parts;
template <>
struct Parts<float> {
  static constexpr float ln2[] = {0x1.62e4p-1f, 0x1.7f7d1cp-20f};
  static constexpr float half_pi[] = {0x1.92p+0f, 0x1.fb4p-12f, 0x1.4442dp-24f};
  static constexpr float shifter = 0x1.8p+23f;     // adding it rounds to a whole number
  static constexpr float largest_angle = 0x1p+13;  // up to which a multiple of half_pi's parts is exact
};
template <>
struct Parts<double> {
  static constexpr double ln2[] = {0x1.62e42fefa2p-1, 0x1.9ef35793c7673p-41};
  static constexpr double half_pi[] = {0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2e037073p-69};
  static constexpr double shifter = 0x1.8p+52;
  static constexpr double largest_angle = 0x1p+20;
};

// exp(x) for x <= 0, accurate by itself: x log2(e) would lose the last places of a large x. What would be denormal
// gives 0.
template <class Real>
PACKSEQ_INLINE Vec<Real> exp_down(Vec<Real> x) {
  constexpr Real lowest = Real(-Exp2Polynomial<Real>::bias / kLog2e);
  x = max<Real>(splat(lowest), x);
  const Vec<Real> n = (x * Real(kLog2e) + Parts<Real>::shifter) - Parts<Real>::shifter;
  const Vec<Real> r = (x - n * Parts<Real>::ln2[0]) - n * Parts<Real>::ln2[1];
  const Vec<Real> power = Exp2Parts<Real>(n).power;
  return power * exp2_rest<Real>(r * Real(kLog2e)) + power;
}

// (atanh(s) / s - 1) / s^2 for s <= 1/3, in powers of s^2: relative error of atanh 1.1e-10 and 1.2e-18.
template <class Real>
struct AtanhPolynomial;
template <>
struct AtanhPolynomial<float> {
  static constexpr float c[] = {0.333333377511f, 0.199994441151f, 0.143082997492f, 0.107153577409f, 0.121448203196f};
};
template <>
struct AtanhPolynomial<double> {
  static constexpr double c[] = {0.33333333333333154859,  0.2000000000007755664,   0.14285714274059183316,
                                 0.11111111976809121336,  0.090908722401561955842, 0.076932741806042103152,
                                 0.066505609266552098053, 0.060524703623370102024, 0.041724957027776166702,
                                 0.085048585312469867885};
};

// log(1 + x) for x in 0 .. 1.
template <class Real>
PACKSEQ_INLINE Vec<Real> log1p(Vec<Real> x) {
  using P = AtanhPolynomial<Real>;
  constexpr int terms = sizeof(P::c) / sizeof(P::c[0]);
  const Vec<Real> s = x / (x + Real(2)), square = s * s;
  Vec<Real> q = splat(P::c[terms - 1]);
  PACKSEQ_UNROLL
  for (int i = terms - 2; i >= 0; --i) q = q * square + P::c[i];
  const Vec<Real> twice = s + s;
  return twice * square * q + twice;
}

template <class Real>
PACKSEQ_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  const Vec<Real> e = exp_down<Real>(-abs<Real>(x)), r = Real(1) / (e + Real(1));
  return x < Real(0) ? e * r : r;
}

// log(1 + exp(x)), and x itself above torch's threshold of 20; with its derivative.
template <class Real>
struct Softplus {
  Vec<Real> value, slope;

  PACKSEQ_INLINE explicit Softplus(Vec<Real> x) {
    const Vec<Real> e = exp_down<Real>(-abs<Real>(x)), r = Real(1) / (e + Real(1)), rest = log1p<Real>(e);
    value = x > Real(20) ? x : x > Real(0) ? x + rest : rest;
    slope = x > Real(20) ? splat(Real(1)) : x < Real(0) ? e * r : r;
  }
};

// (sin(x) - x) / x^3 and (cos(x) - 1 + x^2 / 2) / x^4 for |x| <= pi / 4, in powers of x^2.
template <class Real>
struct CirclePolynomials;
template <>
struct CirclePolynomials<float> {
  static constexpr float sin[] = {-0.166666549371f, 0.00833217770923f, -0.000195172372371f};
  static constexpr float cos[] = {0.0416666468554f, -0.00138873669465f, 2.44383833375e-5f};
};
template <>
struct CirclePolynomials<double> {
  static constexpr double sin[] = {-0.16666666666666632023,  0.0083333333333224129583,  -0.00019841269829807361998,
                                   2.7557313691784893952e-6, -2.5050758096734106717e-8, 1.5896794677214020413e-10};
  static constexpr double cos[] = {0.041666666666666599476,   -0.001388888888887412396, 0.000024801587289482196123,
                                   -2.7557314352334959406e-7, 2.0875723273451810262e-9, -1.1359647813518770029e-11};
};

// The sine and the cosine of an angle.
template <class Real>
struct Circle {
  Vec<Real> sin, cos;

  PACKSEQ_INLINE explicit Circle(Vec<Real> angle) {
    using P = CirclePolynomials<Real>;
    using C = Parts<Real>;
    constexpr Real quarters = Real(0.63661977236758134308);
    const Vec<Real> shifted = angle * quarters + C::shifter, n = shifted - C::shifter;
    const Vec<Real> x = ((angle - n * C::half_pi[0]) - n * C::half_pi[1]) - n * C::half_pi[2], square = x * x;
    constexpr int terms = sizeof(P::sin) / sizeof(P::sin[0]);
    Vec<Real> s = splat(P::sin[terms - 1]), c = splat(P::cos[terms - 1]);
    PACKSEQ_UNROLL
    for (int i = terms - 2; i >= 0; --i) s = s * square + P::sin[i], c = c * square + P::cos[i];
    s = x * square * s + x;
    c = square * square * c + (Real(1) - Real(0.5) * square);
    // The lowest bits of `shifted` are the quarter turns.
    constexpr int sign = 8 * int(sizeof(Real)) - 2;
    const Vec<Int<Real>> turns = bits_of<Real>(shifted);
    const Vec<Int<Real>> odd = -(turns & 1);
    const Vec<Int<Real>> sin_bits = (odd & bits_of<Real>(c)) | (~odd & bits_of<Real>(s));
    const Vec<Int<Real>> cos_bits = (odd & bits_of<Real>(s)) | (~odd & bits_of<Real>(c));
    sin = (Vec<Real>)(sin_bits ^ ((turns & 2) << sign));
    cos = (Vec<Real>)(cos_bits ^ (((turns + 1) & 2) << sign));
    const Vec<Int<Real>> large = ~(abs<Real>(angle) <= C::largest_angle);
    if (any<Real>(large)) by_lane(angle);
  }

 private:
  // Angles beyond the parts' precision, infinities and NaN.
  __attribute__((noinline)) void by_lane(Vec<Real> angle) {
    for (int i = 0; i < kLanes<Real>; ++i) {
      if (__builtin_fabs(angle[i]) <= Parts<Real>::largest_angle) continue;
      sin[i] = Real(__builtin_sin(double(angle[i])));
      cos[i] = Real(__builtin_cos(double(angle[i])));
    }
  }
};

}  // namespace packseq::PACKSEQ_ISA
