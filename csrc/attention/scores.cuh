// From products q . k to what the softmax sees: softcap, ALiBi and the mask, for both directions and every chip.
#pragma once
#include <cfloat>
#include <cstdint>

#include "attention/mask.h"
#include "core/device/exp2.cuh"

namespace packseq {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// tanh to a relative 2e-6, which half types do not notice; the hardware's tanh.approx is good to 2^-11 only.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float e = exp2_approx(-2.0f * kLog2e * fabsf(x));
  const float big = __fdividef(1.0f - e, 1.0f + e);
  const float small = x * (1.0f + x * x * (-1.0f / 3 + x * x * (2.0f / 15)));
  return fabsf(x) < 0.05f ? small : copysignf(big, x);
}

// Scores in units of log 2: exp2(score(s)) is the softmax's numerator. Without softcap and ALiBi, and with a positive
// scale, that is one multiplication, which the exponential folds in (`factor`); otherwise transform() is run first.
struct Scores {
  float factor;      // left for the exponential to multiply with
  float scale;       // log2(e) * scale, or scale / softcap
  float cap;         // log2(e) * softcap; 0: none
  float slope;       // log2(e) * alibi_slope; 0: none
  bool transformed;  // whether transform() must be run

  __device__ Scores(const AttentionProblem& p, int head) {
    cap = float(p.softcap) * kLog2e;
    slope = p.alibi_slopes ? static_cast<const float*>(p.alibi_slopes)[head] * kLog2e : 0.0f;
    transformed = p.softcap != 0 || p.alibi_slopes || !(p.scale > 0);
    scale = p.softcap != 0 ? float(p.scale / p.softcap) : float(p.scale * 1.4426950408889634);
    factor = transformed ? 1.0f : scale;
  }

  // `distance` is |i' - j|.
  __device__ float transform(float s, int32_t distance) const {
    const float x = cap != 0 ? cap * tanh_accurate(s * scale) : s * scale;
    return x - slope * float(distance);
  }

  // d transform / ds, per unit of `scale * log2(e)`: 1 without softcap, else 1 - tanh^2.
  __device__ float derivative(float s) const {
    if (cap == 0) return 1.0f;
    const float t = tanh_accurate(s * scale);
    return 1.0f - t * t;
  }
};

}  // namespace packseq
