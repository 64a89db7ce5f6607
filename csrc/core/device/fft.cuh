// Discrete Fourier transforms of a few complex numbers in registers, and the turns between them.
//
// Everything here is plain arithmetic of one thread. Loops are unrolled, so every index and every constant is known
// when it is compiled. kSign is -1 for the forward transform (exp(-2 pi i n k / size)), 1 for the inverse one, which
// is not scaled. Results are in natural order.
#pragma once
#include <cuda_runtime.h>

namespace packseq::fft {

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ __forceinline__ float2 operator*(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
__device__ __forceinline__ float2 operator*(float s, float2 a) { return {s * a.x, s * a.y}; }
__device__ __forceinline__ float2 conjugate(float2 a) { return {a.x, -a.y}; }
// a b + c, conj(a) b + c
__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, fmaf(-a.y, b.y, c.x)), fmaf(a.x, b.y, fmaf(a.y, b.x, c.y))};
}
__device__ __forceinline__ float2 conjugate_multiply_add(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, fmaf(a.y, b.y, c.x)), fmaf(a.x, b.y, fmaf(-a.y, b.x, c.y))};
}

// cos(2 pi e / 32) for e = 0 ... 8.
__device__ __forceinline__ float cosine32(int e) {
  switch (e) {
    case 0:
      return 1.0f;
    case 1:
      return 0.980785280403230449f;
    case 2:
      return 0.923879532511286756f;
    case 3:
      return 0.831469612302545237f;
    case 4:
      return 0.707106781186547524f;
    case 5:
      return 0.555570233019602225f;
    case 6:
      return 0.382683432365089772f;
    case 7:
      return 0.195090322016128268f;
    default:
      return 0.0f;
  }
}

// a exp(kSign 2 pi i e / 32), where e is known when it is compiled.
template <int kSign>
__device__ __forceinline__ float2 turn(float2 a, int e) {
  const int quarter = e / 8 % 4, r = e % 8;
  if (r == 4) {
    const float c = cosine32(4);
    a = kSign < 0 ? float2{c * (a.x + a.y), c * (a.y - a.x)} : float2{c * (a.x - a.y), c * (a.x + a.y)};
  } else if (r != 0) {
    a = a * float2{cosine32(r), kSign * cosine32(8 - r)};
  }
  switch (quarter) {
    case 0:
      return a;
    case 1:
      return {-kSign * a.y, kSign * a.x};
    case 2:
      return {-a.x, -a.y};
    default:
      return {kSign * a.y, -kSign * a.x};
  }
}

template <int kSign>
__device__ __forceinline__ void transform4(float2& a, float2& b, float2& c, float2& d) {
  const float2 s = a + c, t = a - c, u = b + d, v = turn<kSign>(b - d, 8);
  a = s + u, b = t + v, c = s - u, d = t - v;
}

// In place, of v[0], v[kStep], ...
template <int kSize, int kSign, int kStep = 1>
__device__ __forceinline__ void transform(float2* v) {
  static_assert(kSize == 1 || kSize == 2 || kSize == 4 || kSize == 8 || kSize == 16 || kSize == 32);
  if constexpr (kSize == 2) {
    const float2 s = v[0] + v[kStep];
    v[kStep] = v[0] - v[kStep];
    v[0] = s;
  } else if constexpr (kSize == 4) {
    transform4<kSign>(v[0], v[kStep], v[2 * kStep], v[3 * kStep]);
  } else if constexpr (kSize > 4) {
    // Over n = s + 4 r: first over r, giving p; then over s, giving q; the result is p + (kSize / 4) q.
    constexpr int kRows = kSize / 4;
#pragma unroll
    for (int s = 0; s < 4; ++s) transform<kRows, kSign, 4 * kStep>(v + s * kStep);
    float2 w[kSize];
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      float2 a[4];
#pragma unroll
      for (int s = 0; s < 4; ++s) a[s] = turn<kSign>(v[(s + 4 * p) * kStep], s * p * (32 / kSize));
      transform4<kSign>(a[0], a[1], a[2], a[3]);
#pragma unroll
      for (int q = 0; q < 4; ++q) w[p + kRows * q] = a[q];
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) v[k * kStep] = w[k];
  }
}

// As transform(), where the upper half of v counts as zero on entry.
template <int kSize, int kSign>
__device__ __forceinline__ void transform_lower_half(float2* v) {
  constexpr int kHalf = kSize / 2;
  float2 odd[kHalf];
#pragma unroll
  for (int n = 0; n < kHalf; ++n) odd[n] = turn<kSign>(v[n], n * (32 / kSize));
  transform<kHalf, kSign>(v);
  transform<kHalf, kSign>(odd);
#pragma unroll
  for (int k = kHalf - 1; k >= 0; --k) v[2 * k] = v[k], v[2 * k + 1] = odd[k];
}

// As transform(), of whose results only the lower half is wanted; the upper half of v is left as scratch.
template <int kSize, int kSign>
__device__ __forceinline__ void transform_to_lower_half(float2* v) {
  constexpr int kHalf = kSize / 2;
  float2 odd[kHalf];
#pragma unroll
  for (int n = 0; n < kHalf; ++n) odd[n] = v[2 * n + 1], v[n] = v[2 * n];
  transform<kHalf, kSign>(v);
  transform<kHalf, kSign>(odd);
#pragma unroll
  for (int k = 0; k < kHalf; ++k) v[k] = v[k] + turn<kSign>(odd[k], k * (32 / kSize));
}

// v[k] *= w^k for a root of unity w, or its conjugate where kSign is 1. powers[(k - 1) step] is w^k.
template <int kSize, int kSign>
__device__ __forceinline__ void multiply_powers(float2* v, const float2* powers, int step) {
#pragma unroll
  for (int k = 1; k < kSize; ++k) {
    const float2 w = powers[(k - 1) * step];
    v[k] = v[k] * (kSign < 0 ? w : conjugate(w));
  }
}

// The same where powers 1, 2, 3 and 4, 8, 12, ... are kept alone: the others are products of two, exact to two
// roundings.
__host__ __device__ constexpr int kept_powers(int size) { return 3 + size / 4 - 1; }
__host__ __device__ constexpr int kept_power(int i) { return i < 3 ? i + 1 : 4 * (i - 2); }

template <int kSize, int kSign>
__device__ __forceinline__ void multiply_products_of_powers(float2* v, const float2* kept, int step) {
  const auto power = [&](int i) {
    const float2 w = kept[i * step];
    return kSign < 0 ? w : conjugate(w);
  };
  float2 low[4];
#pragma unroll
  for (int k = 1; k < 4; ++k) low[k] = power(k - 1), v[k] = v[k] * low[k];
#pragma unroll
  for (int h = 1; h < kSize / 4; ++h) {
    const float2 high = power(h + 2);
    v[4 * h] = v[4 * h] * high;
#pragma unroll
    for (int k = 1; k < 4; ++k) v[4 * h + k] = v[4 * h + k] * (high * low[k]);
  }
}

}  // namespace packseq::fft
