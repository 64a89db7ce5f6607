// Gradients of the spectrum of S4's filters.
//
// A block takes one filter, one channel and a tile of frequencies. First, threads own frequencies: the sums that the
// low-rank correction is made of are computed again, and from them a[t], the conjugate gradient of each q[t]. Then
// threads own poles, and walk over the frequencies: with E = 1 / D, they sum over them the real parts of
//
//   e a[t] E          the gradient of n0[t]
//   i y a[t] E        the gradient of n1[t]
//   -(n0[t] e + i n1[t] y) a[t] E^2  times e^2 and i e y, over all t: the gradients of |W|^2 and c.
//
// With four terms (rank 1) the two walks issue 22 and 61 instructions a pole and frequency, loads included: 1.5 ms of
// an H200's issue slots for 1,024 channels, 16,384 frequencies and 32 pairs, of which the 2 x 16 products of the four
// terms in the second walk are the largest part. A last kernel sums the tiles' shares in order, and turns gradients of
// n0, n1, |W|^2 and c into those of the parameters.
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

// Frequencies of a block.
template <int kRank>
inline constexpr int kS4Tile = kRank == 2 ? 256 : 512;

// What a pole's share is made of: gradients of n0 and n1 of each term, of |W|^2 and of c.
template <int kRank>
inline constexpr int kS4Fields = 2 * S4Terms<kRank, 1>::kCount + 2;

