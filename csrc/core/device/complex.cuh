// Complex numbers of float32 in registers.
#pragma once
#include <cmath>

#include "core/packed.h"

namespace packseq {

struct alignas(8) Complex {
  float re, im;
};

PACKSEQ_HOST_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
PACKSEQ_HOST_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
PACKSEQ_HOST_DEVICE Complex operator-(Complex a) { return {-a.re, -a.im}; }
PACKSEQ_HOST_DEVICE Complex operator*(Complex a, Complex b) {
  return {fmaf(a.re, b.re, -a.im * b.im), fmaf(a.re, b.im, a.im * b.re)};
}
PACKSEQ_HOST_DEVICE Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }
PACKSEQ_HOST_DEVICE Complex conj(Complex a) { return {a.re, -a.im}; }

// The real part of conj(a) b.
PACKSEQ_HOST_DEVICE float dot(Complex a, Complex b) { return fmaf(a.re, b.re, a.im * b.im); }

// Right where |a| is between 1e-19 and 1e19.
PACKSEQ_HOST_DEVICE Complex reciprocal(Complex a) { return 1.0f / dot(a, a) * conj(a); }

}  // namespace packseq
