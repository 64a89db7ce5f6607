// Vectors of the width that this file is compiled for: the compiler's own vector types, so that one source serves
// every instruction set. Arithmetic, comparisons and `mask ? a : b` work on them as on scalars.
#pragma once
#include <cstdint>

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

template <class T>
PACKSEQ_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {  // b where either is NaN
  return a > b ? a : b;
}

template <class T>
PACKSEQ_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {  // b where either is NaN
  return a < b ? a : b;
}

template <class T>
PACKSEQ_INLINE Vec<T> abs(Vec<T> v) {
  constexpr Int<T> sign = Int<T>(1) << (8 * sizeof(T) - 1);
  return (Vec<T>)(bits_of<T>(v) & ~sign);
}

template <class T>
PACKSEQ_INLINE T sum(Vec<T> v) {  // in a fixed order
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

}  // namespace packseq::PACKSEQ_ISA
