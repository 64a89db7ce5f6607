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
//
// Beside a chunk's states, whose decays wait for the special functions, the terms and the tokens' gradients of the
// chunk behind it are finished; beside its gradients, the steps of the chunk before are made.
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
  static constexpr int kGroups = M::kChunk / M::kGroup;
  struct Chunk {
    float2 steps[kScanWarps][M::kChunk][M::kWarpChannels];  // d, d u
    float g[kScanWarps][M::kChunk][M::kWarpChannels];
    struct {  // what a lane needs of its own tokens at last
      Few<float, M::kC> slope[kScanThreads], gate_slope[kScanThreads], u[kScanThreads];
    } kept[kGroups];
  };
  Chunk chunks[2];  // the one whose gradients are computed, and the one before or behind it
  struct Inputs {
    typename InputRows<M, M::kFetchBack>::Slot u, delta, z, dout;
  };
  Inputs inputs[2][kScanWarps];
  struct Sums {
    LaneSums<M> y, input, exponent;
  };
  Sums sums[kScanWarps][kGroups];
  typename Checkpoints<M>::Slot start;  // the state before the next chunk
  ChannelTerms<M> terms;                // of dB and dC
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

  // Adds a part of the channels up: the chunk's tokens are as many parts.
  __device__ void add(const ChannelTerms<M>& terms, int part) {
    constexpr int kRows = kScanWarps * M::Channels::kCount, kOfPart = kRows / M::kChunk;
    static_assert(kOfPart * M::kChunk == kRows);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (part == 0) sums_[i] = {};
#pragma unroll
      for (int row = part * kOfPart; row < (part + 1) * kOfPart; ++row) {
        const Run more = *reinterpret_cast<const Run*>(&terms[row][item(i)]);
#pragma unroll
        for (int k = 0; k < kRun; ++k) sums_[i].x[k] = multiply_add(1.0f, more.x[k], sums_[i].x[k]);
      }
    }
  }
  // Stores the sums, and goes on to the chunk before.
  __device__ void store(int first, int count) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = item(i) / (2 * M::kN), n = item(i) % (2 * M::kN);
      if (first + t < count) *reinterpret_cast<Run*>(at_ + t * row_ + n) = sums_[i];
    }
    at_ -= M::kChunk * row_;
  }

 private:
  static __device__ int item(int i) { return (i * kScanThreads + threadIdx.x) * kRun; }

  const int64_t row_;
  X* at_;
  Run sums_[kEach];
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
  const bool has_z = p.z.data, soft = p.delta_softplus, own_token = M::States::index() < kGroup;
  const ConstantMatrices<M> constants(p, at);
  constexpr bool kBeside = M::kL <= 8;  // beside more states there is no room for sums of shares
  constexpr int kRunChunks = M::kFetchBack / kChunk;
  using Inputs = InputRows<M, M::kFetchBack>;
  const bool wide = grid.aligned_rows;
  const auto rows = [&](const Rows& x) { return Inputs(x, p.dtype, at, walk, wide, (chunks - 1) / kRunChunks, -1); };
  Inputs u = rows(p.u), delta = rows(p.delta), z = rows(p.z), dout = rows(dout_rows);
  OutputPlace<M> place(p, at, walk, last_group + kGroups, -1);
  const int own_rows = own_token && at.mine > 0 ? walk.count - at.token : 0;  // from the lane's first token on
  const auto valid = [&](int group) { return group * kGroup < own_rows; };

  const auto fetch = [&](int run) {
    auto& in = shared.inputs[run & 1][at.warp];
    const int rest = run < 0 ? 0 : walk.count - run * M::kFetchBack;
    u.fetch(in.u, rest, at.of_warp, wide, p.dtype);
    delta.fetch(in.delta, rest, at.of_warp, wide, p.dtype);
    if (has_z) z.fetch(in.z, rest, at.of_warp, wide, p.dtype);
    dout.fetch(in.dout, rest, at.of_warp, wide, p.dtype);
  };

  // Steps, gradients of y and what else is needed of a group's tokens, in as many parts as a group has tokens.
  SoftplusParts<Element<typename M::T>::kExact> softplus[kC];
  float open[kC];
  const auto stage = [&](int chunk, int q, int part) {
    const auto& in = shared.inputs[(chunk / kRunChunks) & 1][at.warp];
    const int token = (unsigned(chunk) % kRunChunks * kGroups + q) * kGroup + at.token;
    const auto u_in = Inputs::at(in.u, token, at), delta_in = Inputs::at(in.delta, token, at),
               z_in = Inputs::at(in.z, token, at), dout_in = Inputs::at(in.dout, token, at);
    Few<float2, kC> step;
    Few<float, kC> gradient, gate_slope, slope, u_of;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (part == 0) {
        softplus[c].start(delta_in[c] + params.delta_bias[c]);
        open[c] = exp2_approx(-z_in[c] * kScanLog2e);
      } else if (part == 1) {
        open[c] = reciprocal_approx(1.0f + open[c]);
      }
      softplus[c].run(part);
      if (part == kSoftplusParts - 1) {
        const float dy = dout_in[c], gate = z_in[c],
                    d = select(valid(chunk * kGroups + q), softplus[c].value(soft), 0.0f);
        u_of.x[c] = u_in[c];
        slope.x[c] = softplus[c].slope(soft);
        gradient.x[c] = select(has_z, dy * (gate * open[c]), dy);
        gate_slope.x[c] = dy * (open[c] * fmaf(gate, 1.0f - open[c], 1.0f));
        step.x[c] = {d, d * u_of.x[c]};  // beyond the end: decay 1, input 0
      }
    }
    if (part == kSoftplusParts - 1) {
      auto& of_chunk = shared.chunks[chunk & 1];
      auto& kept = of_chunk.kept[q];
      kept.slope[threadIdx.x] = slope, kept.gate_slope[threadIdx.x] = gate_slope, kept.u[threadIdx.x] = u_of;
      if (own_token) {
        const int t = q * kGroup + at.token;
        *reinterpret_cast<Few<float2, kC>*>(&of_chunk.steps[at.warp][t][at.in_warp]) = step;
        *reinterpret_cast<Few<float, kC>*>(&of_chunk.g[at.warp][t][at.in_warp]) = gradient;
      }
    }
  };
  // The gradients of a group's tokens, once their sums over states are there.
  const auto finish = [&](int chunk, int q) {
    const auto& of_chunk = shared.chunks[chunk & 1];
    const auto& kept = of_chunk.kept[q];
    const auto& of_group = shared.sums[at.warp][q];
    const int t = q * kGroup + at.token, group = chunk * kGroups + q;
    const auto step = *reinterpret_cast<const Few<float2, kC>*>(&of_chunk.steps[at.warp][t][at.in_warp]);
    const auto g = *reinterpret_cast<const Few<float, kC>*>(&of_chunk.g[at.warp][t][at.in_warp]);
    const auto slope = kept.slope[threadIdx.x], gate_slope = kept.gate_slope[threadIdx.x], x = kept.u[threadIdx.x];
    float y[kC], input[kC], exponent[kC], to_u[kC], to_delta[kC], to_z[kC];
    of_group.y.get(y, at.token);
    of_group.input.get(input, at.token);
    of_group.exponent.get(exponent, at.token);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      to_u[c] = fmaf(params.D[c], g.x[c], input[c] * step.x[c].x);
      to_delta[c] = select(valid(group), fmaf(input[c], x.x[c], kScanLn2 * exponent[c]) * slope.x[c], 0.0f);
      to_z[c] = gate_slope.x[c] * fmaf(params.D[c], x.x[c], y[c]);
      sums.D[c] = fmaf(g.x[c], x.x[c], sums.D[c]);
      sums.delta_bias[c] += to_delta[c];
    }
    place.store(to.du, to_u, valid(group));
    place.store(to.ddelta, to_delta, valid(group));
    place.store(to.dz, to_z, valid(group) && has_z);
    place.next();
  };

  __syncthreads();  // whoever used the shared memory before is done
  MatrixTiles<M, kChunk> matrices(p, at.group, walk, grid.aligned_matrices, (chunks - 1) * kChunk, -1);
  matrices.fetch(shared.matrix_stage);
  MatrixShares<M> shares(to.matrices, p, at.group, walk, chunks * kChunk);
  const auto add_shares = [&](int chunk) {
#pragma unroll
    for (int part = 0; part < kChunk; ++part) shares.add(shared.terms, part);
    if (to.matrices) shares.store(chunk * kChunk, walk.count);
  };
  X start[kC][kS];
  fetch((chunks - 1) / kRunChunks);
  if ((chunks - 1) % kRunChunks == 0) fetch((chunks - 1) / kRunChunks - 1);
  checkpoints.fetch(chunks - 1, shared.start);
  checkpoints.read(shared.start, start);
  matrices.put(shared.matrix_stage, shared.matrices[(chunks - 1) & 1]);
  __syncwarp();
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
#pragma unroll
    for (int part = 0; part < kSoftplusParts; ++part) stage(chunks - 1, q, part);
    // Behind the last chunk there is nothing.
    auto& behind = shared.chunks[chunks & 1];
    behind.kept[q].u[threadIdx.x] = {};
    if (own_token) *reinterpret_cast<Few<float, kC>*>(&behind.g[at.warp][q * kGroup + at.token][at.in_warp]) = {};
  }
  __syncthreads();

  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const auto& matrix = shared.matrices[chunk & 1].matrix;
    X* const own_terms = shared.terms[at.warp * M::Channels::kCount + M::Channels::index()] + at.state;
    const auto& steps = shared.chunks[chunk & 1].steps[at.warp];
    const auto& gradients = shared.chunks[chunk & 1].g[at.warp];
    if (chunk > 0) {
      matrices.fetch(shared.matrix_stage);
      checkpoints.fetch(chunk - 1, shared.start, false);
    }
    if ((chunk - 1) % kRunChunks == 0) fetch((chunk - 1) / kRunChunks - 1);
    copy_async_commit();

    if (!kBeside) add_shares(chunk + 1);

    // Forward over the chunk; beside that, what is left of the one behind it.
    X a[kChunk][kC][kS], h[kChunk][kC][kS];
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      float y[kC][kGroup] = {};
#pragma unroll
      for (int in_group = 0; in_group < kGroup; ++in_group) {
        const int t = q * kGroup + in_group;
        X B[kS], C[kS];
        constants.load_B(B, matrix[0][t], at);
        constants.load_C(C, matrix[1][t], at);
        const auto step = *reinterpret_cast<const Few<float2, kC>*>(&steps[t][at.in_warp]);
#pragma unroll
        for (int c = 0; c < kC; ++c)
#pragma unroll
          for (int j = 0; j < kS; ++j) {
            const X before = t == 0 ? start[c][j] : h[t == 0 ? 0 : t - 1][c][j];
            a[t][c][j] = decay(step.x[c].x, params.A[c][j]);
            h[t][c][j] = multiply_add(a[t][c][j], before, scaled(step.x[c].y, B[j]));
            y[c][in_group] = add_product(C[j], h[t][c][j], y[c][in_group]);
          }
        if (kBeside) shares.add(shared.terms, t);
        if (q == 0 && in_group < kGroups) finish(chunk + 1, kGroups - 1 - in_group);
      }
      if (q == 0) __syncwarp();  // the sums have been read
      shared.sums[at.warp][q].y.put(y);
    }
    if (kBeside && to.matrices) shares.store((chunk + 1) * kChunk, walk.count);
    __syncthreads();  // the terms have been read

    // And back; beside that, the steps of the chunk before.
