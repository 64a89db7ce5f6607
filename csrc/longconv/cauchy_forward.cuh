// Sums of v / (z - w) over the poles, for all nodes.
//
// By what a block's nodes and poles are, one of three ways, each with one reciprocal a pole and node; the reciprocal's
// own unit has time for eight FP32 operations:
//
//   imaginary  pairs of conjugate poles, nodes i y: v / (z - w) + conj(v) / (z - conj(w)) = (n0 + i n1 y) / D with
//              D = |w|^2 - y^2 + i c y, c = -2 Re w, n0 = -2 Re(v conj(w)), n1 = 2 Re v: 7 operations
//   pairs      the same sum at other nodes, with D = (z - w) (z - conj(w)): 14
//   plain      one term after the other, for single poles and for numbers so far out that |D|^2 could leave the range
//              of a float: 10 a term
//
// At imaginary nodes D's real part is t + low, where high + low is |w|^2 in two floats and t = high - y^2 is rounded
// once. With y^2 = high - t, |D|^2 and both numerators are what a pole knows plus multiples of t and y^2:
//
//   |D|^2                        t^2 + (c^2 - 2 low) y^2 + (2 high + low) low
//   Re((n0 + i n1 y) conj(D))    (n0 - n1 c) t + n1 c high + (n0 - n1 c) low
//   Im((n0 + i n1 y) conj(D))    y (n1 t - n0 c + n1 low)
//
// whose terms are no larger than what the errors of a pair's own numbers come to while |Re w| is not below
// 2^-12 |Im w|; low is half an ulp of high. Elsewhere D's real part comes from the factors' differences,
// (Re z - Re w)^2 - (y - Im w) (y + Im w), whose terms are no larger than |D|, so nothing cancels.
//
// 1,024 filters of 16,384 imaginary nodes and 32 pairs: 0.13 ms of an H200's FP32 units, as of its reciprocals.
#pragma once
#include "core/device/complex.cuh"
#include "core/device/exp2.cuh"
#include "core/launch.h"
#include "longconv/filters.h"

namespace packseq {

inline constexpr int kCauchyThreads = 128;

struct CauchySums {
  const Complex *v, *z, *w;
  Complex* out;
  int64_t groups, rows, nodes;
  int poles;
  bool conjugate;
  int64_t tiles;  // of nodes
};

namespace {

enum class CauchyWay { imaginary, pairs, plain };

// |D|^-3, the most that gradients take, stays within a float's range, and with the numerators that sums at imaginary
// nodes take so does v |w|^3.
constexpr float kMostSize = 0x1p27f, kLeastSize = 0x1p-20f, kLeastSlope = 0x1p-12f;
constexpr float kMostNumerator = 0x1p40f, kLeastNumerator = 0x1p-40f;

__device__ __forceinline__ bool is_imaginary(Complex z) { return z.re == 0.0f && fabsf(z.im) <= kMostSize; }
__device__ __forceinline__ bool is_near(Complex z) { return fabsf(z.re) <= kMostSize && fabsf(z.im) <= kMostSize; }
__device__ __forceinline__ bool is_off_axis(Complex w, float slope) {
  return is_near(w) && fabsf(w.re) >= fmaxf(kLeastSize, slope * fabsf(w.im));
}
__device__ __forceinline__ bool is_off_zero(Complex w) {
  return is_near(w) && fmaxf(fabsf(w.re), fabsf(w.im)) >= kLeastSize;
}
__device__ __forceinline__ bool is_moderate(Complex v) {
  const float size = fmaxf(fabsf(v.re), fabsf(v.im));
  return size == 0.0f || (size >= kLeastNumerator && size <= kMostNumerator);
}

// The way that this block takes. `near` and `imaginary` say whether this thread's nodes are; with these poles' |Re w|
// must be at least `slope` |Im w|.
__device__ __forceinline__ CauchyWay choose_way(const Complex* w, int poles, bool near, bool imaginary, float slope) {
  bool off_axis = true, off_zero = true;
  for (int n = threadIdx.x; n < poles; n += kCauchyThreads) {
    off_axis = off_axis && is_off_axis(w[n], slope);
    off_zero = off_zero && is_off_zero(w[n]);
  }
  if (__syncthreads_and(imaginary && off_axis)) return CauchyWay::imaginary;
  if (__syncthreads_and(near && off_zero)) return CauchyWay::pairs;
  return CauchyWay::plain;
}

struct TwoFloats {
  float high, low;
};

__device__ __forceinline__ TwoFloats square_of_size(Complex w) {
  const double exact = double(w.re) * double(w.re) + double(w.im) * double(w.im);
  const float high = float(exact);
  return {high, float(exact - double(high))};
}

// Some poles in shared memory, in the terms of a way. A plain sum of pairs has each pole twice, once conjugate.
template <int kGroups>
struct CauchyPoles {
  static constexpr int kPoles = 32;
  float4 pole[kPoles];
  float4 numerator[kPoles][kGroups];

  // How many poles of the problem fit.
  static __device__ __forceinline__ int capacity(CauchyWay way, bool conjugate) {
    return way == CauchyWay::plain && conjugate ? kPoles / 2 : kPoles;
  }

