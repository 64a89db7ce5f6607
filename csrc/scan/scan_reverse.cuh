// The second half of the backward: back over the sequence, a chunk of kChunk tokens at a time. A chunk's states are
// computed again from the checkpoint before it and stay in registers, with their decays; then, token by token from the
// last one, with g the gradient of y and G that of a state,
//
//   G = g conj(C) + G'    dC += g conj(h)    dB += d u G    d(d u) += conj(B) G
//   G' = conj(a) G        x = G' conj(h before)             dA += d x        d(d) += conj(A) x
//
// Sums over states are sums over lanes. dB and dC are sums over channels: every thread leaves its terms of a chunk in
// shared memory, where they are added up in the order of the channels, which takes fewer instructions than shuffles;
// each block writes its share, and sum_matrices_kernel adds the shares up.
#pragma once
#include "scan/scan_walk.cuh"

namespace packseq {

// The terms of dB, then dC, of every thread that has states of its own, for each token of a chunk. The padding puts
// neighbouring channels into other banks.
template <class M>
using ChannelTerms =
    typename M::X[kScanWarps * M::Channels::kCount][M::kChunk * 2 * M::kN + 32 / sizeof(typename M::X)];

template <class M>
struct alignas(16) ReverseShared {
  using X = typename M::X;
  typename MatrixTiles<M, M::kChunk>::Buffer matrices[2];
  typename MatrixTiles<M, M::kChunk>::Stage matrix_stage;
  float2 steps[kScanWarps][M::kChunk][M::kWarpChannels];  // d, d u
  float g[kScanWarps][M::kChunk][M::kWarpChannels];
  struct Inputs {
    typename Column<M>::Values u, delta, z, dout;
  };
  Inputs inputs[2][M::kChunk / M::kGroup][kScanThreads];
  typename Checkpoints<M>::Slot start;  // the state before the next chunk
  static constexpr int kTermBuffers = M::kN > 16 ? 1 : 2;
  ChannelTerms<M> terms[kTermBuffers];  // of dB and dC
};

// A thread's shares of gradients that belong to no token.
template <class M>
struct ParameterGradients {
  typename M::X A[M::kC][M::kS] = {};
  typename M::X B[M::kC][M::kS] = {}, C[M::kC][M::kS] = {};  // where constant
  float D[M::kC] = {}, delta_bias[M::kC] = {};               // over the lane's tokens
};

template <class M>
struct ReverseTargets {
  void *du, *ddelta, *dz;   // dz may be nullptr
  typename M::X* matrices;  // the block's shares of dB and dC: [total, groups, 2, kN], nullptr where both are constant
};

// Adds the terms of a chunk up and stores the sums.
template <class M>
class MatrixShares {
  using X = typename M::X;
  static constexpr int kItems = M::kChunk * 2 * M::kN, kWidest = 16 / sizeof(X);
  static constexpr int kRun = kItems / kScanThreads < kWidest ? kItems / kScanThreads : kWidest;
  static constexpr int kEach = kItems / (kRun * kScanThreads);
  static_assert(kEach * kRun * kScanThreads == kItems);
  using Run = Few<X, kRun>;

 public:
  // Begins with the chunk at `first`.
  __device__ MatrixShares(X* data, const ScanProblem& p, int group, const Walk& walk, int first)
      : row_(int64_t(walk.direction) * p.groups * (2 * M::kN)),
        at_(data + (walk.row(first) * p.groups + group) * (2 * M::kN)) {}

  __device__ void store(const ChannelTerms<M>& terms, int first, int count) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int item = (i * kScanThreads + threadIdx.x) * kRun, t = item / (2 * M::kN), n = item % (2 * M::kN);
      Run sum = {};
#pragma unroll
      for (const auto& of_channels : terms) {
        const Run more = *reinterpret_cast<const Run*>(&of_channels[item]);
#pragma unroll
        for (int k = 0; k < kRun; ++k) sum.x[k] = multiply_add(1.0f, more.x[k], sum.x[k]);
      }
      if (first + t < count) *reinterpret_cast<Run*>(at_ + t * row_ + n) = sum;
    }
    at_ -= M::kChunk * row_;
  }

 private:
  const int64_t row_;
  X* at_;
};

