// What the kernels of S4's spectrum share: nodes, poles and the sums over them.
//
// At the frequency theta, with y = 2 sin(theta / 2) and e = cos(theta / 2), z = i y / e and 2 / (1 + o) is
// exp(i theta / 2) / e, so that
//
//   r(a, b) = e q(a, b),      q(a, b) = dt * sum over conjugate pairs of a b / (i y - dt w e)
//   out     = exp(i theta / 2) (q(B, C) - e q(P, C) (1 + e q(P, P^*))^-1 q(B, P^*)),
//
// which holds at theta = pi too. A pair's terms are together (n0 e + i n1 y) / D as in cauchy_forward.cuh, with w e for
// the pole: D = (|W| e)^2 - y^2 + i c e y, W = dt w, c = -2 Re W. The denominator takes 7 operations, each sum 4 more.
//
// dt and y are both taken kScale times as large, which changes no quotient but keeps |D|^3 of slow poles in range.
#pragma once
#include "core/device/complex.cuh"
#include "core/device/exp2.cuh"
#include "core/launch.h"
#include "longconv/filters.h"

namespace packseq {

inline constexpr int kS4Threads = 128;
inline constexpr float kS4Scale = 4096.0f;

// The numerators that share a denominator, in this order: of q(B, C) for each filter, of q(B, conj(P[k])), of
// q(P[j], C) for each filter, of q(conj(P[j]), P[k]) at j * kRank + k.
template <int kRank, int kFilters>
struct S4Terms {
  static constexpr int kLeft = kFilters, kRight = kLeft + kRank, kInner = kRight + kFilters * kRank;
  static constexpr int kCount = kInner + kRank * kRank;
  static PACKSEQ_HOST_DEVICE int of_output(int f) { return f; }
  static PACKSEQ_HOST_DEVICE int of_left(int k) { return kLeft + k; }
  static PACKSEQ_HOST_DEVICE int of_right(int f, int j) { return kRight + f * kRank + j; }
  static PACKSEQ_HOST_DEVICE int of_inner(int j, int k) { return kInner + j * kRank + k; }
};

struct S4Call {
  const Complex *w, *P, *B, *C;
  const float* dt;
  int64_t filters, channels, length;
  int poles;

  PACKSEQ_HOST_DEVICE int64_t frequencies() const { return length / 2 + 1; }
  PACKSEQ_HOST_DEVICE Complex column(int k, int64_t channel, int n) const {
    return P[(k * channels + channel) * poles + n];
  }
};

// exp(i theta / 2) at theta = 2 pi j / length, to the last bit or two: j / length in two floats.
PACKSEQ_HOST_DEVICE Complex half_turn(int64_t j, int64_t length) {
  float turns, rest;
  if (length <= int64_t(1) << 24) {
    turns = float(j) / float(length);
    rest = fmaf(-turns, float(length), float(j)) / float(length);
  } else {
    const double exact = double(j) / double(length);
    turns = float(exact), rest = float(exact - turns);
  }
  float sine, cosine;
  sincospif(turns, &sine, &cosine);
  rest *= 3.14159265f;
  return {fmaf(-sine, rest, cosine), fmaf(cosine, rest, sine)};
}

struct S4Node {
  float y, e, e2, y2;

  PACKSEQ_HOST_DEVICE static S4Node at(Complex half) {
    const float y = 2.0f * kS4Scale * half.im;
    return {y, half.re, half.re * half.re, y * y};
  }
};

namespace {

// Numerators of a pole of a channel, times the scaled dt.
template <int kRank, int kFilters>
__device__ __forceinline__ void s4_numerators(const S4Call& s, int64_t channel, int64_t first_filter, int n,
                                              Complex (&v)[S4Terms<kRank, kFilters>::kCount]) {
  using Terms = S4Terms<kRank, kFilters>;
  const float dt = kS4Scale * s.dt[channel];
  const Complex B = dt * s.B[channel * s.poles + n];
  Complex P[kRank + 1];
#pragma unroll
  for (int k = 0; k < kRank; ++k) P[k] = s.column(k, channel, n);
#pragma unroll
  for (int f = 0; f < kFilters; ++f) {
    const int64_t filter = first_filter + f;
    const Complex C = filter < s.filters ? s.C[(filter * s.channels + channel) * s.poles + n] : Complex{};
    v[Terms::of_output(f)] = B * C;
#pragma unroll
    for (int j = 0; j < kRank; ++j) v[Terms::of_right(f, j)] = dt * (P[j] * C);
  }
#pragma unroll
  for (int j = 0; j < kRank; ++j) {
    v[Terms::of_left(j)] = B * conj(P[j]);
#pragma unroll
    for (int k = 0; k < kRank; ++k) v[Terms::of_inner(j, k)] = dt * (conj(P[j]) * P[k]);
  }
}

// Some poles in shared memory, with the numerators from kFirst on.
template <int kRank, int kFilters, int kFirst>
struct S4Poles {
  using Terms = S4Terms<kRank, kFilters>;
  static constexpr int kPoles = 32, kCount = Terms::kCount - kFirst;
  float2 pole[kPoles];  // Im W, (Re W)^2
  float4 numerator[kPoles][kCount];

