// Sums of v exp(x l) over the poles, for all l.
//
// With l = kSpan a + b, exp(x l) = exp(x kSpan a) exp(x b): a product of two small tables, and the sum over the poles
// of
//
//   Re(v exp(x l)) = P[a] Re exp(x b) + Q[a] Im exp(x b),        P + i Q = conj(v exp(x kSpan a))
//
// a product of real matrices whose inner dimension is twice the poles. Complex results are twice the rows, of which
// odd ones hold the imaginary part. At 2 FMA a pole and result, 1,024 filters of 16,384 points from 32 pairs take 36 us
// of an H200's FMA units; the tables, 1 / 40 of the results by number and 50 instructions each, about as much again.
#pragma once
#include "core/divide_up.h"
#include "core/launch.h"
#include "longconv/filters.h"
#include "longconv/powers.cuh"

namespace packseq {

inline constexpr int kSpan = 128;  // also of the backward
inline constexpr int kVandermondeThreads = 128;
inline constexpr int kPolesOfSum = 32;  // more are added up by so many: a sum of all would round a thousand times

struct PowerSums {
  const Complex* x;  // [rows, poles]
  const Complex* v;  // [groups, rows, poles]
  void* out;         // [groups, rows, length], real or complex
  int64_t rows, length;
  int poles;
  bool real;
  float factor;  // v's
  bool conjugate_v = false, conjugate_out = false;
  int64_t tiles = 0;           // of rows of a filter
  bool whole_vectors = false;  // results can be written 16 bytes at a time
};

namespace {

struct PowerSumsTile {
  static constexpr int kRows = 64, kPoles = 16;  // rows of the product; poles a step
  alignas(16) float P[kPoles][kRows], Q[kPoles][kRows];
  alignas(16) float re[kPoles][kSpan], im[kPoles][kSpan];  // of 2 exp(x b): what is just below overflow in P stays so

  // The tables of poles `first` ... of filter `group`, `row`. Beyond the last pole they are zeros.
  __device__ __forceinline__ void fill(const PowerSums& s, int64_t group, int64_t row, int64_t first_span, int first) {
    const Complex* const x = s.x + row * s.poles;
    const Complex* const v = s.v + (group * s.rows + row) * s.poles;
    for (int i = threadIdx.x; i < kPoles * kSpan; i += kVandermondeThreads) {
      const int k = i / kSpan, b = i % kSpan;
      const Complex e = first + k < s.poles ? times_power({2.0f, 0.0f}, power(x[first + k], float(b))) : Complex{};
      re[k][b] = e.re, im[k][b] = e.im;
    }
    const int spans = s.real ? kRows : kRows / 2;
    for (int i = threadIdx.x; i < kPoles * spans; i += kVandermondeThreads) {
      const int k = i / spans, a = i % spans;
      Complex p = {};
      if (first + k < s.poles && (first_span + a) * kSpan < s.length) {
        const Complex factor = s.conjugate_v ? conj(v[first + k]) : v[first + k];
        p = times_power(s.factor * factor, power(x[first + k], float(first_span + a) * float(kSpan)));
      }
      if (s.real) {
        P[k][a] = p.re, Q[k][a] = -p.im;
      } else {
        const float sign = s.conjugate_out ? -1.0f : 1.0f;
        P[k][2 * a] = p.re, Q[k][2 * a] = -p.im;
        P[k][2 * a + 1] = sign * p.im, Q[k][2 * a + 1] = sign * p.re;
      }
    }
  }
};

// A block's results one by one, for poles that grow so fast that exp(x b) overflows where v exp(x l) may not.
__device__ __forceinline__ void sum_powers_directly(const PowerSums& s, int64_t filter, int64_t first_span) {
  const int64_t tile = int64_t(kSpan) * PowerSumsTile::kRows / (s.real ? 1 : 2), begin = first_span * kSpan;
  const Complex *const x = s.x + filter % s.rows * s.poles, *const v = s.v + filter * s.poles;
#pragma unroll 1
  for (int64_t l = begin + threadIdx.x; l < min(begin + tile, s.length); l += kVandermondeThreads) {
    const float of_span = float(l / kSpan) * float(kSpan), in_span = float(l % kSpan);
    Complex sum = {};
#pragma unroll 1
    for (int n = 0; n < s.poles; ++n) {
      const Complex factor = 2.0f * s.factor * (s.conjugate_v ? conj(v[n]) : v[n]);
      const ScaledComplex a = power(x[n], of_span), b = power(x[n], in_span);
      sum = sum + times_power<false>(factor, {a.value * b.value, a.exponent + b.exponent});
    }
    if (s.real) {
      static_cast<float*>(s.out)[filter * s.length + l] = sum.re;
    } else {
      static_cast<Complex*>(s.out)[filter * s.length + l] = s.conjugate_out ? conj(sum) : sum;
    }
  }
}

// A block computes kRows rows of a filter; a thread rows down * 8 + (0 .. 7) and of their columns 4 * across + (0 .. 3)
// and 64 beyond.
__global__ void __launch_bounds__(kVandermondeThreads, 4)
    vandermonde_forward_kernel(const __grid_constant__ PowerSums s) {
  constexpr int kRows = 8, kColumns = 8;
  __shared__ PowerSumsTile tile;
  extern __shared__ float totals[];  // [kRows kColumns, threads], where poles are many
  const int64_t filter = blockIdx.x / s.tiles, group = filter / s.rows, row = filter % s.rows;
  const int64_t first_span = blockIdx.x % s.tiles * (s.real ? PowerSumsTile::kRows : PowerSumsTile::kRows / 2);
  const int across = threadIdx.x % 16, down = threadIdx.x / 16;
  const int64_t my_span = first_span + (s.real ? down * kRows : down * kRows / 2);
  // Warps whose rows all lie beyond the end only help with the tables.
  const bool idle = (first_span + (s.real ? down / 2 * 2 * kRows : down / 2 * kRows)) * kSpan >= s.length;

  bool tame = true;
  for (int n = threadIdx.x; n < s.poles; n += kVandermondeThreads) tame = tame && !(s.x[row * s.poles + n].re > 0.6f);
  if (!__syncthreads_and(tame)) return sum_powers_directly(s, filter, first_span);

  float sums[kRows][kColumns] = {};
  const bool many = s.poles > kPolesOfSum;
  // f(sum, total) of this thread's results.
  const auto for_totals = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) f(sums[i][j], totals[(i * kColumns + j) * kVandermondeThreads + threadIdx.x]);
  };
  if (many) for_totals([](float, float& total) { total = 0.0f; });
  for (int first = 0; first < s.poles; first += PowerSumsTile::kPoles) {
    tile.fill(s, group, row, first_span, first);
    __syncthreads();
    const int poles = min(PowerSumsTile::kPoles, s.poles - first);
    if (!idle) {
#pragma unroll 1
      for (int k = 0; k < poles; ++k) {
        const auto add = [&](const float* of_rows, const float* of_columns) {
          const float4 r0 = *reinterpret_cast<const float4*>(of_rows + down * kRows);
          const float4 r1 = *reinterpret_cast<const float4*>(of_rows + down * kRows + 4);
          const float4 c0 = *reinterpret_cast<const float4*>(of_columns + 4 * across);
          const float4 c1 = *reinterpret_cast<const float4*>(of_columns + 4 * across + 64);
          const float r[] = {r0.x, r0.y, r0.z, r0.w, r1.x, r1.y, r1.z, r1.w};
          const float c[] = {c0.x, c0.y, c0.z, c0.w, c1.x, c1.y, c1.z, c1.w};
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(r[i], c[j], sums[i][j]);
        };
        add(tile.P[k], tile.re[k]);
        add(tile.Q[k], tile.im[k]);
      }
      if (many && (first + PowerSumsTile::kPoles) % kPolesOfSum == 0) {
        for_totals([](float& sum, float& total) { total += sum, sum = 0.0f; });
      }
    }
    __syncthreads();
  }
  if (idle) return;
  if (many) for_totals([](float& sum, float total) { sum += total; });