// carry: in, the gradient of the final state; out, that of the initial one.
template <class M>
__device__ __forceinline__ void walk_gradients(const ScanProblem& p, const Rows& dout_rows, const ScanGrid& grid,
                                               const Position<M>& at, const Walk& walk,
                                               const ChannelParameters<M>& params, const Checkpoints<M>& checkpoints,
                                               ReverseShared<M>& shared, typename M::X (&carry)[M::kC][M::kS],
                                               const ReverseTargets<M>& to, ParameterGradients<M>& sums) {
  using X = typename M::X;
  constexpr int kC = M::kC, kS = M::kS, kGroup = M::kGroup, kChunk = M::kChunk, kGroups = kChunk / kGroup;
  const int chunks = (walk.count + kChunk - 1) / kChunk, last_group = chunks * kGroups - 1;
  const float threshold = softplus_threshold(p.delta_softplus);
  const bool has_z = p.z.data, own_token = M::States::index() < kGroup;
  const ConstantMatrices<M> constants(p, at);
  const auto column = [&](const Rows& x) { return Column<M>(x, p.dtype, at, walk, last_group, -1); };
  Column<M> u = column(p.u), delta = column(p.delta), z = column(p.z), dout = column(dout_rows);
  Column<M> du = column({to.du, p.channels}), ddelta = column({to.ddelta, p.channels}),
            dz = column({to.dz, p.channels});
  const auto valid = [&](int group) { return group * kGroup + at.token < walk.count; };

  // A chunk's groups, the last one first. A lane copies its own values.
  const auto fetch = [&](int chunk) {
#pragma unroll
    for (int q = kGroups - 1; q >= 0; --q) {
      const bool there = valid(chunk * kGroups + q);
      auto& in = shared.inputs[chunk % 2][q][threadIdx.x];
      u.fetch(in.u, there, at.mine);
      delta.fetch(in.delta, there, at.mine);
      z.fetch(in.z, there && has_z, at.mine);
      dout.fetch(in.dout, there, at.mine);
    }
  };

  __syncthreads();  // whoever used the shared memory before is done
  MatrixTiles<M, kChunk> matrices(p, at.group, walk, grid.aligned_matrices, (chunks - 1) * kChunk, -1);
  matrices.fetch(shared.matrix_stage);
  MatrixShares<M> shares(to.matrices, p, at.group, walk, (chunks - 1) * kChunk);
  X start[kC][kS];
  fetch(chunks - 1);
  checkpoints.fetch(chunks - 1, shared.start);
  checkpoints.read(shared.start, start);
  matrices.put(shared.matrix_stage, shared.matrices[(chunks - 1) % 2]);
  __syncthreads();

  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const auto& matrix = shared.matrices[chunk % 2].matrix;
    auto& terms = shared.terms[chunk % ReverseShared<M>::kTermBuffers];
    X* const own_terms = terms[at.warp * M::Channels::kCount + M::Channels::index()] + at.state;
    float d[kGroups][kC], slope[kGroups][kC], g[kGroups][kC], gate_slope[kGroups][kC];  // of the lane's tokens
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      const auto in = shared.inputs[chunk % 2][q][threadIdx.x];
      Few<float2, kC> step;
      Few<float, kC> gradient;
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        const float x = in.delta[c] + params.delta_bias[c], gate = in.z[c];
        const Softplus s = softplus<Element<typename M::T>::kExact, true>(x, threshold);
        const float dy = in.dout[c], open = sigmoid(gate);
        const bool there = valid(chunk * kGroups + q) && c < at.mine;
        d[q][c] = select(there, s.value, 0.0f);  // beyond the end: decay 1, input 0
        slope[q][c] = s.slope;
        g[q][c] = select(has_z, dy * (gate * open), dy);
        gate_slope[q][c] = dy * (open * fmaf(gate, 1.0f - open, 1.0f));
        step.x[c] = {d[q][c], d[q][c] * in.u[c]};
        gradient.x[c] = g[q][c];
      }
      if (own_token) {
        const int t = q * kGroup + at.token;
        *reinterpret_cast<Few<float2, kC>*>(&shared.steps[at.warp][t][at.in_warp]) = step;
        *reinterpret_cast<Few<float, kC>*>(&shared.g[at.warp][t][at.in_warp]) = gradient;
      }
    }
    __syncwarp();
    if (chunk > 0) {
      matrices.fetch(shared.matrix_stage);
      fetch(chunk - 1);
      checkpoints.fetch(chunk - 1, shared.start);
    }

    // Forward over the chunk.
    X a[kChunk][kC][kS], h[kChunk][kC][kS];
    float y[kGroups][kC][kGroup] = {};
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      X B[kS], C[kS];
      constants.load_B(B, matrix[0][t], at);
      constants.load_C(C, matrix[1][t], at);
      const auto step = *reinterpret_cast<const Few<float2, kC>*>(&shared.steps[at.warp][t][at.in_warp]);
#pragma unroll
      for (int c = 0; c < kC; ++c)
