// Complex numbers in the CPU kernels: pairs (real, imaginary) in memory, rows or vectors of either part in between.
#pragma once
#include "core/cpu/vector.h"

namespace packseq::PACKSEQ_ISA {

template <class V>
struct Complex {
  V re, im;
};

template <class V>
PACKSEQ_INLINE Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class V>
PACKSEQ_INLINE Complex<V> operator-(const Complex<V>& a, const Complex<V>& b) {
  return {a.re - b.re, a.im - b.im};
}
template <class V>
PACKSEQ_INLINE Complex<V> operator*(const Complex<V>& a, const Complex<V>& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class V>
PACKSEQ_INLINE Complex<V> scaled(const Complex<V>& a, V by) {
  return {a.re * by, a.im * by};
}
template <class V>
PACKSEQ_INLINE Complex<V> conj(const Complex<V>& a) {
  return {a.re, -a.im};
}
template <class V>
PACKSEQ_INLINE V real_product(const Complex<V>& a, const Complex<V>& b) {  // the real part of conj(a) b
  return a.re * b.re + a.im * b.im;
}
template <class V>
PACKSEQ_INLINE Complex<V> inverse(const Complex<V>& a) {
  const V square = a.re * a.re + a.im * a.im;
  return {a.re / square, -(a.im / square)};
}

template <class Real>
PACKSEQ_INLINE Complex<Vec<Real>> load_complex(const Real* re, const Real* im) {
  return {load(re), load(im)};
}
template <class Real>
PACKSEQ_INLINE void store_complex(Real* re, Real* im, const Complex<Vec<Real>>& x) {
  store(re, x.re);
  store(im, x.im);
}

// n pairs to two rows and back, perhaps in another type.
template <class From, class To>
PACKSEQ_INLINE void split(const From* pairs, int64_t n, To* re, To* im) {
  for (int64_t i = 0; i < n; ++i) re[i] = To(pairs[2 * i]), im[i] = To(pairs[2 * i + 1]);
}
template <class From, class To>
PACKSEQ_INLINE void merge(const From* re, const From* im, int64_t n, To* pairs) {
  for (int64_t i = 0; i < n; ++i) pairs[2 * i] = To(re[i]), pairs[2 * i + 1] = To(im[i]);
}

// A vector of doubles from and to numbers of either type.
template <class T, int kCount>
using Some = typename VectorOf<T, kCount* int(sizeof(T))>::type;

PACKSEQ_INLINE Vec<double> load_wide(const double* p) { return load(p); }
PACKSEQ_INLINE Vec<double> load_wide(const float* p) {
  Some<float, kLanes<double>> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<double>);
}
PACKSEQ_INLINE void store_narrow(double* p, Vec<double> v) { store(p, v); }
PACKSEQ_INLINE void store_narrow(float* p, Vec<double> v) {
  const auto narrow = __builtin_convertvector(v, Some<float, kLanes<double>>);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

}  // namespace packseq::PACKSEQ_ISA
