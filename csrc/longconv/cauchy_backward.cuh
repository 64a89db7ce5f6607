// Gradients of Cauchy sums. With g the gradient of out, E = 1 / (z - w) and sums over nodes,
//
//   dv = conj(sum of conj(g) E)      dw = conj(v sum of conj(g) E^2)      dz = -conj(sum of conj(g) v E^2) over rows
//
// and for pairs the same with (conj(z), g) as further nodes; E is computed again. At imaginary nodes pairs are
// (n0 + i n1 y) / D as in the forward, with D = S - y^2 + i c y: real gradients of n0, n1, S and c, each the real part
// of a sum of conj(g) (i y)^k / D or / D^2, take 19 operations a pole and node where the terms one by one take 34; what
// they mean for v and w is worked out once, at the end. That is 0.36 ms of an H200's FP32 units for 1,024 filters of
// 16,384 nodes and 32 pairs.
#pragma once
#include "longconv/cauchy_forward.cuh"

namespace packseq {

struct CauchyGradients {
  CauchySums sums;  // v, z, w and sizes; tiles: of kSize nodes
  const Complex* dout;
  Complex* dv;  // [tiles, groups, rows, poles]: shares of each tile
  Complex* dw;  // [tiles, rows, poles]
};

struct CauchyNodeGradients {
  CauchySums sums;  // tiles: of kCauchyThreads nodes
  const Complex* dout;
  Complex* dz;         // [shares, nodes]
  int64_t share_rows;  // of a share
};

// A thread owns kPer poles and every kSlots-th node of a tile; kAcross threads hold 32 poles.
template <int kGroups>
struct CauchyBackwardTile {
  static constexpr int kSize = kGroups == 1 ? 1024 : 512;
  static constexpr int kPoles = 32, kPer = 4 / kGroups, kAcross = kPoles / kPer, kSlots = kCauchyThreads / kAcross;
};

namespace {

template <int kGroups>
struct CauchyBackwardMemory {
  using Tile = CauchyBackwardTile<kGroups>;
  static constexpr int kMoments = 5, kWarps = kCauchyThreads / 32;
  float2 node[Tile::kSize];             // imaginary: y, 4 y^2; plain: z
  float4 weight[Tile::kSize][kGroups];  // imaginary: Re g, y Im g, y^2 Re g, y^3 Im g; plain: g
  float moments[kWarps][kGroups][kMoments][Tile::kPoles];
};

// Sums over a tile's nodes that are gradients by the numbers a pole is made of in a way, `kParts` at each node added
// to, and of these `kMoments` made at the end.
template <CauchyWay kWay>
struct CauchyMoments;

template <>
struct CauchyMoments<CauchyWay::imaginary> {
  static constexpr int kParts = 10, kMoments = 5;
  float im, re2, c;

  __device__ CauchyMoments(Complex w) : im(w.im), re2(w.re * w.re), c(-2.0f * w.re) {}

  template <int kGroups>
  __device__ __forceinline__ void add(float (&x)[kGroups][kParts], float2 node, const float4 (&weight)[kGroups],
                                      bool) const {
    const float real = fmaf(im - node.x, im + node.x, re2);
    const float r = reciprocal_approx(fmaf(re2, node.y, real * real));
    const float e = real * r;             // Re(1 / D); its imaginary part is -c y r
    const float e2 = fmaf(e + e, e, -r);  // Re(1 / D^2); its imaginary part is -2 c y k
    const float k = e * r;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float4 a = weight[g];
      x[g][0] = fmaf(a.x, e, x[g][0]);
      x[g][1] = fmaf(a.y, r, x[g][1]);
      x[g][2] = fmaf(a.y, e, x[g][2]);
      x[g][3] = fmaf(a.z, r, x[g][3]);
      x[g][4] = fmaf(a.x, e2, x[g][4]);
      x[g][5] = fmaf(a.y, k, x[g][5]);
      x[g][6] = fmaf(a.y, e2, x[g][6]);
      x[g][7] = fmaf(a.z, k, x[g][7]);
      x[g][8] = fmaf(a.z, e2, x[g][8]);
      x[g][9] = fmaf(a.w, k, x[g][9]);
    }
  }
  // The real parts of the sums of conj(g) / D, i y conj(g) / D, and of conj(g) (i y)^k / D^2 for k = 0, 1, 2.
  __device__ __forceinline__ void finish(const float (&x)[kParts], float (&m)[kMoments]) const {
    const float twice = 2.0f * c;
    m[0] = fmaf(-c, x[1], x[0]);
    m[1] = fmaf(c, x[3], x[2]);
    m[2] = fmaf(-twice, x[5], x[4]);
    m[3] = fmaf(twice, x[7], x[6]);
    m[4] = fmaf(twice, x[9], -x[8]);
  }
  static __device__ __forceinline__ void gradients(const float (&m)[kMoments], Complex v, Complex w, Complex& dv,
                                                   Complex& dw) {
    const float n0 = -2.0f * dot(w, v), n1 = 2.0f * v.re;
    const float dS = -fmaf(n0, m[2], n1 * m[3]), dc = -fmaf(n0, m[3], n1 * m[4]);
    dv = {2.0f * fmaf(-w.re, m[0], m[1]), -2.0f * w.im * m[0]};
    dw = {2.0f * (fmaf(-v.re, m[0], w.re * dS) - dc), 2.0f * fmaf(-v.im, m[0], w.im * dS)};
  }
};

template <>
struct CauchyMoments<CauchyWay::plain> {
  static constexpr int kParts = 4, kMoments = 4;
  Complex w;