#pragma unroll
        for (int j = 0; j < kS; ++j) {
          const X before = t == 0 ? start[c][j] : h[t == 0 ? 0 : t - 1][c][j];
          a[t][c][j] = decay(step.x[c].x, params.A[c][j]);
          h[t][c][j] = multiply_add(a[t][c][j], before, scaled(step.x[c].y, B[j]));
          y[t / kGroup][c][t % kGroup] = add_product(C[j], h[t][c][j], y[t / kGroup][c][t % kGroup]);
        }
    }
#pragma unroll
    for (int q = 0; q < kGroups; ++q)
#pragma unroll
      for (int c = 0; c < kC; ++c) sum_over_lanes<typename M::States>(y[q][c]);

        // And back.
#pragma unroll
    for (int q = kGroups - 1; q >= 0; --q) {
      float input[kC][kGroup] = {}, exponent[kC][kGroup] = {};  // d(d u), and d(d) through the decay over ln 2
#pragma unroll
      for (int in_group = kGroup - 1; in_group >= 0; --in_group) {
        const int t = q * kGroup + in_group;
        X B[kS], C[kS], dB[kS] = {}, dC[kS] = {};
        constants.load_B(B, matrix[0][t], at);
        constants.load_C(C, matrix[1][t], at);
        const auto step = *reinterpret_cast<const Few<float2, kC>*>(&shared.steps[at.warp][t][at.in_warp]);
        const auto dy = *reinterpret_cast<const Few<float, kC>*>(&shared.g[at.warp][t][at.in_warp]);
#pragma unroll
        for (int c = 0; c < kC; ++c)
#pragma unroll
          for (int j = 0; j < kS; ++j) {
            const X before = t == 0 ? start[c][j] : h[t == 0 ? 0 : t - 1][c][j];
            const X G = multiply_add(dy.x[c], conjugate(C[j]), carry[c][j]);
            dC[j] = multiply_add(kOutputFactor<X> * dy.x[c], conjugate(h[t][c][j]), dC[j]);
            dB[j] = multiply_add(step.x[c].y, G, dB[j]);
            input[c][in_group] = add_conjugate_product(G, B[j], input[c][in_group]);
            carry[c][j] = times_conjugate(G, a[t][c][j]);
            const X x = times_conjugate(carry[c][j], before);
            sums.A[c][j] = multiply_add(step.x[c].x, x, sums.A[c][j]);
            exponent[c][in_group] = add_exponent_product(x, params.A[c][j], exponent[c][in_group]);
          }
        if constexpr (M::kAny) {
#pragma unroll
          for (int j = 0; j < kS; ++j) {
            sums.B[0][j] = multiply_add(1.0f, dB[j], sums.B[0][j]);
            sums.C[0][j] = multiply_add(1.0f, dC[j], sums.C[0][j]);
          }
        }
        Few<X, kS> of_B, of_C;
#pragma unroll
        for (int j = 0; j < kS; ++j) of_B.x[j] = dB[j], of_C.x[j] = dC[j];
        *reinterpret_cast<Few<X, kS>*>(own_terms + (2 * t) * M::kN) = of_B;
        *reinterpret_cast<Few<X, kS>*>(own_terms + (2 * t + 1) * M::kN) = of_C;
      }
      const int group = chunk * kGroups + q;
      const auto u_of = shared.inputs[chunk % 2][q][threadIdx.x].u;
      float to_u[kC], to_delta[kC], to_z[kC];
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        sum_over_lanes<typename M::States>(input[c]);
        sum_over_lanes<typename M::States>(exponent[c]);
        const float x = u_of[c];
        to_u[c] = fmaf(params.D[c], g[q][c], input[c][0] * d[q][c]);
        to_delta[c] = select(valid(group), fmaf(input[c][0], x, kScanLn2 * exponent[c][0]) * slope[q][c], 0.0f);
        to_z[c] = gate_slope[q][c] * fmaf(params.D[c], x, y[q][c][0]);
        sums.D[c] = fmaf(g[q][c], x, sums.D[c]);
        sums.delta_bias[c] += to_delta[c];
      }
      const bool there = valid(group) && own_token;
      du.store(to_u, there, at.mine);
      ddelta.store(to_delta, there, at.mine);
      dz.store(to_z, there && has_z, at.mine);
    }

    if (chunk > 0) {
      checkpoints.read(shared.start, start);
      matrices.put(shared.matrix_stage, shared.matrices[(chunk - 1) % 2]);
    }
    __syncthreads();
    if (to.matrices) shares.store(terms, chunk * kChunk, walk.count);
    if (ReverseShared<M>::kTermBuffers == 1) __syncthreads();
  }
}

}  // namespace packseq
