// The causal convolution's forward kernel.
#pragma once
#include "scan/conv1d_walk.cuh"

namespace packseq {
namespace {

struct Conv1dForwardParams {
  Conv1dForward call;
  ConvGrid grid;
};

// One value of the final states after another: from the rows, or from what is left of the initial state.
template <class T, int kWidth>
__device__ void write_final_states(const Conv1dForward& f, int64_t first_block) {
  constexpr int kState = kWidth - 1;
  const Conv1dProblem& p = f.problem;
  int64_t i;
  int c;
  if (!state_place(p, first_block, &i, &c)) return;
  const Span span = conv_span(p, i);
  const int64_t at = (i * p.channels + c) * kState;
#pragma unroll
  for (int j = 0; j < kState; ++j) {
    const int64_t t = span.size() - kState + j;
    T value{};
    if (t >= 0) {
      value = static_cast<const T*>(p.x.data)[row_at(p, span, t) * p.x.token + c];
    } else if (p.initial_states) {
      value = static_cast<const T*>(p.initial_states)[at + kState + t];
    }
    static_cast<T*>(f.final_states)[at + j] = value;
  }
}

// Blocks after the grid's write the final states.
template <class T, int kVec, int kWidth>
__global__ void __launch_bounds__(kConvThreads, kVec* kWidth <= 32 ? 4 : 1)
    conv1d_forward_kernel(const __grid_constant__ Conv1dForwardParams params) {
  const Conv1dForward& f = params.call;
  const Conv1dProblem& p = f.problem;
  if (blockIdx.x >= params.grid.blocks) return write_final_states<T, kWidth>(f, params.grid.blocks);
  const ConvRun run = ConvRun::of<kVec>(p, params.grid);
  if (run.count == 0) return;

  // The first loads are on their way while the thread looks for its sequence.
  using Vector = ConvVector<T, kVec>;
  ConvReader<T, kVec> x(p.x, run, 1 - kWidth, run.count);
  Vector halo[kWidth - 1], queue[kConvQueue];
#pragma unroll
  for (int j = 0; j < kWidth - 1; ++j) halo[j] = x.next();
#pragma unroll
  for (int b = 0; b < kConvQueue; ++b) queue[b] = x.next();
  const ConvTaps<kVec, kWidth> taps(p, run.c);
  ConvCursor cursor(p, run);
  float window[kWidth][kVec];
  start_window<T, kVec, kWidth>(halo, cursor, cursor.state<T>(p.initial_states, kWidth), window);

  T* out = static_cast<T*>(f.out) + run.first * p.channels + run.c;
  const int64_t stride = run.step * p.channels;
  for (int q0 = 0; q0 < run.count; q0 += kConvQueue) {
#pragma unroll
    for (int b = 0; b < kConvQueue; ++b) {
      const int q = q0 + b;
      if (q >= cursor.stop) cursor.move(q);
      if (q == cursor.start) load_state<T, kVec, kWidth>(cursor.state<T>(p.initial_states, kWidth), window);
      queue[b].widen(window[kWidth - 1]);
      queue[b] = x.next();
      float y[kVec];
#pragma unroll
      for (int v = 0; v < kVec; ++v) y[v] = taps.apply(window, v);
      if (p.silu) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) y[v] *= sigmoid(y[v]);
      }
      const Vector result = q >= cursor.start ? Vector::narrow(y) : Vector::zero();
      if (q < run.count) result.store(out);
      out += stride;
      advance<kVec, kWidth>(window);
    }
  }
}

}  // namespace
}  // namespace packseq
