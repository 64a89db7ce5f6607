// Gradients of the spectrum of S4's filters.
//
// A block takes one filter, one channel and a tile of frequencies. First, threads own frequencies: the sums that the
// low-rank correction is made of are computed again, and from them a[t], the conjugate gradient of each q[t]. Then
// warps own poles, and walk over the frequencies: they sum over them the real parts of
//
//   e a[t] / D        the gradient of n0[t]
//   i y a[t] / D      the gradient of n1[t]
//   -(n0[t] e + i n1[t] y) a[t] / D^2  times e^2 and i e y, over all t: the gradients of |W|^2 and c
//
// as products of matrices [poles, frequencies] and [frequencies, terms] on tensor cores. Their left factors are taken
// from D / c = d = u + i e y, with R = u / |d|^2 and S = 1 / |d|^2:
//
//   c / D = R - i e y S,      c^2 e^2 / D^2 = 2 e^2 (R^2 - S / 2) - 2 i e y (e^2 R S),
//
// so that both share the right factors of e a[t] and i y a[t]. The last sum, of y^2 for e^2, follows from the others.
//
// A last kernel sums the tiles' shares in order, and turns gradients of n0, n1, |W|^2 and c into those of the
// parameters.
#pragma once
#include "longconv/s4_sums.cuh"

namespace packseq {

struct S4Backward {
  S4Call call;
  const Complex* dout;  // [filters, channels, frequencies]
  float* shares;        // [filters, tiles, channels, S4Fields, poles]
  int64_t tiles;
  Complex *dw, *dP, *dB, *dC;
  float* ddt;
};

// What a pole's share is made of: gradients of n0 and n1 of each term, of |W|^2 and of c.
template <int kRank>
inline constexpr int kS4Fields = 2 * S4Terms<kRank, 1>::kCount + 2;

// Frequencies of a block, and how many it has at a time.
inline constexpr int kS4Tile = 1024;
template <int kRank>
inline constexpr int kS4Step = kRank == 2 ? 64 : 256;

namespace {

template <int kRank>
struct S4BackwardMemory {
  using Sums = S4Sums<kRank, 1, kRank == 2 ? 1 : 2>;
  static constexpr int kFill = kS4Threads / 32 * Sums::kNodes;  // frequencies that threads own at a time
  static constexpr int kPoles = Sums::Poles::kPoles, kTiles = Sums::Poles::kTiles;
  // Factors B of products over eight frequencies: with Y = y Im a[t], A = e Re a[t] columns t and 4 + t are
  //   A, -Y      times R and e^2 (R^2 - S / 2)      Y e^2, A y^2      times S and e^2 R S
  static constexpr int kFactors = 2;
  // Warps side by side share frequencies and have 16 kRows poles each.
  static constexpr int kRows = kRank == 2 ? 1 : 2, kAcross = kPoles / (16 * kRows);
  static constexpr int kApart = kS4Threads / 32 / kAcross;
  union {
    Sums of_frequencies;
    float sums[kApart][kTiles][2][8][kPoles];
  };
  float2 node[kS4Step<kRank>];  // e^2, y^2
  float2 pole[kPoles];          // |W|^2, 1 / c
  // Lane by lane, and four more to a step, so that nodes of two steps are written to banks of their own.
  uint4 factor[kTiles][kS4Step<kRank> / 8][kFactors * 32 + 4];
  __device__ S4BackwardMemory() {}

  // Where there are no more poles, the last one once more, for nobody. A pole on the imaginary axis is moved off it, by
  // less than it is rounded.
  __device__ __forceinline__ void load_poles(const S4Call& s, int64_t channel, int first) {
    if (threadIdx.x >= kPoles) return;
    const int n = min(first + int(threadIdx.x), s.poles - 1);
    const float size = s4_square_of_size(s, channel, n);
    const float c = -2.0f * kS4Scale * s.dt[channel] * s.w[channel * s.poles + n].re;
    pole[threadIdx.x] = {size, 1.0f / copysignf(fmaxf(fabsf(c), 0x1p-24f * sqrtf(size)), c)};
  }
};

// The conjugate gradients a[t] of all q[t], from the output's gradient and q[1 ...].
template <int kRank>
__device__ __forceinline__ void s4_output_gradients(Complex dout, Complex half, float e, const Complex* q,
                                                    Complex (&a)[S4Terms<kRank, 1>::kCount]) {
  using Terms = S4Terms<kRank, 1>;
  const Complex g = conj(dout) * half;
  a[0] = g;
  if constexpr (kRank > 0) {
    Complex M[kRank * kRank], left[kRank], right[kRank];  // (1 + e Q)^-1 q(B, P^*), and q(P, C) (1 + e Q)^-1
    s4_inverse<kRank>(q + Terms::of_inner(0, 0), e, M);
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
      left[j] = M[j * kRank] * q[Terms::of_left(0)];
      right[j] = M[j] * q[Terms::of_right(0, 0)];
      if constexpr (kRank == 2) {
        left[j] = left[j] + M[j * kRank + 1] * q[Terms::of_left(1)];
        right[j] = right[j] + M[kRank + j] * q[Terms::of_right(0, 1)];
      }
    }
    const Complex by = -e * g;
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
      a[Terms::of_left(j)] = by * right[j];
      a[Terms::of_right(0, j)] = by * left[j];
#pragma unroll
      for (int k = 0; k < kRank; ++k) a[Terms::of_inner(j, k)] = -e * (by * (right[j] * left[k]));
    }
  }
}

