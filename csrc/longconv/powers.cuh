// exp(x l) for whole numbers l to the last bit or two, however large the phase, and without overflow on the way.
//
// The product x l is taken exactly, as a float and its rounding error; its real part is cut into whole powers of two
// and a rest, its imaginary part into whole turns and a rest, with log2(e) and 1 / pi in two floats each.
#pragma once
#include <bit>
#include <cfloat>
#include <cstdint>

#include "core/device/complex.cuh"

namespace packseq {

// value 2^exponent, the value's size between 0.7 and 1.5.
struct ScaledComplex {
  Complex value;
  int exponent;
};

PACKSEQ_HOST_DEVICE float power_of_two(int k) { return std::bit_cast<float>(uint32_t(k + 127) << 23); }

// 2^t for |t| <= 1/2, to 1 ulp: the series to the seventh power, whose next term is below 2^-27.
PACKSEQ_HOST_DEVICE float exp2_series(float t) {
  constexpr float c[] = {0.693147181f,   0.240226507f,    0.0555041087f, 0.00961812911f,
                         0.00133335581f, 0.000154035304f, 1.52527338e-5f};
  float q = c[6];
  for (int i = 5; i >= 0; --i) q = fmaf(q, t, c[i]);
  return fmaf(q, t, 1.0f);
}

// l is a whole number that a float holds exactly.
PACKSEQ_HOST_DEVICE ScaledComplex power(Complex x, float l) {
  constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596303e-8f;
  constexpr float kPerPi = 0.318309873f, kPerPiRest = 1.28412765e-8f;
  float size = x.re * l, size_rest = fmaf(x.re, l, -size);
  if (fabsf(size) > 1e4f) size = copysignf(1e4f, size), size_rest = 0.0f;  // no float is as large; NaN stays
  const float exponent = rintf(size * kLog2e);
  const float t = fmaf(size, kLog2e, -exponent) + fmaf(size, kLog2eRest, size_rest * kLog2e);
  const float radius = exp2_series(t);

  const float phase = x.im * l, phase_rest = fmaf(x.im, l, -phase);
  const float turns = phase * kPerPi, whole = 2.0f * rintf(0.5f * turns);  // half turns, and an even number of them
  const float near = turns - whole;                                        // exact
  const float more = fmaf(phase, kPerPi, -turns) + fmaf(phase, kPerPiRest, phase_rest * kPerPi);
  const float angle = near + more, part = angle - near;
  const float angle_rest = 3.14159265f * ((near - (angle - part)) + (more - part));  // what the sum has rounded off
  float sine, cosine;
  sincospif(angle, &sine, &cosine);
  return {{radius * fmaf(-sine, angle_rest, cosine), radius * fmaf(cosine, angle_rest, sine)}, int(exponent)};
}

// factor a. Where `kHold`, what overflows is held at the largest float: a product with zero is then zero, one with more
// than one infinite, and a difference of two such never NaN.
template <bool kHold = true>
PACKSEQ_HOST_DEVICE Complex times_power(Complex factor, ScaledComplex a) {
  const int exponent = a.exponent < -250 ? -250 : a.exponent > 250 ? 250 : a.exponent;
  const float scale = power_of_two(exponent / 2), scale_too = power_of_two(exponent - exponent / 2);
  const Complex product = scale_too * (scale * (factor * a.value));
  if constexpr (!kHold) return product;
  const auto hold = [](float x) { return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x; };
  return {hold(product.re), hold(product.im)};
}

}  // namespace packseq
