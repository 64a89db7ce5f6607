// S4's recurrence, token by token: kLanes threads own a channel of a sequence, its poles in their registers.
//
// With D = 1 - dt/2 w, by the bilinear transform and Woodbury's identity,
//
//   h[t] = h[t-1] + (dt w / D) h[t-1] + (dt B / D) u - sum over k of (dt P[k] / D) g[k]
//   g    = (1 + X)^-1 times half of a,    X[j, k] = dt Re sum of conj(P[j]) P[k] / D
//   a[k] = 4 Re sum of conj(P[k]) / D h[t-1] + u 2 Re sum of conj(P[k]) dt B / D
//
// Abar enters without the 1 in it: rounded together they would turn and shrink a state wrongly for ever. Bound by the
// bytes of states and parameters where sequences have one token.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/check.h"
#include "core/device/complex.cuh"
#include "core/divide_up.h"
#include "core/launch.h"
#include "longconv/s4_step.h"

namespace packseq {

struct S4StepParams {
  S4Step call;
  int64_t groups;  // sequences times channels
  int64_t blocks;  // those after them clear the slack
};

namespace {

constexpr int kClearBlocks = 64;

template <class T_, int kRank_, int kLanes_>
struct S4StepKind {
  using T = T_;
  static constexpr int kRank = kRank_, kLanes = kLanes_, kPer = 4;  // poles of a thread
  static constexpr int kThreads = kLanes > 128 ? kLanes : 128, kChannels = kThreads / kLanes;
};

// exp(x) - 1, without cancellation where x is small.
PACKSEQ_HOST_DEVICE Complex exp_minus_one(Complex x) {
  constexpr float kPerTurn = 0.159154937f, kPerTurnRest = 6.42063824e-9f, kPi = 3.14159265f;  // 1 / (2 pi)
  const float turns = x.im * kPerTurn;                                                        // half turns of x / 2
  const float rest = kPi * fmaf(x.im, kPerTurnRest, fmaf(x.im, kPerTurn, -turns));
  float sine, cosine;
  sincospif(turns, &sine, &cosine);
  const float s = fmaf(cosine, rest, sine), c = fmaf(-sine, rest, cosine), less = expm1f(x.re);
  return {fmaf(less, fmaf(-2.0f * s, s, 1.0f), -2.0f * s * s), 2.0f * s * c * (less + 1.0f)};
}

template <class Kind>
struct S4StepPole {
  Complex h, decay, input, left[Kind::kRank + 1], right[Kind::kRank + 1];

  // decay: Abar - 1; input: Bbar; left: dt P / D; right: 4 P / D^*, so that their products with h are dot()s.
  __device__ __forceinline__ void prepare(const S4Step& s, int64_t channel, int n) {
    const int64_t at = channel * s.poles + n;
    const Complex w = static_cast<const Complex*>(s.w)[at], B = static_cast<const Complex*>(s.B)[at];
    const float dt = static_cast<const float*>(s.dt)[channel];
    if (s.zoh) {
      decay = exp_minus_one(dt * w);
      const bool zero = w.re == 0.0f && w.im == 0.0f;
      input = zero ? dt * B : decay * reciprocal(w) * B;
      return;
    }
    const Complex inverse = reciprocal({fmaf(-0.5f * dt, w.re, 1.0f), -0.5f * dt * w.im});
    decay = dt * (w * inverse);
    input = dt * (B * inverse);
#pragma unroll
    for (int k = 0; k < Kind::kRank; ++k) {
      const Complex P = static_cast<const Complex*>(s.P)[(k * s.channels + channel) * s.poles + n];
      left[k] = dt * (P * inverse);
      right[k] = 4.0f * (P * conj(inverse));
    }
  }
};

// Sums over the threads of a channel, in a fixed order; every one of them gets them.
template <class Kind, int kCount>
__device__ __forceinline__ void sum_over_channel(float (&x)[kCount]) {
  constexpr int kInWarp = Kind::kLanes < 32 ? Kind::kLanes : 32;
  const uint32_t mask = kInWarp == 32 ? ~0u : ((1u << kInWarp % 32) - 1) << threadIdx.x % 32 / kInWarp * kInWarp;
#pragma unroll
  for (int lanes = kInWarp / 2; lanes > 0; lanes /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(mask, x[i], lanes);
  if constexpr (Kind::kLanes > 32) {
    constexpr int kWarps = Kind::kLanes / 32;
    __shared__ float of_warp[kWarps][kCount];
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) of_warp[threadIdx.x / 32][i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) x[i] += of_warp[warp][i];
    }
    __syncthreads();
  }
}

// What a channel's threads hold between tokens.
template <class Kind>
struct S4StepChannel {
  static constexpr int kRank = Kind::kRank, kPer = Kind::kPer;
  S4StepPole<Kind> pole[kPer];
  float inner[kRank * kRank + 1], of_input[kRank + 1];  // half of (1 + X)^-1; 2 Re sum of conj(P) dt B / D

