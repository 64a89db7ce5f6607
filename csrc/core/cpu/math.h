// Vectorised exp2 and tanh, accurate to an ulp or two.
#pragma once
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

// x = n + r with n whole and |r| <= 1/2: gives 2^n and 2^r - 1. x lies in [-bias, bias + 1], or is NaN.
template <class Real>
struct Exp2Parts {
  Vec<Real> power, rest;

  PACKSEQ_INLINE explicit Exp2Parts(Vec<Real> x) {
    using P = Exp2Polynomial<Real>;
    // Adding this rounds x to a whole number and leaves n + bias in the lowest bits.
    constexpr Real shifter = Real(1.5) * Real(int64_t(1) << P::mantissa) + Real(P::bias);
    const Vec<Real> shifted = x + shifter;
    const Vec<Real> r = x - (shifted - shifter);
    power = (Vec<Real>)(bits_of<Real>(shifted) << P::mantissa);
    constexpr int terms = sizeof(P::c) / sizeof(P::c[0]);
    Vec<Real> q = splat(P::c[terms - 1]);
    PACKSEQ_UNROLL
    for (int i = terms - 2; i >= 0; --i) q = q * r + P::c[i];
    rest = q * r;
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

}  // namespace packseq::PACKSEQ_ISA