  __device__ CauchyMoments(Complex w) : w(w) {}

  template <int kGroups>
  __device__ __forceinline__ void add(float (&x)[kGroups][kParts], float2 node, const float4 (&weight)[kGroups],
                                      bool conjugate) const {
    add_term(x, {node.x - w.re, node.y - w.im}, weight, -1.0f);
    if (conjugate) add_term(x, {node.x - w.re, -node.y - w.im}, weight, 1.0f);
  }
  // `sign` is that of g's imaginary part.
  template <int kGroups>
  static __device__ __forceinline__ void add_term(float (&x)[kGroups][kParts], Complex d,
                                                  const float4 (&weight)[kGroups], float sign) {
    const float r = reciprocal_approx(dot(d, d));
    const Complex e = {d.re * r, -d.im * r}, e2 = e * e;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float re = weight[g].x, im = sign * weight[g].y;
      x[g][0] = fmaf(re, e.re, fmaf(-im, e.im, x[g][0]));
      x[g][1] = fmaf(re, e.im, fmaf(im, e.re, x[g][1]));
      x[g][2] = fmaf(re, e2.re, fmaf(-im, e2.im, x[g][2]));
      x[g][3] = fmaf(re, e2.im, fmaf(im, e2.re, x[g][3]));
    }
  }
  __device__ __forceinline__ void finish(const float (&x)[kParts], float (&m)[kMoments]) const {
#pragma unroll
    for (int i = 0; i < kMoments; ++i) m[i] = x[i];
  }
  static __device__ __forceinline__ void gradients(const float (&m)[kMoments], Complex v, Complex, Complex& dv,
                                                   Complex& dw) {
    dv = {m[0], -m[1]};
    dw = conj(v * Complex{m[2], m[3]});
  }
};

template <CauchyWay kWay, int kGroups>
__device__ __forceinline__ void load_weights(const CauchyGradients& b, CauchyBackwardMemory<kGroups>& memory,
                                             int64_t row, int64_t first_group, int64_t first_node, int count) {
  const CauchySums& s = b.sums;
  for (int i = threadIdx.x; i < count; i += kCauchyThreads) {
    const Complex z = s.z[first_node + i];
    const float y = z.im;
    memory.node[i] = kWay == CauchyWay::plain ? float2{z.re, z.im} : float2{y, 4.0f * y * y};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t group = first_group + g;
      const Complex a = group < s.groups ? b.dout[(group * s.rows + row) * s.nodes + first_node + i] : Complex{};
      const float im = y * a.im;
      memory.weight[i][g] =
          kWay == CauchyWay::plain ? float4{a.re, a.im, 0.0f, 0.0f} : float4{a.re, im, y * y * a.re, y * y * im};
    }
  }
}