  // Poles first ... first + count of `row`, numerators of groups first_group ...; of those that are not there zero.
  __device__ __forceinline__ void load(const CauchySums& s, CauchyWay way, int64_t row, int64_t first_group, int first,
                                       int count) {
    const int copies = kPoles / capacity(way, s.conjugate);
    for (int i = threadIdx.x; i < count * copies * kGroups; i += kCauchyThreads) {
      const int slot = i / kGroups, g = i % kGroups, n = first + slot / copies;
      const bool mirrored = slot % copies != 0;
      const Complex w = s.w[row * s.poles + n];
      const int64_t group = first_group + g;
      const Complex v = group < s.groups ? s.v[(group * s.rows + row) * s.poles + n] : Complex{};
      const TwoFloats size = square_of_size(w);
      const float c = -2.0f * w.re;
      if (g == 0) {
        if (way == CauchyWay::imaginary) {
          pole[slot] = {size.high, fmaf(c, c, -2.0f * size.low), fmaf(2.0f, size.high, size.low) * size.low, 0.0f};
        }
        if (way == CauchyWay::pairs) pole[slot] = {w.re, w.im, 0.0f, 0.0f};
        if (way == CauchyWay::plain) pole[slot] = {w.re, mirrored ? -w.im : w.im, 0.0f, 0.0f};
      }
      if (way == CauchyWay::imaginary) {
        const float n0 = -2.0f * dot(w, v), n1 = 2.0f * v.re, by_t = fmaf(-n1, c, n0);
        numerator[slot][g] = {by_t, fmaf(by_t, size.low, n1 * c * size.high), n1, fmaf(n1, size.low, -n0 * c)};
      }
      if (way == CauchyWay::pairs) numerator[slot][g] = {2.0f * v.re, 2.0f * v.im * w.im, 0.0f, 0.0f};
      if (way == CauchyWay::plain) numerator[slot][g] = {v.re, mirrored ? -v.im : v.im, 0.0f, 0.0f};
    }
  }
};

// What the terms of a way add up to, kParts numbers a node and group, and the sum that they stand for.
template <CauchyWay kWay>
struct CauchyTerms;

template <>
struct CauchyTerms<CauchyWay::imaginary> {
  static constexpr int kParts = 2;
  float y, y2;

  __device__ explicit CauchyTerms(Complex z) : y(z.im), y2(z.im * z.im) {}

  template <int kGroups>
  __device__ __forceinline__ void add(float (&sums)[kGroups][2], float4 pole,
                                      const float4 (&numerator)[kGroups]) const {
    const float t = fmaf(-y, y, pole.x);
    const float r = reciprocal_approx(fmaf(t, t, fmaf(pole.y, y2, pole.z)));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      sums[g][0] = fmaf(fmaf(numerator[g].x, t, numerator[g].y), r, sums[g][0]);
      sums[g][1] = fmaf(fmaf(numerator[g].z, t, numerator[g].w), r, sums[g][1]);
    }
  }
  __device__ __forceinline__ Complex total(const float (&sums)[2]) const { return {sums[0], y * sums[1]}; }
};

template <>
struct CauchyTerms<CauchyWay::pairs> {
  static constexpr int kParts = 4;
  Complex z;
  float four_y2;

  __device__ explicit CauchyTerms(Complex z) : z(z), four_y2(4.0f * z.im * z.im) {}

  template <int kGroups>
  __device__ __forceinline__ void add(float (&sums)[kGroups][4], float4 pole,
                                      const float4 (&numerator)[kGroups]) const {
    const float a = z.re - pole.x, a2 = a * a;
    const float real = fmaf(pole.y - z.im, pole.y + z.im, a2);
    const float r = reciprocal_approx(fmaf(a2, four_y2, real * real)), e = real * r, f = a * r;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float n = fmaf(numerator[g].x, a, -numerator[g].y);
      sums[g][0] = fmaf(n, e, sums[g][0]);
      sums[g][1] = fmaf(numerator[g].x, f, sums[g][1]);
      sums[g][2] = fmaf(numerator[g].x, e, sums[g][2]);
      sums[g][3] = fmaf(n, f, sums[g][3]);
    }
  }
  __device__ __forceinline__ Complex total(const float (&sums)[4]) const {
    return {fmaf(0.5f * four_y2, sums[1], sums[0]), z.im * fmaf(-2.0f, sums[3], sums[2])};
  }
};

template <>
struct CauchyTerms<CauchyWay::plain> {
  static constexpr int kParts = 2;
  Complex z;

  __device__ explicit CauchyTerms(Complex z) : z(z) {}

  template <int kGroups>
  __device__ __forceinline__ void add(float (&sums)[kGroups][2], float4 pole,
                                      const float4 (&numerator)[kGroups]) const {
    const Complex d = {z.re - pole.x, z.im - pole.y};
    const float r = reciprocal_approx(dot(d, d));
    const Complex e = {d.re * r, d.im * r};  // the conjugate of 1 / d
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      sums[g][0] = fmaf(numerator[g].x, e.re, fmaf(numerator[g].y, e.im, sums[g][0]));
      sums[g][1] = fmaf(numerator[g].y, e.re, fmaf(-numerator[g].x, e.im, sums[g][1]));
    }
  }
  __device__ __forceinline__ Complex total(const float (&sums)[2]) const { return {sums[0], sums[1]}; }
};

