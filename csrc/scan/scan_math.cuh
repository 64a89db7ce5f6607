// The scan's arithmetic on one number: real and complex states through the same names.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/device/exp2.cuh"
#include "core/device/guarded_access.cuh"
#include "core/dtype.h"
#include "scan/scan_kernels.h"

namespace packseq {

inline constexpr float kScanLog2e = 1.44269504089f, kScanLn2 = 0.69314718056f;

// ---- State arithmetic ----------------------------------------------------------------------------------------------
// A state's A is held in the units that decay() takes: of log 2 where it is real, as it is where it is complex.

__device__ __forceinline__ float to_exponent(float A) { return A * kScanLog2e; }
__device__ __forceinline__ Complex to_exponent(Complex A) { return A; }

// exp(x), with the rounding error of x log2(e) put right, which for large |x| would be the result's.
__device__ __forceinline__ float exp_exact(float x) {
  const float t = x * kScanLog2e, e = exp2_approx(t);
  const float rest = fmaf(x, 1.9259629911e-8f, fmaf(x, kScanLog2e, -t));    // log2(e) in two parts
  return select(e > 0.0f && e < INFINITY, fmaf(e, rest * kScanLn2, e), e);  // where t is infinite, rest is NaN
}

// exp(d A)
__device__ __forceinline__ float decay(float d, float A) { return exp2_approx(d * A); }
__device__ __forceinline__ Complex decay(float d, Complex A) {
  // The phase in half turns, less whole turns, with its rounding error put right: exact products, 1 / pi in two parts.
  const float phase = d * A.im, turns = phase * 0.318309886184f;
  const float rest = fmaf(phase, 1.28412767e-8f, fmaf(phase, 0.318309886184f, -turns));
  float sine, cosine;
  sincospif(fmaf(-2.0f, rintf(0.5f * turns), turns) + rest, &sine, &cosine);
  const float size = exp_exact(d * A.re);
  return {size * cosine, size * sine};
}

// a b + c
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ Complex multiply_add(Complex a, Complex b, Complex c) {
  return {fmaf(a.re, b.re, fmaf(-a.im, b.im, c.re)), fmaf(a.re, b.im, fmaf(a.im, b.re, c.im))};
}
__device__ __forceinline__ Complex multiply_add(float a, Complex b, Complex c) {
  return {fmaf(a, b.re, c.re), fmaf(a, b.im, c.im)};
}

__device__ __forceinline__ float scaled(float a, float x) { return a * x; }
__device__ __forceinline__ Complex scaled(float a, Complex x) { return {a * x.re, a * x.im}; }

// a conj(b)
__device__ __forceinline__ float times_conjugate(float a, float b) { return a * b; }
__device__ __forceinline__ Complex times_conjugate(Complex a, Complex b) {
  return {fmaf(a.re, b.re, a.im * b.im), fmaf(a.im, b.re, -a.re * b.im)};
}

__device__ __forceinline__ float conjugate(float a) { return a; }
__device__ __forceinline__ Complex conjugate(Complex a) { return {a.re, -a.im}; }

// The real part of a b, of a conj(b); plus c.
__device__ __forceinline__ float add_product(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ float add_product(Complex a, Complex b, float c) {
  return fmaf(a.re, b.re, fmaf(-a.im, b.im, c));
}
__device__ __forceinline__ float add_conjugate_product(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ float add_conjugate_product(Complex a, Complex b, float c) {
  return fmaf(a.re, b.re, fmaf(a.im, b.im, c));
}

// The real part of x conj(A) / ln 2 plus c, where A is in decay()'s units.
__device__ __forceinline__ float add_exponent_product(float x, float A, float c) { return fmaf(x, A, c); }
__device__ __forceinline__ float add_exponent_product(Complex x, Complex A, float c) {
  return fmaf(x.re * kScanLog2e, A.re, fmaf(x.im * kScanLog2e, A.im, c));
}

// y is twice the real part of a sum of C h where states are complex: C is doubled as it is read.
template <class X>
inline constexpr float kOutputFactor = 1.0f;
template <>
inline constexpr float kOutputFactor<Complex> = 2.0f;

// ---- Functions of one channel of one token -------------------------------------------------------------------------

// exp(-|x|), exactly or by one special function.
template <bool kExact>
__device__ __forceinline__ float exp_minus(float x) {
  return kExact ? exp_exact(-fabsf(x)) : exp2_approx(-fabsf(x) * kScanLog2e);
}

// log(1 + exp(x)), or x itself where it is not `soft`. log(1 + e) / e on [0, 1] is a minimax polynomial, relative error
// 3e-8. A chain of a dozen instructions, in parts that can stand among other work.
inline constexpr int kSoftplusParts = 4;

template <bool kExact>
class SoftplusParts {
 public:
  __device__ __forceinline__ void start(float x) { x_ = x; }
  // Parts 0 ... kSoftplusParts - 1, in this order; `part` is known to the compiler.
  __device__ __forceinline__ void run(int part) {
    constexpr float kCoefficients[] = {0.999999969879f,  -0.499994931393f,  0.33319096784f,
                                       -0.248429820265f, 0.191060060288f,   -0.136632442389f,
                                       0.0782259330353f, -0.0295052275181f, 0.00523269145476f};
    if (part == 0) {
      e_ = exp_minus<kExact>(x_);
      q_ = kCoefficients[8];
      return;
    }
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      const int part_of = i > 4 ? 1 : i > 1 ? 2 : 3;
      if (part_of == part) q_ = fmaf(q_, e_, kCoefficients[i]);
    }
  }
  // Beyond 20 the sum is x.
  __device__ __forceinline__ float value(bool soft) const { return select(soft, fmaf(q_, e_, fmaxf(x_, 0.0f)), x_); }
  __device__ __forceinline__ float slope(bool soft) const {
    const float r = reciprocal_approx(1.0f + e_);
    return select(soft, select(x_ < 0.0f, e_ * r, r), 1.0f);
  }

 private:
  float x_, e_, q_;
};

template <bool kExact>
__device__ __forceinline__ float softplus(float x, bool soft) {
  SoftplusParts<kExact> y;
  y.start(x);
#pragma unroll
  for (int part = 0; part < kSoftplusParts; ++part) y.run(part);
  return y.value(soft);
}

// ---- Elements ------------------------------------------------------------------------------------------------------

template <class T, int kCount>
struct alignas(sizeof(T) * kCount <= 16 ? sizeof(T) * kCount : 16) Few {
  T x[kCount];
};

__device__ __forceinline__ float bf16_bits_to_float(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }

// How elements of type T are held between being loaded and being used.
template <class T>
struct Element {  // half types
  using Bits = uint16_t;
  static constexpr bool kExact = false;
  static __device__ __forceinline__ int bytes(Dtype) { return 2; }
  static __device__ __forceinline__ Bits load(const void* p, Dtype) { return *static_cast<const uint16_t*>(p); }
  static __device__ __forceinline__ float value(Bits x) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(x));
    return bf16_bits_to_float(x);
  }
  static __device__ __forceinline__ Bits bits(float x) {
    if constexpr (std::is_same_v<T, __half>) return __half_as_ushort(__float2half_rn(x));
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ void store(void* p, Bits x, Dtype) { *static_cast<uint16_t*>(p) = x; }
};

template <>
struct Element<float> {
  using Bits = float;
  static constexpr bool kExact = true;
  static __device__ __forceinline__ int bytes(Dtype) { return 4; }
  static __device__ __forceinline__ Bits load(const void* p, Dtype) { return *static_cast<const float*>(p); }
  static __device__ __forceinline__ float value(Bits x) { return x; }
  static __device__ __forceinline__ Bits bits(float x) { return x; }
  static __device__ __forceinline__ void store(void* p, Bits x, Dtype) { *static_cast<float*>(p) = x; }
};

template <>
struct Element<AnyType> {
  using Bits = float;
  static constexpr bool kExact = true;
  static __device__ __forceinline__ int bytes(Dtype t) { return t == Dtype::f32 ? 4 : 2; }
  static __device__ __forceinline__ Bits load(const void* p, Dtype t) {
    if (t == Dtype::f32) return *static_cast<const float*>(p);
    const uint16_t x = *static_cast<const uint16_t*>(p);
    return t == Dtype::f16 ? __half2float(__ushort_as_half(x)) : bf16_bits_to_float(x);
  }
  static __device__ __forceinline__ float value(Bits x) { return x; }
  static __device__ __forceinline__ Bits bits(float x) { return x; }
  static __device__ __forceinline__ void store(void* p, Bits x, Dtype t) {
    if (t == Dtype::f32) {
      *static_cast<float*>(p) = x;
    } else {
      *static_cast<uint16_t*>(p) =
          t == Dtype::f16 ? __half_as_ushort(__float2half_rn(x)) : __bfloat16_as_ushort(__float2bfloat16_rn(x));
    }
  }
};

}  // namespace packseq