  // Poles lane, lane + kLanes, ...; those that are not there have zeros everywhere.
  __device__ __forceinline__ S4StepChannel(const S4Step& s, int64_t channel, int lane) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      pole[i] = {};
      if (lane + i * Kind::kLanes < s.poles) pole[i].prepare(s, channel, lane + i * Kind::kLanes);
    }
    if constexpr (kRank > 0) {
      float sums[kRank * kRank + kRank] = {};
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int n = lane + i * Kind::kLanes;
        if (n >= s.poles) continue;
#pragma unroll
        for (int j = 0; j < kRank; ++j) {
          const Complex P = static_cast<const Complex*>(s.P)[(j * s.channels + channel) * s.poles + n];
#pragma unroll
          for (int k = 0; k < kRank; ++k) sums[j * kRank + k] += dot(P, pole[i].left[k]);
          sums[kRank * kRank + j] += 2.0f * dot(P, pole[i].input);
        }
      }
      sum_over_channel<Kind>(sums);
#pragma unroll
      for (int j = 0; j < kRank; ++j) of_input[j] = sums[kRank * kRank + j];
      if constexpr (kRank == 1) {
        inner[0] = 0.5f / (1.0f + sums[0]);
      } else {
        const float a = 1.0f + sums[0], d = 1.0f + sums[3], by = 0.5f / fmaf(a, d, -sums[1] * sums[2]);
        inner[0] = by * d, inner[1] = -by * sums[1], inner[2] = -by * sums[2], inner[3] = by * a;
      }
    }
  }

  __device__ __forceinline__ void advance(float u) {
    float g[kRank + 1] = {};
    if constexpr (kRank > 0) {
      float a[kRank] = {};
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int k = 0; k < kRank; ++k) a[k] += dot(pole[i].right[k], pole[i].h);
      sum_over_channel<Kind>(a);
#pragma unroll
      for (int k = 0; k < kRank; ++k) a[k] = fmaf(of_input[k], u, a[k]);
#pragma unroll
      for (int j = 0; j < kRank; ++j) {
        g[j] = inner[j * kRank] * a[0];
        if constexpr (kRank == 2) g[j] = fmaf(inner[j * kRank + 1], a[1], g[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      S4StepPole<Kind>& p = pole[i];
      Complex change = p.decay * p.h + u * p.input;
#pragma unroll
      for (int k = 0; k < kRank; ++k) change = change - g[k] * p.left[k];
      p.h = p.h + change;
    }
  }
};

template <class T>
__device__ void clear_slack(const S4Step& s, int64_t block) {
  const int64_t row = int64_t(s.filters) * s.channels;
  const int64_t begin = span_of(s.cu_seqlens, s.sequences, s.total, s.sequences).begin * row, end = s.total * row;
  for (int64_t i = begin + block * blockDim.x + threadIdx.x; i < end; i += int64_t(kClearBlocks) * blockDim.x) {
    static_cast<T*>(s.out)[i] = T(0.0f);
  }
}

template <class Kind>
__global__ void __launch_bounds__(Kind::kThreads) s4_step_kernel(const __grid_constant__ S4StepParams params) {
  using T = typename Kind::T;
  const S4Step& s = params.call;
  if (blockIdx.x >= params.blocks) return clear_slack<T>(s, blockIdx.x - params.blocks);
  const int64_t group = int64_t(blockIdx.x) * Kind::kChannels + threadIdx.x / Kind::kLanes;
  if (group >= params.groups) return;
  const int lane = int(threadIdx.x % Kind::kLanes);
  const int64_t sequence = group / s.channels, channel = group % s.channels;
  const Span span = span_of(s.cu_seqlens, s.sequences, s.total, sequence);
  if (span.size() == 0) return;
  T* const out = static_cast<T*>(s.out) + channel;
  const int64_t slot = s.indices ? s.indices[sequence] : sequence;
  if (slot < 0 || slot >= s.slots) {
    for (int64_t i = span.begin * s.filters + lane; i < span.end * s.filters; i += Kind::kLanes) {
      out[i * s.channels] = T(0.0f);
    }
    return;
  }

  S4StepChannel<Kind> state(s, channel, lane);
  Complex* const pool = static_cast<Complex*>(s.pool) + (slot * s.channels + channel) * s.poles;
  const auto is_pole = [&](int i) { return lane + i * Kind::kLanes < s.poles; };
#pragma unroll
  for (int i = 0; i < Kind::kPer; ++i)
    if (is_pole(i)) state.pole[i].h = pool[lane + i * Kind::kLanes];
  const T* const u_of = static_cast<const T*>(s.u.data) + channel;
  const float* const D = static_cast<const float*>(s.D);
#pragma unroll 1
  for (int64_t t = span.begin; t < span.end; ++t) {
    const float u = float(u_of[t * s.u.token]);
    state.advance(u);
#pragma unroll 1
    for (int f = 0; f < s.filters; ++f) {
      const int64_t row = f * s.channels + channel;
      const Complex* const C = static_cast<const Complex*>(s.C) + row * s.poles + lane;
      float y[1] = {0.0f};
#pragma unroll
      for (int i = 0; i < Kind::kPer; ++i)
        if (is_pole(i)) y[0] += dot(conj(C[i * Kind::kLanes]), state.pole[i].h);
      sum_over_channel<Kind>(y);
      if (lane == 0) {
        const float sum = 2.0f * y[0];
        out[(t * s.filters + f) * s.channels] = T(D ? fmaf(D[row], u, sum) : sum);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Kind::kPer; ++i)
    if (is_pole(i)) pool[lane + i * Kind::kLanes] = state.pole[i].h;
}

}  // namespace

template <class Kind>
void launch_s4_step(const S4Step& s, cudaStream_t stream) {
  const int64_t groups = s.sequences * s.channels, blocks = divide_up(groups, Kind::kChannels);
  const S4StepParams params = {.call = s, .groups = groups, .blocks = blocks};
  launch("s4_step", s4_step_kernel<Kind>, blocks + kClearBlocks, Kind::kThreads, 0, stream, params);
}

}  // namespace packseq
