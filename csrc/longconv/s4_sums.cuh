// What the kernels of S4's spectrum share: nodes, poles and the sums over them.
//
// At the frequency theta, with y = 2 sin(theta / 2) and e = cos(theta / 2), z = i y / e and 2 / (1 + o) is
// exp(i theta / 2) / e, so that
//
//   r(a, b) = e q(a, b),      q(a, b) = dt * sum over conjugate pairs of a b / (i y - dt w e)
//   out     = exp(i theta / 2) (q(B, C) - e q(P, C) (1 + e q(P, P^*))^-1 q(B, P^*)),
//
// which holds at theta = pi too. A pair's terms are together (n0 e + i n1 y) / D as in cauchy_forward.cuh, with w e for
// the pole: D = |W|^2 e^2 - y^2 + i c e y, W = dt w, c = -2 Re W. With R = Re D / |D|^2 and S = 1 / |D|^2 a sum is
//
//   e (sum of n0 R + y^2 sum of n1 c S) + i y (sum of n1 R - e^2 sum of n0 c S),
//
// products of matrices [nodes, poles] and [poles, terms], which tensor cores add up. R and S take 5 operations and a
// reciprocal a pole and node, and 8 more in two parts; the terms take none.
//
// Near its resonance a pole magnifies what is wrong with |W|^2, e^2 and y^2 by |W| / Re W, far more than the sums lose:
// none of the three is the square of a number that was rounded.
//
// dt and y are both taken kS4Scale times as large, which changes no quotient but keeps |D|^2 of slow poles in range.
#pragma once
#include "core/device/complex.cuh"
#include "core/device/exp2.cuh"
#include "core/device/split_mma.cuh"
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

struct S4Node {
  Complex half;  // exp(i theta / 2)
  float y, e2, y2;

  __device__ float e() const { return half.re; }
};

// The nodes theta = 2 pi j / length, j up to length / 2.
class S4Nodes {
 public:
  __device__ explicit S4Nodes(int64_t length) : length_(length), by_(1.0f / float(length)) {}

  __device__ __forceinline__ S4Node at(int64_t j) const {
    float turns, rest;  // j / length in two floats
    if (length_ <= int64_t(1) << 24) {
      turns = __fmul_rn(float(int(j)), by_);
      rest = fmaf(-turns, float(length_), float(int(j))) * by_;
    } else {
      const double exact = double(j) / double(length_);
      turns = float(exact), rest = float(exact - turns);
    }
    // pi x is the smaller of theta / 2 and pi / 2 - theta / 2; its sine in two floats.
    const bool late = turns > 0.25f;
    const float x = late ? 0.5f - turns : turns, x2 = x * x, pi_rest = kPi * (late ? -rest : rest);
    const float linear = __fmul_rn(kPi, x);
    const float cubic = x * x2 * fmaf(fmaf(-0.58941877f, x2, 2.5498052f), x2, -5.1677089f);
    const float more = cubic + (fmaf(kPi, x, -linear) + fmaf(-8.742278e-8f, x, pi_rest));
    const float sine = linear + more, low = (linear - sine) + more;
    const float sine2 = fmaf(sine, sine, 2.0f * sine * low), cosine2 = 1.0f - sine2;
    const float quadratic = fmaf(fmaf(fmaf(0.23136424f, x2, -1.3350506f), x2, 4.0587077f), x2, -4.9348021f);
    const float cosine = fmaf(quadratic, x2, fmaf(-pi_rest, sine, 1.0f));
    constexpr float kTwice = 2.0f * kS4Scale;
    if (late) return {{sine, cosine}, kTwice * cosine, sine2, kTwice * kTwice * cosine2};
    return {{cosine, sine}, kTwice * sine, cosine2, kTwice * kTwice * sine2};
  }

 private:
  static constexpr float kPi = 3.14159274f;
  int64_t length_;
  float by_;
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

// |W|^2, rounded once.
__device__ __forceinline__ float s4_square_of_size(const S4Call& s, int64_t channel, int n) {
  const Complex w = s.w[channel * s.poles + n];
  const double dt = kS4Scale * s.dt[channel], re = dt * w.re, im = dt * w.im;
  return float(re * re + im * im);
}

// Poles in shared memory, 32 at a time: |W|^2 and c^2, and the numerators as factors B of products over eight poles.
// Beyond the last pole numerators are 0.
template <int kRank, int kFilters>
struct S4Poles {
  using Terms = S4Terms<kRank, kFilters>;
  static constexpr int kPoles = 32, kSteps = kPoles / 8, kTiles = (Terms::kCount + 3) / 4;  // of four terms
  float2 pole[kPoles];
  uint4 by_real[kTiles][kSteps][32];     // n0[t], n1[t] at columns 2 t, 2 t + 1: times Re D / |D|^2
  uint4 by_inverse[kTiles][kSteps][32];  // n1[t] c, -n0[t] c: times 1 / |D|^2