namespace {

template <int kRank>
struct S4BackwardMemory {
  using Terms = S4Terms<kRank, 1>;
  static constexpr int kPoles = 32;
  static constexpr int kEntry = (5 + 2 * Terms::kCount + 3) / 4 * 4;  // floats of a frequency, in 16-byte pieces
  // y, e, e^2, y^2, 4 y^2, then e Re a[t], y Im a[t] for each t
  alignas(16) float entry[kS4Tile<kRank>][kEntry];
  union {
    S4Poles<kRank, 1, 1> poles;  // while threads own frequencies
    float sums[kS4Threads / 32][kS4Fields<kRank>][kPoles];
  };
  __device__ S4BackwardMemory() {}
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
    s4_inverse<kRank>(q + Terms::of_inner(0, 0) - 1, e, M);
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
      left[j] = M[j * kRank] * q[Terms::of_left(0) - 1];
      right[j] = M[j] * q[Terms::of_right(0, 0) - 1];
      if constexpr (kRank == 2) {
        left[j] = left[j] + M[j * kRank + 1] * q[Terms::of_left(1) - 1];
        right[j] = right[j] + M[kRank + j] * q[Terms::of_right(0, 1) - 1];
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

// The tile's entries. Every thread owns frequencies threadIdx.x, threadIdx.x + kS4Threads, ...
template <int kRank>
__device__ __forceinline__ void s4_fill_entries(const S4Backward& b, S4BackwardMemory<kRank>& memory, int64_t filter,
                                                int64_t channel, int64_t first) {
  using Terms = S4Terms<kRank, 1>;
  constexpr int kNodes = kS4Tile<kRank> / kS4Threads;
  const S4Call& s = b.call;
  const int64_t frequencies = s.frequencies();
  Complex half[kNodes];
  S4Node node[kNodes];
#pragma unroll
  for (int i = 0; i < kNodes; ++i) {
    half[i] = half_turn(min(first + i * kS4Threads + threadIdx.x, frequencies - 1), s.length);
    node[i] = S4Node::at(half[i]);
  }
  Complex q[kNodes][kRank ? Terms::kCount - 1 : 1];
  if constexpr (kRank > 0) s4_sums<kRank, 1>(s, memory.poles, channel, filter, node, q);
#pragma unroll
  for (int i = 0; i < kNodes; ++i) {
    const int64_t j = first + i * kS4Threads + threadIdx.x;
    if (j >= frequencies) break;
    Complex a[Terms::kCount];
    s4_output_gradients<kRank>(b.dout[(filter * s.channels + channel) * frequencies + j], half[i], node[i].e, q[i], a);
    float* const entry = memory.entry[i * kS4Threads + threadIdx.x];
    entry[0] = node[i].y, entry[1] = node[i].e, entry[2] = node[i].e2, entry[3] = node[i].y2;
    entry[4] = 4.0f * node[i].y2;
#pragma unroll
    for (int t = 0; t < Terms::kCount; ++t) {
      entry[5 + 2 * t] = node[i].e * a[t].re;
      entry[6 + 2 * t] = node[i].y * a[t].im;
    }
  }
}

// One pole's sums over frequencies.
template <int kRank>
struct S4PoleSums {
  static constexpr int kCount = S4Terms<kRank, 1>::kCount, kFields = kS4Fields<kRank>;
  float im, re2, c;  // of W
  float n0[kCount], n1[kCount];
  float x[kFields] = {};

  __device__ __forceinline__ S4PoleSums(const S4Call& s, int64_t channel, int64_t filter, int n) {
    const Complex W = kS4Scale * s.dt[channel] * s.w[channel * s.poles + n];
    im = W.im, re2 = W.re * W.re, c = -2.0f * W.re;
    Complex v[kCount];
    s4_numerators<kRank, 1>(s, channel, filter, n, v);
#pragma unroll
    for (int t = 0; t < kCount; ++t) n0[t] = -2.0f * dot(W, v[t]), n1[t] = 2.0f * v[t].re;
  }

  __device__ __forceinline__ void add(const float* entry) {
    const float y = entry[0], e = entry[1], e2 = entry[2], y2 = entry[3];
    const float square = re2 * e2, real = fmaf(fmaf(im, e, -y), fmaf(im, e, y), square);
    const float r = reciprocal_approx(fmaf(square, entry[4], real * real));
    const float E = real * r, rc = c * r, rc_e2 = rc * e2, rc_y2 = rc * y2;  // E = 1 / D is E - i e y rc
    float by0 = 0.0f, by1 = 0.0f, by2 = 0.0f;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const float A = entry[5 + 2 * t], Y = entry[6 + 2 * t];
      x[2 * t] = fmaf(A, E, fmaf(Y, rc_e2, x[2 * t]));
      x[2 * t + 1] = fmaf(-Y, E, fmaf(A, rc_y2, x[2 * t + 1]));
      by0 = fmaf(n0[t], A, fmaf(-n1[t], Y, by0));
      by1 = fmaf(n0[t], Y, by1);
      by2 = fmaf(n1[t], A, by2);
    }
    const float half_square = fmaf(E, E, -0.5f * r), k = E * rc;  // E^2 is 2 half_square - 2 i e y k
    const float u = half_square * e2, v = half_square * y2, k_e2 = k * e2, k_e4 = k_e2 * e2, k_ye2 = k_e2 * y2;
    x[kFields - 2] = fmaf(by0, u, fmaf(by1, k_e4, fmaf(by2, k_ye2, x[kFields - 2])));
    x[kFields - 1] = fmaf(by0, k_ye2, fmaf(-by1, u, fmaf(-by2, v, x[kFields - 1])));
  }

  // The last two are by now half of what they are sums of, and of the other sign.
  __device__ __forceinline__ float field(int i) const { return i < kFields - 2 ? x[i] : -2.0f * x[i]; }
};

template <int kRank>
__global__ void __launch_bounds__(kS4Threads) s4_spectrum_backward_kernel(const __grid_constant__ S4Backward b) {
  using Memory = S4BackwardMemory<kRank>;
  constexpr int kFields = kS4Fields<kRank>, kPer = kRank == 2 ? 1 : 2;
  constexpr int kAcross = Memory::kPoles / kPer, kSlots = kS4Threads / kAcross;
  __shared__ Memory memory;
  const S4Call& s = b.call;
  const int64_t channel = blockIdx.x / b.tiles % s.channels, filter = blockIdx.x / b.tiles / s.channels;
  const int64_t tile = blockIdx.x % b.tiles, first_frequency = tile * kS4Tile<kRank>;
  const int count = int(min(int64_t(kS4Tile<kRank>), s.frequencies() - first_frequency));
  s4_fill_entries<kRank>(b, memory, filter, channel, first_frequency);

  const int across = threadIdx.x % kAcross, slot = threadIdx.x / kAcross, warp = threadIdx.x / 32;
  float* const shares = b.shares + ((filter * b.tiles + tile) * s.channels + channel) * kFields * s.poles;
  for (int first = 0; first < s.poles; first += Memory::kPoles) {
    __syncthreads();
    // Where there are no more poles, the last one once more, for nobody.
    S4PoleSums<kRank> pole(s, channel, filter, min(first + across, s.poles - 1));
    S4PoleSums<kRank> other(s, channel, filter, min(first + across + kAcross % Memory::kPoles, s.poles - 1));
#pragma unroll 1
    for (int i = slot; i < count; i += kSlots) {
      alignas(16) float entry[Memory::kEntry];
#pragma unroll
      for (int k = 0; k < Memory::kEntry; k += 4) {
        *reinterpret_cast<float4*>(entry + k) = *reinterpret_cast<const float4*>(memory.entry[i] + k);
      }
      pole.add(entry);
      if constexpr (kPer == 2) other.add(entry);
    }
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
#pragma unroll
      for (int i = 0; i < kFields; ++i) {
        float x = k ? other.field(i) : pole.field(i);
        if constexpr (kAcross < 32) x += __shfl_xor_sync(~0u, x, 16);
        if (threadIdx.x % 32 < kAcross) memory.sums[warp][i][across + k * kAcross] = x;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kFields * Memory::kPoles; i += kS4Threads) {
      const int field = i / Memory::kPoles, n = i % Memory::kPoles;
      if (first + n >= s.poles) continue;
      float x = 0.0f;
#pragma unroll
      for (int k = 0; k < kS4Threads / 32; ++k) x += memory.sums[k][field][n];
      shares[field * s.poles + first + n] = x;
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