template <CauchyWay kWay, int kNodes, int kGroups>
__device__ __forceinline__ void cauchy_sums(const CauchySums& s, CauchyPoles<kGroups>& poles, int64_t row,
                                            int64_t first_group, const Complex (&z)[kNodes],
                                            Complex (&total)[kNodes][kGroups]) {
  using Terms = CauchyTerms<kWay>;
  const int capacity = poles.capacity(kWay, s.conjugate);
#pragma unroll
  for (int i = 0; i < kNodes; ++i)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) total[i][g] = {};
  for (int first = 0; first < s.poles; first += capacity) {
    const int count = min(capacity, s.poles - first);
    __syncthreads();
    poles.load(s, kWay, row, first_group, first, count);
    __syncthreads();
    float sums[kNodes][kGroups][Terms::kParts] = {};
    const int slots = count * (CauchyPoles<kGroups>::kPoles / capacity);
#pragma unroll 2
    for (int n = 0; n < slots; ++n) {
      const float4 pole = poles.pole[n];
      float4 numerator[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) numerator[g] = poles.numerator[n][g];
#pragma unroll
      for (int i = 0; i < kNodes; ++i) Terms(z[i]).add(sums[i], pole, numerator);
    }
#pragma unroll
    for (int i = 0; i < kNodes; ++i)
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total[i][g] = total[i][g] + Terms(z[i]).total(sums[i][g]);
  }
}

// Those of the groups first_group ... in `all` whose numerators are too large or small for imaginary nodes' way.
template <int kGroups>
__device__ unsigned immoderate_groups(const CauchySums& s, int64_t row, int64_t first_group, unsigned all) {
  unsigned found = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    bool moderate = true;
    if (all >> g & 1) {
      const Complex* const v = s.v + ((first_group + g) * s.rows + row) * s.poles;
      for (int n = threadIdx.x; n < s.poles; n += kCauchyThreads) moderate = moderate && is_moderate(v[n]);
    }
    if (!__syncthreads_and(moderate)) found |= 1u << g;
  }
  return found;
}

template <int kGroups>
struct CauchyTile {
  static constexpr int kNodes = kGroups == 4 ? 2 : 4;  // of a thread
  static constexpr int kSize = kNodes * kCauchyThreads;
};

// A block: one row and a tile of nodes; kGroups groups at a time.
template <int kGroups>
__global__ void __launch_bounds__(kCauchyThreads) cauchy_forward_kernel(const __grid_constant__ CauchySums s) {
  constexpr int kNodes = CauchyTile<kGroups>::kNodes;
  __shared__ CauchyPoles<kGroups> poles;
  const int64_t row = blockIdx.x / unsigned(s.tiles);
  const int64_t first_node = blockIdx.x % unsigned(s.tiles) * int64_t(CauchyTile<kGroups>::kSize) + threadIdx.x;
  Complex z[kNodes];
  bool near = true, imaginary = true;
#pragma unroll
  for (int i = 0; i < kNodes; ++i) {
    const int64_t l = first_node + i * kCauchyThreads;
    z[i] = s.z[l < s.nodes ? l : s.nodes - 1];
    near = near && is_near(z[i]);
    imaginary = imaginary && is_imaginary(z[i]);
  }
  const CauchyWay way =
      s.conjugate ? choose_way(s.w + row * s.poles, s.poles, near, imaginary, kLeastSlope) : CauchyWay::plain;
  for (int64_t first_group = 0; first_group < s.groups; first_group += kGroups) {
    // Each group goes its own way, whatever others hold.
    const unsigned all = (1u << min(int64_t(kGroups), s.groups - first_group)) - 1;
    const unsigned pairs = way == CauchyWay::imaginary ? immoderate_groups<kGroups>(s, row, first_group, all) : 0;
    for (int pass = 0; pass < 2; ++pass) {
      const unsigned groups = pass == 0 ? all & ~pairs : pairs;
      if (groups == 0) continue;
      Complex total[kNodes][kGroups];
      if (way == CauchyWay::plain) {
        cauchy_sums<CauchyWay::plain>(s, poles, row, first_group, z, total);
      } else if (way == CauchyWay::pairs || pass == 1) {
        cauchy_sums<CauchyWay::pairs>(s, poles, row, first_group, z, total);
      } else {
        cauchy_sums<CauchyWay::imaginary>(s, poles, row, first_group, z, total);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if ((groups >> g & 1) == 0) continue;
        Complex* const out = s.out + ((first_group + g) * s.rows + row) * s.nodes;
#pragma unroll
        for (int i = 0; i < kNodes; ++i) {
          const int64_t l = first_node + i * kCauchyThreads;
          if (l < s.nodes) out[l] = total[i][g];
        }
      }
    }
  }
}

}  // namespace
}  // namespace packseq