// The factors of kFill frequencies from `first` on, the place-th and following of the memory.
template <int kRank>
__device__ __forceinline__ void s4_fill_factors(const S4Backward& b, S4BackwardMemory<kRank>& memory, int64_t filter,
                                                int64_t channel, int64_t first, int place, const S4Nodes& nodes,
                                                int64_t& held) {
  using Terms = S4Terms<kRank, 1>;
  using Memory = S4BackwardMemory<kRank>;
  constexpr int kNodes = Memory::Sums::kNodes;  // of a warp
  const S4Call& s = b.call;
  const int64_t frequencies = s.frequencies();
  const int i = threadIdx.x / 32 * kNodes + threadIdx.x % kNodes;
  const bool there = first + i < frequencies;
  const int64_t j = there ? first + i : frequencies - 1;
  const Complex dout = there ? b.dout[(filter * s.channels + channel) * frequencies + j] : Complex{};
  const S4Node node = nodes.at(j);
  Complex q[Terms::kCount] = {}, a[Terms::kCount];
  if constexpr (kRank > 0) memory.of_frequencies.at(s, channel, filter, node, held, q);
  s4_output_gradients<kRank>(dout, node.half, node.e(), q, a);
  if (threadIdx.x % 32 >= kNodes) return;
  memory.node[place + i] = {node.e2, node.y2};
#pragma unroll
  for (int t = 0; t < 4 * Memory::kTiles; ++t) {
    const Complex of_term = t < Terms::kCount ? a[t < Terms::kCount ? t : 0] : Complex{};
    const float A = node.e() * of_term.re, Y = node.y * of_term.im;
    uint4* const to = memory.factor[t / 4][(place + i) / 8];
    store_split(to, i % 8, t % 4, A), store_split(to, i % 8, 4 + t % 4, -Y);
    store_split(to + 32, i % 8, t % 4, Y * node.e2), store_split(to + 32, i % 8, 4 + t % 4, A * node.y2);
  }
}

// Two poles of a thread, rows g and g + 8 of a product.
struct S4PolePair {
  float size[2], by_c[2];  // |W|^2, 1 / c

  __device__ __forceinline__ void load(const float2* pole) {
#pragma unroll
    for (int h = 0; h < 2; ++h) size[h] = pole[8 * h].x, by_c[h] = pole[8 * h].y;
  }
};

// Adds products over eight frequencies: sums[tile][0] are shares of c times the gradients of n0 and n1, and [1] sums of
// c^2 (e a e^2, i y a e^2) / D^2, halves of their real parts.
template <int kTiles, int kFactors>
__device__ __forceinline__ void s4_add_products(const S4PolePair& pole, float4 squares,
                                                const uint4 (&factor)[kTiles][kFactors], SplitSum (&sums)[kTiles][2]) {
  const float e2[2] = {squares.x, squares.z}, y2[2] = {squares.y, squares.w};
  float R[2][2], S[2][2], R_of_square[2][2], S_of_square[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float u = fmaf(pole.size[h], e2[k], -y2[k]) * pole.by_c[h];
      S[h][k] = reciprocal_approx(fmaf(u, u, e2[k] * y2[k]));
      R[h][k] = u * S[h][k];
      const float by_e2 = S[h][k] * e2[k];
      R_of_square[h][k] = fmaf(u, R[h][k], -0.5f) * by_e2;
      S_of_square[h][k] = R[h][k] * by_e2;
    }
  const SplitRows of_R(R), of_S(S), of_R_of_square(R_of_square), of_S_of_square(S_of_square);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    sums[t][0].add(of_R, factor[t][0]), sums[t][0].add(of_S, factor[t][1]);
    sums[t][1].add(of_R_of_square, factor[t][0]), sums[t][1].add(of_S_of_square, factor[t][1]);
  }
}