  __device__ __forceinline__ void load(const S4Call& s, int64_t channel, int64_t first_filter, int first, int count) {
    for (int i = threadIdx.x; i < count; i += kS4Threads) {
      const Complex W = kS4Scale * s.dt[channel] * s.w[channel * s.poles + first + i];
      const float c = -2.0f * W.re;
      pole[i] = {W.im, W.re * W.re};
      Complex v[Terms::kCount];
      s4_numerators<kRank, kFilters>(s, channel, first_filter, first + i, v);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const float n0 = -2.0f * dot(W, v[kFirst + t]), n1 = 2.0f * v[kFirst + t].re;
        numerator[i][t] = {n0, n1, n0 * c, n1 * c};
      }
    }
  }
};

// q[i][t] = the sum of term kFirst + t over a channel's poles at node i. Every thread of the block takes part.
template <int kRank, int kFilters, int kNodes, class Poles>
__device__ __forceinline__ void s4_sums(const S4Call& s, Poles& poles, int64_t channel, int64_t first_filter,
                                        const S4Node (&node)[kNodes], Complex (&q)[kNodes][Poles::kCount]) {
  constexpr int kCount = Poles::kCount;
#pragma unroll
  for (int i = 0; i < kNodes; ++i)
#pragma unroll
    for (int t = 0; t < kCount; ++t) q[i][t] = {};
  for (int first = 0; first < s.poles; first += Poles::kPoles) {
    const int count = min(Poles::kPoles, s.poles - first);
    __syncthreads();
    poles.load(s, channel, first_filter, first, count);
    __syncthreads();
    float sums[kNodes][kCount][4] = {};
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      const float2 pole = poles.pole[n];
      float e[kNodes], r[kNodes];
#pragma unroll
      for (int i = 0; i < kNodes; ++i) {
        const float square = pole.y * node[i].e2;
        const float real = fmaf(fmaf(pole.x, node[i].e, -node[i].y), fmaf(pole.x, node[i].e, node[i].y), square);
        r[i] = reciprocal_approx(fmaf(square, 4.0f * node[i].y2, real * real));
        e[i] = real * r[i];
      }
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const float4 numerator = poles.numerator[n][t];
#pragma unroll
        for (int i = 0; i < kNodes; ++i) {
          sums[i][t][0] = fmaf(numerator.x, e[i], sums[i][t][0]);
          sums[i][t][1] = fmaf(numerator.w, r[i], sums[i][t][1]);
          sums[i][t][2] = fmaf(numerator.y, e[i], sums[i][t][2]);
          sums[i][t][3] = fmaf(numerator.z, r[i], sums[i][t][3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kNodes; ++i)
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const float* const x = sums[i][t];
        q[i][t].re = fmaf(node[i].e, fmaf(node[i].y2, x[1], x[0]), q[i][t].re);
        q[i][t].im = fmaf(node[i].y, fmaf(-node[i].e2, x[3], x[2]), q[i][t].im);
      }
  }
}

}  // namespace

// (1 + e Q)^-1, where Q[j * kRank + k] stands for row j, column k.
template <int kRank>
PACKSEQ_HOST_DEVICE void s4_inverse(const Complex* Q, float e, Complex (&M)[kRank * kRank]) {
  if constexpr (kRank == 1) {
    M[0] = reciprocal(Complex{1.0f, 0.0f} + e * Q[0]);
  } else {
    const Complex a = Complex{1.0f, 0.0f} + e * Q[0], b = e * Q[1], c = e * Q[2], d = Complex{1.0f, 0.0f} + e * Q[3];
    const Complex by = reciprocal(a * d - b * c);
    M[0] = by * d, M[1] = -(by * b), M[2] = -(by * c), M[3] = by * a;
  }
}

}  // namespace packseq