#pragma unroll
    for (int q = kGroups - 1; q >= 0; --q) {
      float input[kC][kGroup] = {}, exponent[kC][kGroup] = {};  // d(d u), and d(d) through the decay over ln 2
#pragma unroll
      for (int in_group = kGroup - 1; in_group >= 0; --in_group) {
        const int t = q * kGroup + in_group;
        X B[kS], C[kS], dB[kS] = {}, dC[kS] = {};
        constants.load_B(B, matrix[0][t], at);
        constants.load_C(C, matrix[1][t], at);
        const auto step = *reinterpret_cast<const Few<float2, kC>*>(&steps[t][at.in_warp]);
        const auto dy = *reinterpret_cast<const Few<float, kC>*>(&gradients[t][at.in_warp]);
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
        if (kGroup - 1 - in_group < kSoftplusParts) stage(chunk - 1, q, kGroup - 1 - in_group);
      }
      shared.sums[at.warp][q].input.put(input);
      shared.sums[at.warp][q].exponent.put(exponent);
    }

    if (chunk > 0) {
      checkpoints.read(shared.start, start);
      matrices.put(shared.matrix_stage, shared.matrices[(chunk - 1) & 1]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int q = kGroups - 1; q >= 0; --q) finish(0, q);
  add_shares(0);
  copy_async_wait<0>();
}

}  // namespace packseq