  __device__ __forceinline__ void load(const S4Call& s, int64_t channel, int64_t first_filter, int first) {
    const int i = threadIdx.x;
    if (i >= kPoles) return;
    const bool there = first + i < s.poles;
    const Complex W = there ? kS4Scale * s.dt[channel] * s.w[channel * s.poles + first + i] : Complex{1.0f, 0.0f};
    const float c = -2.0f * W.re;
    pole[i] = {there ? s4_square_of_size(s, channel, first + i) : 1.0f, c * c};
    Complex v[Terms::kCount] = {};
    if (there) s4_numerators<kRank, kFilters>(s, channel, first_filter, first + i, v);
#pragma unroll
    for (int t = 0; t < 4 * kTiles; ++t) {
      const Complex of_term = t < Terms::kCount ? v[t < Terms::kCount ? t : 0] : Complex{};
      const float n0 = -2.0f * dot(W, of_term), n1 = 2.0f * of_term.re;
      const int column = t % 4 * 2;
      store_split(by_real[t / 4][i / 8], i % 8, column, n0);
      store_split(by_real[t / 4][i / 8], i % 8, column + 1, n1);
      store_split(by_inverse[t / 4][i / 8], i % 8, column, n1 * c);
      store_split(by_inverse[t / 4][i / 8], i % 8, column + 1, -n0 * c);
    }
  }
};

// The sums over poles at a block's nodes. A warp has 16 kRows nodes, and lane l owns node l % (16 kRows).
template <int kRank, int kFilters, int kRows>
struct S4Sums {
  using Poles = S4Poles<kRank, kFilters>;
  static constexpr int kCount = S4Terms<kRank, kFilters>::kCount, kNodes = 16 * kRows;
  static constexpr int kPitch = 36;  // of a term's nodes: four lanes of a row write to banks of their own
  Poles poles;
  float2 of_warp[kS4Threads / 32][4 * Poles::kTiles][kPitch];

  // q[t] of this thread's node. Every thread of the block takes part.
  __device__ __forceinline__ void at(const S4Call& s, int64_t channel, int64_t first_filter, const S4Node& node,
                                     int64_t& held, Complex (&q)[kCount]) {
    const int lane = threadIdx.x % 32, row = lane / 4, across = lane % 4;
    float e2[kRows][2], y2[kRows][2], ey2[kRows][2];
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        e2[m][h] = __shfl_sync(~0u, node.e2, 16 * m + 8 * h + row);
        y2[m][h] = __shfl_sync(~0u, node.y2, 16 * m + 8 * h + row);
        ey2[m][h] = e2[m][h] * y2[m][h];
      }
    float2(&mine)[4 * Poles::kTiles][kPitch] = of_warp[threadIdx.x / 32];
#pragma unroll
    for (int t = 0; t < kCount; ++t) q[t] = {};
    for (int first = 0; first < s.poles; first += Poles::kPoles) {
      if (const int64_t wanted = first_filter * s.poles + first; wanted != held) {
        __syncthreads();
        poles.load(s, channel, first_filter, first);
        __syncthreads();
        held = wanted;
      }
      SplitSum by_real[kRows][Poles::kTiles], by_inverse[kRows][Poles::kTiles];
      const int steps = (min(Poles::kPoles, s.poles - first) + 7) / 8;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const float4 two = *reinterpret_cast<const float4*>(&poles.pole[8 * step + 2 * across]);
        const float size[2] = {two.x, two.z}, c2[2] = {two.y, two.w};
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          float e[2][2], r[2][2];
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const float real = fmaf(size[k], e2[m][h], -y2[m][h]);
              r[h][k] = reciprocal_approx(fmaf(real, real, c2[k] * ey2[m][h]));
              e[h][k] = real * r[h][k];
            }
          const SplitRows of_e(e), of_r(r);
#pragma unroll
          for (int t = 0; t < Poles::kTiles; ++t) {
            by_real[m][t].add(of_e, poles.by_real[t][step][lane]);
            by_inverse[m][t].add(of_r, poles.by_inverse[t][step][lane]);
          }
        }
      }
      __syncwarp();
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int t = 0; t < Poles::kTiles; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const SplitSum &e = by_real[m][t], &r = by_inverse[m][t];
            mine[4 * t + across][16 * m + 8 * h + row] = {fmaf(y2[m][h], r[2 * h], e[2 * h]),
                                                          fmaf(e2[m][h], r[2 * h + 1], e[2 * h + 1])};
          }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const float2 sum = mine[t][lane % kNodes];
        q[t].re = fmaf(node.e(), sum.x, q[t].re);
        q[t].im = fmaf(node.y, sum.y, q[t].im);
      }
    }
  }
};

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
