// Rows of float16 and bfloat16 to and from float, a vector at a time; rows of float and double as they are.
#pragma once
#include "core/cpu/vector.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace packseq::PACKSEQ_ISA {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// The type that a tensor's elements are computed in.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

using HalfBits = typename VectorOf<uint16_t, kVectorBytes / 2>::type;
using Bits = Vec<uint32_t>;

PACKSEQ_INLINE Vec<float> widen(HalfBits h, Bfloat16) { return (Vec<float>)(__builtin_convertvector(h, Bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
PACKSEQ_INLINE HalfBits narrow(Vec<float> v, Bfloat16) {
  const Bits u = (Bits)v;
  const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, HalfBits);
}

#if defined(__AVX512F__)
PACKSEQ_INLINE Vec<float> widen(HalfBits h, Float16) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
PACKSEQ_INLINE HalfBits narrow(Vec<float> v, Float16) { return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0); }
#elif defined(__F16C__)
PACKSEQ_INLINE Vec<float> widen(HalfBits h, Float16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)h); }
PACKSEQ_INLINE HalfBits narrow(Vec<float> v, Float16) { return (HalfBits)_mm256_cvtps_ph((__m256)v, 0); }
#else
PACKSEQ_INLINE Vec<float> widen(HalfBits h, Float16) {
  const Bits u = __builtin_convertvector(h, Bits);
  const Bits magnitude = u & 0x7fffu;
  // Read as a float, the bits are 2^112 too small, denormals included.
  const Vec<float> finite = (Vec<float>)(magnitude << 13) * 0x1p112f;
  const Bits special = (magnitude << 13) | 0x7f800000u;
  return (Vec<float>)((magnitude >= 0x7c00u ? special : (Bits)finite) | ((u & 0x8000u) << 16));
}
PACKSEQ_INLINE HalfBits narrow(Vec<float> v, Float16) {
  const Bits sign = (Bits)v & 0x80000000u;
  const Bits u = (Bits)v ^ sign;
  const Bits normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const Bits denormal = (Bits)((Vec<float>)u + 0.5f) - 0x3f000000u;  // the addition rounds to the spacing of float16
  const Bits large = u > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits h = u >= 0x477ff000u ? large : u < 0x38800000u ? denormal : normal;
  return __builtin_convertvector(h | (sign >> 16), HalfBits);
}
#endif

template <class T>
PACKSEQ_INLINE Vec<float> load_real(const T* p) {
  HalfBits h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widen(h, T{});
}
PACKSEQ_INLINE Vec<float> load_real(const float* p) { return load(p); }
PACKSEQ_INLINE Vec<double> load_real(const double* p) { return load(p); }

template <class T>
PACKSEQ_INLINE void store_real(T* p, Vec<float> v) {
  const HalfBits h = narrow(v, T{});
  __builtin_memcpy(p, &h, sizeof(h));
}
PACKSEQ_INLINE void store_real(float* p, Vec<float> v) { store(p, v); }
PACKSEQ_INLINE void store_real(double* p, Vec<double> v) { store(p, v); }

// n elements into a row of `padded` ones (a whole number of vectors, or n); what lies beyond n becomes zero.
template <class T, class Real = typename RealOf<T>::type>
inline void load_row(const T* from, int64_t n, Real* to, int64_t padded) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(to + i, load_real(from + i));
  if (i == padded) return;
  T rest[lanes] = {};
  __builtin_memcpy(rest, from + i, (n - i) * sizeof(T));
  const Vec<Real> v = load_real(rest);
  __builtin_memcpy(to + i, &v, (padded - i) * sizeof(Real));
}

template <class T, class Real = typename RealOf<T>::type>
inline void store_row(const Real* from, int64_t n, T* to) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_real(to + i, load(from + i));
  if (i == n) return;
  Real rest[lanes] = {};
  T narrowed[lanes];
  __builtin_memcpy(rest, from + i, (n - i) * sizeof(Real));
  store_real(narrowed, load(rest));
  __builtin_memcpy(to + i, narrowed, (n - i) * sizeof(T));
}

}  // namespace packseq::PACKSEQ_ISA
