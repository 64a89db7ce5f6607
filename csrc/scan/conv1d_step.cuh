// The causal convolution's step: a thread owns some channels of a few sequences, whose states it updates in place.
#pragma once
#include "scan/conv1d_walk.cuh"

namespace packseq {
namespace {

struct Conv1dStepParams {
  Conv1dStep call;
  int columns;     // vectors of channels
  int64_t groups;  // of sequences: those that the same threads take, one after another
  int64_t blocks;  // those after them clear the slack
};

constexpr int kClearBlocks = 64;

template <class T>
__device__ void clear_slack(const Conv1dStep& s, int64_t first_block) {
  const Conv1dProblem& p = s.problem;
  const int64_t begin = conv_span(p, p.sequences).begin * p.channels, end = p.total * p.channels;
  const int64_t thread = (blockIdx.x - first_block) * kConvThreads + threadIdx.x;
  for (int64_t i = begin + thread; i < end; i += kClearBlocks * kConvThreads) static_cast<T*>(s.out)[i] = T(0.f);
}

template <class T, int kVec, int kWidth>
__global__ void __launch_bounds__(kConvThreads) conv1d_step_kernel(const __grid_constant__ Conv1dStepParams params) {
  using Vector = ConvVector<T, kVec>;
  constexpr int kState = kWidth - 1;
  const Conv1dStep& s = params.call;
  const Conv1dProblem& p = s.problem;
  if (blockIdx.x >= params.blocks) return clear_slack<T>(s, params.blocks);
  const int64_t thread = int64_t(blockIdx.x) * kConvThreads + threadIdx.x, first = thread / params.columns;
  if (first >= params.groups) return;
  const int c = int(thread % params.columns) * kVec;
  const ConvTaps<kVec, kWidth> taps(p, c);
  for (int64_t i = first; i < p.sequences; i += params.groups) {
    const Span span = conv_span(p, i);
    const int64_t slot = s.indices ? s.indices[i] : i;
    const bool known = slot >= 0 && slot < s.slots;
    if (span.size() == 0) continue;
    T* const state = known ? static_cast<T*>(s.pool) + (slot * p.channels + c) * kState : nullptr;
    float window[kWidth][kVec];
    load_state<T, kVec, kWidth>(state, window);
    for (int64_t t = 0; t < span.size(); ++t) {
      const int64_t row = row_at(p, span, t);
      Vector result = Vector::zero();
      if (known) {
        Vector::load_constant(static_cast<const T*>(p.x.data) + row * p.x.token + c).widen(window[kState]);
        float y[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          y[v] = taps.apply(window, v);
          if (p.silu) y[v] *= sigmoid(y[v]);
        }
        result = Vector::narrow(y);
        advance<kVec, kWidth>(window);
      }
      result.store(static_cast<T*>(s.out) + row * p.channels + c);
    }
    if (!known) continue;
    float values[kState * kVec];
#pragma unroll
    for (int j = 0; j < kState; ++j)
#pragma unroll
      for (int v = 0; v < kVec; ++v) values[v * kState + j] = window[j][v];
#pragma unroll
    for (int j = 0; j < kState; ++j) Vector::narrow(values + j * kVec).store(state + j * kVec);
  }
}

}  // namespace
}  // namespace packseq
