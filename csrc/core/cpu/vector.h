// Vectors of the width that this file is compiled for: the compiler's own vector types, so that one source serves
// every instruction set. Arithmetic, comparisons and `mask ? a : b` work on them as on scalars.
#pragma once
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef PACKSEQ_ISA
#define PACKSEQ_ISA baseline
#endif

#define PACKSEQ_INLINE inline __attribute__((always_inline))

#ifdef __clang__
#define PACKSEQ_UNROLL _Pragma("unroll")
#else
#define PACKSEQ_UNROLL _Pragma("GCC unroll 64")
#endif

namespace packseq::PACKSEQ_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class Real>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class Real>
using Int = typename IntOf<Real>::type;  // an integer as wide as Real; comparing Vec<Real> gives Vec<Int<Real>>

template <class T>
PACKSEQ_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
PACKSEQ_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
PACKSEQ_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
PACKSEQ_INLINE Vec<Int<T>> bits_of(Vec<T> v) {
  return (Vec<Int<T>>)v;
}

// One instruction each, which compilers do not always see in the comparison.
#if defined(__AVX512F__)
PACKSEQ_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_maskz_max_ps(0xffff, a, b); }
PACKSEQ_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_maskz_min_ps(0xffff, a, b); }
PACKSEQ_INLINE Vec<double> max_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_maskz_max_pd(0xff, a, b); }
PACKSEQ_INLINE Vec<double> min_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_maskz_min_pd(0xff, a, b); }
#elif defined(__AVX__)
PACKSEQ_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps(a, b); }
PACKSEQ_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps(a, b); }
PACKSEQ_INLINE Vec<double> max_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd(a, b); }
PACKSEQ_INLINE Vec<double> min_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_min_pd(a, b); }
#elif defined(__SSE2__)
PACKSEQ_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_max_ps(a, b); }
PACKSEQ_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm_min_ps(a, b); }
PACKSEQ_INLINE Vec<double> max_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_max_pd(a, b); }
PACKSEQ_INLINE Vec<double> min_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm_min_pd(a, b); }
#else
template <class V>
PACKSEQ_INLINE V max_of(V a, V b) {
  return a > b ? a : b;
}
template <class V>
PACKSEQ_INLINE V min_of(V a, V b) {
  return a < b ? a : b;
}
#endif

// a b + c and a b - c, rounded once where there is an instruction for it.
#if defined(__AVX512F__)
PACKSEQ_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
PACKSEQ_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
PACKSEQ_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
PACKSEQ_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
template <class V>
PACKSEQ_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif
template <class V>
PACKSEQ_INLINE V multiply_subtract(V a, V b, V c) {
  return multiply_add(a, b, -c);
}

template <class T>
PACKSEQ_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {  // b where either is NaN
  return max_of(a, b);
}

template <class T>
PACKSEQ_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {  // b where either is NaN
  return min_of(a, b);
}

template <class T>
PACKSEQ_INLINE Vec<T> abs(Vec<T> v) {
  constexpr Int<T> sign = Int<T>(1) << (8 * sizeof(T) - 1);
  return (Vec<T>)(bits_of<T>(v) & ~sign);
}

template <class T>
PACKSEQ_INLINE bool any(Vec<Int<T>> mask) {  // of lanes that are all bits or none, as comparisons give them
  constexpr int words = kVectorBytes / 8;
  const auto bits = (Vec<int64_t>)mask;
  int64_t seen = 0;
  for (int i = 0; i < words; ++i) seen |= bits[i];
  return seen != 0;
}

template <class T>
PACKSEQ_INLINE T sum(Vec<T> v) {  // in a fixed order
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

}  // namespace packseq::PACKSEQ_ISA