  const int64_t begin = filter * s.length;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = 64 * half + 4 * across;
    if (s.real) {
      float* const out = static_cast<float*>(s.out) + begin;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t l = (my_span + i) * kSpan + column;
        const float* y = sums[i] + 4 * half;
        if (s.whole_vectors && l < s.length) {
          *reinterpret_cast<float4*>(out + l) = float4{y[0], y[1], y[2], y[3]};
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (l + j < s.length) out[l + j] = y[j];
        }
      }
    } else {
      Complex* const out = static_cast<Complex*>(s.out) + begin;
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        const int64_t l = (my_span + i / 2) * kSpan + column;
        const float *y = sums[i] + 4 * half, *z = sums[i + 1] + 4 * half;
        if (s.whole_vectors && l < s.length) {
          *reinterpret_cast<float4*>(out + l) = float4{y[0], z[0], y[1], z[1]};
          *reinterpret_cast<float4*>(out + l + 2) = float4{y[2], z[2], y[3], z[3]};
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (l + j < s.length) out[l + j] = {y[j], z[j]};
        }
      }
    }
  }
}

}  // namespace

// Fills in how the work is cut.
inline void launch_power_sums(PowerSums s, int64_t groups, cudaStream_t stream) {
  const int64_t spans = divide_up(s.length, kSpan), a_tile = PowerSumsTile::kRows / (s.real ? 1 : 2);
  s.tiles = divide_up(spans, a_tile);
  s.whole_vectors = s.length % 4 == 0 && reinterpret_cast<uintptr_t>(s.out) % 16 == 0;
  size_t totals = 0;
  if (s.poles > kPolesOfSum) {  // with the tile more than a block has unasked
    totals = 64 * kVandermondeThreads * sizeof(float);
    check_cuda(
        cudaFuncSetAttribute(vandermonde_forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(totals)),
        "vandermonde");
  }
  launch("vandermonde", vandermonde_forward_kernel, groups * s.rows * s.tiles, kVandermondeThreads, totals, stream, s);
}

}  // namespace packseq
