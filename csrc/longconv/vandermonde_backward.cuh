// Sums of u[l] exp(x l) and u[l] l exp(x l) over all l, for every pole: the transpose, and what all gradients are
// made of.
//
// With l = kSpan a + b as in the forward, the inner sums over b are a product of real matrices, of u's spans and the
// table of exp(x b), and the outer sums over a are taken as each thread leaves the product:
//
//   R0[a] = sum over b of u[kSpan a + b] exp(x b)            S0 = sum over a of exp(x kSpan a) R0[a]
//   R1[a] = the same with weights b                          S1 = sum over a of exp(x kSpan a) (kSpan a R0[a] + R1[a])
//
// Complex u are two rows of the product, one its real and one its imaginary part. At 4 FMA a pole and token, 1,024
// filters of 16,384 points and 32 pairs take 72 us of an H200's FMA units.
#pragma once
#include "longconv/vandermonde_forward.cuh"

namespace packseq {

struct WeightedSums {
  const Complex* x;  // [rows, poles]
  const void* u;     // [groups, rows, length], real or complex
  float* partial;    // [tiles, groups, rows, poles, 4]: S0 and S1 of a tile; S1 only where it is wanted
  int64_t groups, rows, length;
  int poles;
  bool real, conjugate_u;
  int64_t tiles = 0;
  int pole_blocks = 0;
};

inline constexpr int kWeightedRows = 64, kWeightedPoles = 32;

inline int64_t weighted_tiles(bool real, int64_t length) {
  return divide_up(length, int64_t(kSpan) * kWeightedRows / (real ? 1 : 2));
}

namespace {

// A block: one filter, kWeightedRows rows of the product, kWeightedPoles poles. A thread: poles 2 * across + (0, 1),
// rows 8 * down + (0 .. 7).
template <bool kSlope>
__global__ void __launch_bounds__(kVandermondeThreads, 4)
    vandermonde_backward_kernel(const __grid_constant__ WeightedSums s) {
  constexpr int kStep = 32, kRows = 8, kPitch = kWeightedRows + 4;
  alignas(16) __shared__ float u_tile[kStep][kPitch];  // a column is a row of the product
  alignas(16) __shared__ Complex powers[kStep][kWeightedPoles];
  alignas(16) __shared__ float sums[kRows][kWeightedPoles][4];

  const int pole_block = int(blockIdx.x % s.pole_blocks), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x / s.pole_blocks % s.tiles, filter = blockIdx.x / s.pole_blocks / s.tiles;
  const int first_pole = pole_block * kWeightedPoles;
  const int64_t first_span = tile * (s.real ? kWeightedRows : kWeightedRows / 2);
  const Complex* const x = s.x + filter % s.rows * s.poles;
  const auto pole = [&](int i) { return first_pole + i < s.poles ? x[first_pole + i] : Complex{}; };
  const int across = threadIdx.x % 16, down = threadIdx.x / 16;

  const Complex x_of_table = pole(lane);
  Complex R0[kRows][2] = {}, R1[kRows][2] = {};
#pragma unroll 1
  for (int first = 0; first < kSpan; first += kStep) {
#pragma unroll
    for (int i = 0; i < kStep / 4; ++i) {
      powers[warp + 4 * i][lane] = times_power({1.0f, 0.0f}, power(x_of_table, float(first + warp + 4 * i)));
    }
#pragma unroll
    for (int i = 0; i < kWeightedRows / 16; ++i) {
      const int row = 4 * (warp + 4 * i);  // first of four
      float4 u = {};
      if (s.real) {
        const float* const from = static_cast<const float*>(s.u) + filter * s.length;
        const int64_t l = (first_span + row) * kSpan + first + lane;
        if (l < s.length) u.x = from[l];
        if (l + kSpan < s.length) u.y = from[l + kSpan];
        if (l + 2 * kSpan < s.length) u.z = from[l + 2 * kSpan];
        if (l + 3 * kSpan < s.length) u.w = from[l + 3 * kSpan];
      } else {
        const Complex* const from = static_cast<const Complex*>(s.u) + filter * s.length;
        const int64_t l = (first_span + row / 2) * kSpan + first + lane;
        const Complex a = l < s.length ? from[l] : Complex{};
        const Complex b = l + kSpan < s.length ? from[l + kSpan] : Complex{};
        const float sign = s.conjugate_u ? -1.0f : 1.0f;
        u = {a.re, sign * a.im, b.re, sign * b.im};
      }
      *reinterpret_cast<float4*>(&u_tile[lane][row]) = u;
    }
    __syncthreads();
#pragma unroll 2
    for (int b = 0; b < kStep; ++b) {
      const float4 e = *reinterpret_cast<const float4*>(&powers[b][2 * across]);
      const float4 u0 = *reinterpret_cast<const float4*>(&u_tile[b][8 * down]);
      const float4 u1 = *reinterpret_cast<const float4*>(&u_tile[b][8 * down + 4]);
      const float u[] = {u0.x, u0.y, u0.z, u0.w, u1.x, u1.y, u1.z, u1.w};
      const Complex weights[] = {{e.x, e.y}, {e.z, e.w}};
      const float at = float(first + b);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Complex slope = at * weights[k];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          R0[i][k].re = fmaf(u[i], weights[k].re, R0[i][k].re);
          R0[i][k].im = fmaf(u[i], weights[k].im, R0[i][k].im);
          if constexpr (kSlope) {
            R1[i][k].re = fmaf(u[i], slope.re, R1[i][k].re);
            R1[i][k].im = fmaf(u[i], slope.im, R1[i][k].im);
          }
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const Complex x_of_sums = pole(2 * across + k);
    Complex S0 = {}, S1 = {};
    const auto add = [&](int64_t span, Complex r0, Complex r1) {
      if (span * kSpan >= s.length) return;
      const float begin = float(span) * float(kSpan);
      const Complex e = times_power({1.0f, 0.0f}, power(x_of_sums, begin));
      S0 = S0 + e * r0;
      if constexpr (kSlope) S1 = S1 + e * (begin * r0 + r1);
    };
    if (s.real) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) add(first_span + 8 * down + i, R0[i][k], R1[i][k]);
    } else {
      const auto both = [](Complex re, Complex im) { return Complex{re.re - im.im, re.im + im.re}; };
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        add(first_span + 4 * down + i / 2, both(R0[i][k], R0[i + 1][k]), both(R1[i][k], R1[i + 1][k]));
      }
    }
    *reinterpret_cast<float4*>(sums[down][2 * across + k]) = float4{S0.re, S0.im, S1.re, S1.im};
  }
  __syncthreads();
  const int k = threadIdx.x / 4, part = threadIdx.x % 4;
  if (first_pole + k >= s.poles) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows; ++i) sum += sums[i][k][part];
  s.partial[((tile * s.groups * s.rows + filter) * s.poles + first_pole + k) * 4 + part] = sum;
}

}  // namespace

// Fills in how the work is cut.
inline void launch_weighted_sums(WeightedSums s, bool slope, cudaStream_t stream) {
  s.tiles = weighted_tiles(s.real, s.length);
  s.pole_blocks = (s.poles + kWeightedPoles - 1) / kWeightedPoles;
  launch("vandermonde backward", slope ? vandermonde_backward_kernel<true> : vandermonde_backward_kernel<false>,
         s.groups * s.rows * s.tiles * s.pole_blocks, kVandermondeThreads, 0, stream, s);
}

}  // namespace packseq
