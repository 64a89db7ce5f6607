// The scan from states in a pool and back into it, for few tokens of many sequences: bound by the bytes of the states,
// which are read and written once.
#pragma once
#include "core/launch.h"
#include "scan/scan_fill.cuh"
#include "scan/scan_tile.cuh"

namespace packseq {

// States of one token of B or C, or constant ones.
template <class M>
__device__ __forceinline__ void load_token_states(typename M::X (&x)[1][M::kS], const StateMatrix& m, int64_t row,
                                                  const Position<M>& at, const ScanProblem& p) {
  if (m.constants) return load_parameter<M>(x, m.constants, 0, at, p.states);
  using Item = Element<AnyType>;
  const int64_t first = row * m.tokens.token + at.group * m.tokens.head + at.state;
#pragma unroll
  for (int j = 0; j < M::kS; ++j) {
    x[0][j] = {};
    if (at.state + j >= p.states) continue;
    if constexpr (std::is_same_v<typename M::X, Complex>) {
      x[0][j] = static_cast<const Complex*>(m.tokens.data)[first + j];
    } else {
      x[0][j] = Item::load(static_cast<const char*>(m.tokens.data) + (first + j) * Item::bytes(p.dtype), p.dtype);
    }
  }
}

struct StepParams {
  ScanStep call;
  int32_t blocks;  // of channels, in all groups
};

__host__ __device__ inline int64_t step_blocks(const StepParams& params) {
  return params.call.problem.sequences * params.blocks;
}

template <class Mapping>
__global__ void __launch_bounds__(kScanThreads) scan_step_kernel(const __grid_constant__ StepParams params) {
  using M = ScanMapping<Mapping>;
  using X = typename M::X;
  using Item = Element<AnyType>;
  static_assert(M::kC == 1 && M::kAny);
  const ScanProblem& p = params.call.problem;
  const int item = Item::bytes(p.dtype);
  if (blockIdx.x >= step_blocks(params)) {
    const Fill slack = {
        .rows = {{params.call.out, int64_t(p.channels) * item}}, .states = nullptr, .from = nullptr, .state_words = 0};
    return fill(slack, p, blockIdx.x - step_blocks(params));
  }
  const Position<M> at(p, int(blockIdx.x % params.blocks));
  const int64_t sequence = blockIdx.x / params.blocks;
  const Span span = span_of(p.cu_seqlens, p.sequences, p.total, sequence);
  if (span.size() == 0) return;
  const int64_t slot = params.call.indices ? params.call.indices[sequence] : sequence;
  const bool known = slot >= 0 && slot < params.call.slots;

  X A[1][M::kS], h[1][M::kS] = {};
  float D[1], delta_bias[1];
  if (known) load_parameter<M>(h, params.call.pool, slot * p.channels, at, p.states);
  load_parameter<M>(A, p.A, 0, at, p.states);
  load_vector<M>(D, p.D, at);
  load_vector<M>(delta_bias, p.delta_bias, at);
#pragma unroll
  for (int j = 0; j < M::kS; ++j) A[0][j] = to_exponent(A[0][j]);

  const auto element = [&](const Rows& x, int64_t row) {
    return at.mine ? Item::load(static_cast<const char*>(x.data) + (row * x.token + at.channel) * item, p.dtype) : 0.0f;
  };
  for (int64_t row = span.begin; row < span.end; ++row) {
    float y[1] = {0.0f};
    if (known) {
      const float u = element(p.u, row), x = element(p.delta, row) + delta_bias[0];
      const float d = softplus<true>(x, p.delta_softplus);
      X B[1][M::kS], C[1][M::kS];
      load_token_states<M>(B, p.B, row, at, p);
      load_token_states<M>(C, p.C, row, at, p);
#pragma unroll
      for (int j = 0; j < M::kS; ++j) {
        h[0][j] = multiply_add(decay(d, A[0][j]), h[0][j], scaled(d * u, B[0][j]));
        y[0] = add_product(C[0][j], h[0][j], y[0]);
      }
      sum_over_lanes<typename M::States>(y);
      y[0] = fmaf(D[0], u, kOutputFactor<X> * y[0]);
      if (p.z.data) {
        const float gate = element(p.z, row);
        y[0] *= gate * sigmoid(gate);
      }
    }
    if (at.mine && at.state == 0) {
      Item::store(static_cast<char*>(params.call.out) + (row * p.channels + at.channel) * item, y[0], p.dtype);
    }
  }
  if (known) store_parameter<M>(h, params.call.pool, slot * p.channels, at, p.states);
}

template <class Mapping>
void launch_scan_step(const ScanStep& call, cudaStream_t stream) {
  const StepParams params = {.call = call, .blocks = channel_blocks<Mapping>(call.problem)};
  launch("scan step", scan_step_kernel<Mapping>, step_blocks(params) + kFillBlocks, kScanThreads, 0, stream, params);
}

}  // namespace packseq