// Groups first_group ... and all poles of a block's row and tile.
template <CauchyWay kWay, int kGroups>
__device__ __forceinline__ void cauchy_gradients(const CauchyGradients& b, CauchyBackwardMemory<kGroups>& memory,
                                                 int64_t row, int64_t tile, int64_t first_group) {
  using Tile = CauchyBackwardTile<kGroups>;
  using Moments = CauchyMoments<kWay>;
  const CauchySums& s = b.sums;
  const int64_t first_node = tile * Tile::kSize;
  const int count = int(min(int64_t(Tile::kSize), s.nodes - first_node));
  const int across = threadIdx.x % Tile::kAcross, slot = threadIdx.x / Tile::kAcross, warp = threadIdx.x / 32;
  __syncthreads();
  load_weights<kWay>(b, memory, row, first_group, first_node, count);
  __syncthreads();
  for (int first = 0; first < s.poles; first += Tile::kPoles) {
    // Poles across, across + kAcross, ...; where there are no more, the last one once more, for nobody.
    const auto w_of = [&](int k) { return s.w[row * s.poles + min(first + across + k * Tile::kAcross, s.poles - 1)]; };
    float sums[Tile::kPer][kGroups][Moments::kParts] = {};
    {
      const Moments first_pole(w_of(0)), second(w_of(1 % Tile::kPer)), third(w_of(2 % Tile::kPer)),
          fourth(w_of(3 % Tile::kPer));
      const Moments pole[] = {first_pole, second, third, fourth};
#pragma unroll 1
      for (int i = slot; i < count; i += Tile::kSlots) {
        const float2 node = memory.node[i];
        float4 weight[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) weight[g] = memory.weight[i][g];
#pragma unroll
        for (int k = 0; k < Tile::kPer; ++k) pole[k].add(sums[k], node, weight, s.conjugate);
      }
    }
#pragma unroll
    for (int k = 0; k < Tile::kPer; ++k) {
      const Moments pole(w_of(k));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float m[Moments::kMoments];
        pole.finish(sums[k][g], m);
#pragma unroll
        for (int j = 0; j < Moments::kMoments; ++j) {
#pragma unroll
          for (int lanes = Tile::kAcross; lanes < 32; lanes *= 2) m[j] += __shfl_xor_sync(~0u, m[j], lanes);
          if (threadIdx.x % 32 < Tile::kAcross) memory.moments[warp][g][j][across + k * Tile::kAcross] = m[j];
        }
      }
    }
    __syncthreads();
    const int n = first + int(threadIdx.x);
    if (threadIdx.x < Tile::kPoles && n < s.poles) {
      Complex* const to = b.dw + (tile * s.rows + row) * s.poles + n;
      const Complex w = s.w[row * s.poles + n];
      Complex dw = first_group == 0 ? Complex{} : *to;
      for (int g = 0; g < kGroups && first_group + g < s.groups; ++g) {
        float m[Moments::kMoments];
#pragma unroll
        for (int j = 0; j < Moments::kMoments; ++j) {
          m[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < kCauchyThreads / 32; ++i) m[j] += memory.moments[i][g][j][threadIdx.x];
        }
        const int64_t at = ((first_group + g) * s.rows + row) * s.poles + n;
        Complex dv, of_group;
        Moments::gradients(m, s.v[at], w, dv, of_group);
        b.dv[tile * s.groups * s.rows * s.poles + at] = dv;
        dw = dw + of_group;
      }
      *to = dw;
    }
    __syncthreads();
  }
}

// A block: one row and a tile of nodes; kGroups groups at a time.
template <int kGroups>
__global__ void __launch_bounds__(kCauchyThreads) cauchy_backward_kernel(const __grid_constant__ CauchyGradients b) {
  using Tile = CauchyBackwardTile<kGroups>;
  __shared__ CauchyBackwardMemory<kGroups> memory;
  const CauchySums& s = b.sums;
  const int64_t row = blockIdx.x / s.tiles, tile = blockIdx.x % s.tiles;
  bool imaginary = s.conjugate;
  for (int64_t l = tile * Tile::kSize + threadIdx.x; l < min((tile + 1) * Tile::kSize, s.nodes); l += kCauchyThreads) {
    imaginary = imaginary && is_imaginary(s.z[l]);
  }
  const CauchyWay way = choose_way(s.w + row * s.poles, s.poles, false, imaginary, 0.0f);
  for (int64_t first_group = 0; first_group < s.groups; first_group += kGroups) {
    if (way == CauchyWay::imaginary) {
      cauchy_gradients<CauchyWay::imaginary>(b, memory, row, tile, first_group);
    } else {
      cauchy_gradients<CauchyWay::plain>(b, memory, row, tile, first_group);
    }
  }
}

// A block: a share of the rows and kCauchyThreads nodes.
__global__ void __launch_bounds__(kCauchyThreads)
    cauchy_node_gradients_kernel(const __grid_constant__ CauchyNodeGradients b) {
  __shared__ CauchyPoles<1> poles;
  const CauchySums& s = b.sums;
  const int64_t share = blockIdx.x / s.tiles, l = blockIdx.x % s.tiles * kCauchyThreads + threadIdx.x;
  const int64_t node = min(l, s.nodes - 1), last_row = min((share + 1) * b.share_rows, s.rows);
  const Complex z = s.z[node];
  const int capacity = poles.capacity(CauchyWay::plain, s.conjugate);
  Complex dz = {};
  for (int64_t row = share * b.share_rows; row < last_row; ++row) {
    for (int64_t group = 0; group < s.groups; ++group) {
      Complex sum = {};  // of v E^2
      for (int first = 0; first < s.poles; first += capacity) {
        const int count = min(capacity, s.poles - first);
        __syncthreads();
        poles.load(s, CauchyWay::plain, row, group, first, count);
        __syncthreads();
        const int slots = count * (CauchyPoles<1>::kPoles / capacity);
        Complex part = {};
#pragma unroll 2
        for (int n = 0; n < slots; ++n) {
          const float4 v = poles.numerator[n][0];
          const Complex d = {z.re - poles.pole[n].x, z.im - poles.pole[n].y};
          const float r = reciprocal_approx(dot(d, d));
          const Complex e = {d.re * r, -d.im * r};
          part = part + Complex{v.x, v.y} * (e * e);
        }
        sum = sum + part;
      }
      dz = dz - conj(conj(b.dout[(group * s.rows + row) * s.nodes + node]) * sum);
    }
  }
  if (l < s.nodes) b.dz[share * s.nodes + l] = dz;
}

}  // namespace
}  // namespace packseq