// One thread a pole: the fields of its share, from the warps' sums.
template <int kRank>
__device__ __forceinline__ void s4_store_share(const S4Call& s, const S4BackwardMemory<kRank>& memory, int64_t channel,
                                               int64_t filter, int first, float* shares, bool more) {
  using Memory = S4BackwardMemory<kRank>;
  using Terms = S4Terms<kRank, 1>;
  constexpr int kFields = kS4Fields<kRank>;
  const int i = threadIdx.x, n = first + i;
  if (i >= Memory::kPoles || n >= s.poles) return;
  const auto [size, by_c] = memory.pole[i];
  const auto sum_of = [&, by_c = by_c](int t, int which, int half) {
    float x = 0.0f;
#pragma unroll
    for (int k = 0; k < Memory::kApart; ++k) x += memory.sums[k][t / 4][which][half * 4 + t % 4][i];
    return which ? by_c * (by_c * x) : by_c * x;
  };
  const Complex W = kS4Scale * s.dt[channel] * s.w[channel * s.poles + n];
  const float c = -2.0f * W.re;
  Complex v[Terms::kCount];
  s4_numerators<kRank, 1>(s, channel, filter, n, v);
  float x[kFields] = {};
#pragma unroll
  for (int t = 0; t < Terms::kCount; ++t) {
    const float n0 = -2.0f * dot(W, v[t]), n1 = 2.0f * v[t].re;
    const float of_n0 = sum_of(t, 0, 0), by_e2 = sum_of(t, 1, 0), by_ey = sum_of(t, 1, 1);
    // The sum with y^2 for e^2: y^2 is |W|^2 e^2 + i c e y - D.
    const float by_y2 = fmaf(size, by_e2, fmaf(c, by_ey, -0.5f * of_n0));
    x[2 * t] = of_n0, x[2 * t + 1] = sum_of(t, 0, 1);
    x[kFields - 2] = fmaf(-2.0f * n0, by_e2, fmaf(-2.0f * n1, by_ey, x[kFields - 2]));
    x[kFields - 1] = fmaf(-2.0f * n0, by_ey, fmaf(2.0f * n1, by_y2, x[kFields - 1]));
  }
#pragma unroll
  for (int f = 0; f < kFields; ++f) {
    float& share = shares[f * s.poles + n];
    share = more ? share + x[f] : x[f];
  }
}

template <int kRank>
__global__ void __launch_bounds__(kS4Threads) s4_spectrum_backward_kernel(const __grid_constant__ S4Backward b) {
  using Memory = S4BackwardMemory<kRank>;
  constexpr int kRows = Memory::kRows, kAcross = Memory::kAcross, kApart = Memory::kApart, kTiles = Memory::kTiles;
  extern __shared__ __align__(16) unsigned char bytes[];
  Memory& memory = *reinterpret_cast<Memory*>(bytes);
  const S4Call& s = b.call;
  const int64_t tile = blockIdx.x % unsigned(b.tiles), row = blockIdx.x / unsigned(b.tiles);
  const int64_t channel = row % s.channels, filter = row / s.channels;
  const int64_t begin = tile * kS4Tile, end = min(begin + kS4Tile, s.frequencies());
  const S4Nodes nodes(s.length);
  int64_t held = -1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_of_lane = lane / 4, across = lane % 4;
  const bool at_once = s.poles <= Memory::kPoles;  // a block's sums stay in registers
  float* const shares = b.shares + ((filter * b.tiles + tile) * s.channels + channel) * kS4Fields<kRank> * s.poles;
  float total[kRows][kTiles][2][4] = {};
  memory.load_poles(s, channel, 0);
#pragma unroll 1
  for (int64_t first_frequency = begin; first_frequency < end; first_frequency += kS4Step<kRank>) {
    __syncthreads();
    const int count = int(min(int64_t(kS4Step<kRank>), end - first_frequency)), steps = (count + 7) / 8;
#pragma unroll 1
    for (int i = 0; i < count; i += Memory::kFill) {
      s4_fill_factors<kRank>(b, memory, filter, channel, first_frequency + i, i, nodes, held);
    }
    __syncthreads();
    for (int first = 0; first < s.poles; first += Memory::kPoles) {
      SplitSum sums[kRows][kTiles][2];
      const int first_row = warp % kAcross * 16 * kRows + row_of_lane;
      S4PolePair pole[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) pole[m].load(memory.pole + first_row + 16 * m);
#pragma unroll 1
      for (int step = warp / kAcross; step < steps; step += kApart) {
        const float4 squares = *reinterpret_cast<const float4*>(&memory.node[8 * step + 2 * across]);
        uint4 factor[kTiles][Memory::kFactors];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int f = 0; f < Memory::kFactors; ++f) factor[t][f] = memory.factor[t][step][32 * f + lane];
#pragma unroll
        for (int m = 0; m < kRows; ++m) s4_add_products(pole[m], squares, factor, sums[m]);
      }
      const auto for_sums = [&](const auto& f) {
#pragma unroll
        for (int m = 0; m < kRows; ++m)
#pragma unroll
          for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int which = 0; which < 2; ++which)
#pragma unroll
              for (int i = 0; i < 4; ++i) f(m, t, which, i);
      };
      for_sums([&](int m, int t, int which, int i) { total[m][t][which][i] += sums[m][t][which][i]; });
      if (at_once && first_frequency + kS4Step<kRank> < end) continue;
      __syncthreads();
      for_sums([&](int m, int t, int which, int i) {
        memory.sums[warp / kAcross][t][which][2 * across + i % 2][first_row + 16 * m + 8 * (i / 2)] =
            total[m][t][which][i];
        total[m][t][which][i] = 0.0f;
      });
      __syncthreads();
      s4_store_share<kRank>(s, memory, channel, filter, first, shares, !at_once && first_frequency != begin);
      held = -1;
      memory.load_poles(s, channel, first + Memory::kPoles < s.poles ? first + Memory::kPoles : 0);
      __syncthreads();
    }
  }
}

// A block: one channel. The gradients of its parameters, from the shares of all tiles and filters in order.
template <int kRank>
__global__ void __launch_bounds__(kS4Threads) s4_parameter_gradients_kernel(const __grid_constant__ S4Backward b) {
  using Terms = S4Terms<kRank, 1>;
  constexpr int kCount = Terms::kCount, kFields = kS4Fields<kRank>;
  __shared__ float of_warp[kS4Threads / 32];
  const S4Call& s = b.call;
  const int64_t channel = blockIdx.x;
  const float dt = kS4Scale * s.dt[channel];
  float ddt = 0.0f;
  for (int n = threadIdx.x; n < s.poles; n += kS4Threads) {
    const int64_t at = channel * s.poles + n;
    const Complex w = s.w[at], W = dt * w, B = s.B[at];
    Complex P[kRank + 1], dP[kRank + 1] = {}, dB = {}, dW = {};
#pragma unroll
    for (int k = 0; k < kRank; ++k) P[k] = s.column(k, channel, n);
    for (int64_t filter = 0; filter < s.filters; ++filter) {
      float x[kFields] = {};
#pragma unroll 2
      for (int64_t tile = 0; tile < b.tiles; ++tile) {
        const float* const share =
            b.shares + ((filter * b.tiles + tile) * s.channels + channel) * kFields * s.poles + n;
#pragma unroll
        for (int i = 0; i < kFields; ++i) x[i] += share[i * s.poles];
      }
      const int64_t at_filter = filter * s.channels * s.poles + at;
      const Complex C = s.C[at_filter];
      Complex v[kCount], dv[kCount];  // of dt a b
      s4_numerators<kRank, 1>(s, channel, filter, n, v);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const float dn0 = x[2 * t], dn1 = x[2 * t + 1];
        dv[t] = {2.0f * fmaf(-W.re, dn0, dn1), -2.0f * W.im * dn0};
        dW = dW - 2.0f * dn0 * v[t];
        ddt += dot(dv[t], v[t]) / dt;
      }
      dW = dW + 2.0f * x[kFields - 2] * W;
      dW.re -= 2.0f * x[kFields - 1];
      // Gradients of a and b in a b are that of a b times conj(b) and conj(a).
      Complex dC = dv[0] * conj(B);
      dB = dB + dv[0] * conj(C);
#pragma unroll
      for (int j = 0; j < kRank; ++j) {
        const Complex left = dv[Terms::of_left(j)], right = dv[Terms::of_right(0, j)];
        dB = dB + left * P[j];
        dC = dC + right * conj(P[j]);
        dP[j] = dP[j] + conj(left) * B + right * conj(C);
#pragma unroll
        for (int k = 0; k < kRank; ++k) {
          const Complex inner = dv[Terms::of_inner(j, k)];
          dP[j] = dP[j] + conj(inner) * P[k];
          dP[k] = dP[k] + inner * P[j];
        }
      }
      b.dC[at_filter] = dt * dC;
    }
    ddt += dot(dW, w);
    b.dw[at] = dt * dW;
    b.dB[at] = dt * dB;
#pragma unroll
    for (int k = 0; k < kRank; ++k) b.dP[(k * s.channels + channel) * s.poles + n] = dt * dP[k];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) ddt += __shfl_xor_sync(~0u, ddt, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = ddt;
  __syncthreads();
  if (threadIdx.x == 0) b.ddt[channel] = kS4Scale * ((of_warp[0] + of_warp[1]) + (of_warp[2] + of_warp[3]));
}

}  // namespace
}  // namespace packseq
