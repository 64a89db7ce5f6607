// The causal convolution's backward kernels.
//
// Walking on in time, each row's gradient of pre is added to the gradients of the kWidth rows that it saw, which wait
// in registers until they are complete: kWidth - 1 rows later, or where their sequence ends. So the walk goes on beyond
// its run by as many rows. Sums for the taps stay in registers over the run, are added over the block's runs in order
// and written to the workspace; a second kernel adds those of all blocks, in order.
#pragma once
#include "scan/conv1d_walk.cuh"

namespace packseq {
namespace {

struct Conv1dBackwardParams {
  Conv1dBackward call;
  ConvGrid grid;
  float* partial;  // [row tiles, width + 1, channels]
};

// The derivative of silu.
__device__ inline float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * fmaf(x, 1.f - s, 1.f);
}

// One channel's gradients at the times before a sequence's first row. What the sequence is too short to push out of
// its state comes back from the final state.
template <class T, int kWidth>
__device__ void write_initial_states(const Conv1dBackward& b, int64_t first_block) {
  constexpr int kState = kWidth - 1;
  const Conv1dProblem& p = b.problem;
  int64_t i;
  int c;
  if (!state_place(p, first_block, &i, &c)) return;
  const Span span = conv_span(p, i);
  const int64_t at = (i * p.channels + c) * kState;
  const ConvTaps<1, kWidth> taps(p, c);
  float window[kWidth][1], dpre[kState];
  load_state<T, 1, kWidth>(p.initial_states ? static_cast<const T*>(p.initial_states) + at : nullptr, window);
#pragma unroll
  for (int t = 0; t < kState; ++t) {
    dpre[t] = 0;
    if (t >= span.size()) continue;
    const int64_t row = row_at(p, span, t);
    window[kState][0] = float(static_cast<const T*>(p.x.data)[row * p.x.token + c]);
    dpre[t] = float(static_cast<const T*>(b.dout.data)[row * b.dout.token + c]);
    if (p.silu) dpre[t] *= silu_slope(taps.apply(window, 0));
    advance<1, kWidth>(window);
  }
#pragma unroll
  for (int j = 0; j < kState; ++j) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k <= j; ++k) sum = fmaf(taps.weight[k], dpre[j - k], sum);
    if (b.dfinal_states && j >= span.size()) {
      sum += float(static_cast<const T*>(b.dfinal_states)[at + j - span.size()]);
    }
    static_cast<T*>(b.dinitial_states)[at + j] = T(sum);
  }
}

// The sums of one thread's run, on their way to the block's.
template <int kVec, int kWidth>
struct TapSums {
  static constexpr int kValues = (kWidth + 1) * kVec;
  float weight[kVec][kWidth] = {}, bias[kVec] = {};

  __device__ void add(float dpre, const float (&window)[kWidth][kVec], int v) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[v][k] = fmaf(dpre, window[k][v], weight[v][k]);
    bias[v] += dpre;
  }

  __device__ void write(const Conv1dProblem& p, const ConvGrid& grid, float* partial) const {
    __shared__ float sums[kValues][kConvThreads];
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k * kVec + v][threadIdx.x] = weight[v][k];
      sums[kWidth * kVec + v][threadIdx.x] = bias[v];
    }
    __syncthreads();
    const int64_t tile = blockIdx.x / grid.column_tiles;
    const int column0 = blockIdx.x % grid.column_tiles * grid.columns;
    for (int place = threadIdx.x; place < kValues * grid.columns; place += kConvThreads) {
      const int value = place / grid.columns, column = place % grid.columns;
      const int c = (column0 + column) * kVec + value % kVec;
      if (c >= p.channels) continue;
      float sum = 0;
      for (int line = 0; line < grid.lines; ++line) sum += sums[value][line * grid.columns + column];
      partial[(tile * (kWidth + 1) + value / kVec) * p.channels + c] = sum;
    }
  }
};

// Blocks after the grid's write dinitial_states.
template <class T, int kVec, int kWidth>
__global__ void __launch_bounds__(kConvThreads, kVec* kWidth <= 16 ? 3 : 1)
    conv1d_backward_kernel(const __grid_constant__ Conv1dBackwardParams params) {
  constexpr int kState = kWidth - 1;
  const Conv1dBackward& b = params.call;
  const Conv1dProblem& p = b.problem;
  if (blockIdx.x >= params.grid.blocks) return write_initial_states<T, kWidth>(b, params.grid.blocks);
  const ConvRun run = ConvRun::of<kVec>(p, params.grid);
  TapSums<kVec, kWidth> sums;
  if (run.count > 0) {
    using Vector = ConvVector<T, kVec>;
    const int steps = run.count + kState;
    ConvReader<T, kVec> x(p.x, run, -kState, steps), dout(b.dout, run, 0, steps);
    Vector halo[kState], queue_x[kConvQueue], queue_dout[kConvQueue];
#pragma unroll
    for (int j = 0; j < kState; ++j) halo[j] = x.next();
#pragma unroll
    for (int n = 0; n < kConvQueue; ++n) queue_x[n] = x.next(), queue_dout[n] = dout.next();
    const ConvTaps<kVec, kWidth> taps(p, run.c);
    ConvCursor cursor(p, run);
    float window[kWidth][kVec];
    start_window<T, kVec, kWidth>(halo, cursor, cursor.state<T>(p.initial_states, kWidth), window);

    T* dx = static_cast<T*>(b.dx) + (run.first - run.step * kState) * p.channels + run.c;
    const int64_t stride = run.step * p.channels;
    float waiting[kWidth][kVec] = {};  // at step q: gradients of the rows q - kState ... q
    int unwritten = 0;                 // the first step whose row is not written
    // plain: the step and the row that it completes lie in the run and in the sequence that the walk is in.
    const auto step = [&](int n, int q, auto plain) {
      if (!plain && q >= cursor.stop) {  // the sequence's last rows are complete; they are in its final state
        const T* const dfinal = cursor.state<T>(b.dfinal_states, kWidth);
#pragma unroll
        for (int j = 0; j < kState; ++j) {
          const int at = q - kState + j;
          if (at < unwritten || at >= run.count) continue;
#pragma unroll
          for (int v = 0; v < kVec; ++v) waiting[j][v] += dfinal ? float(dfinal[v * kState + j]) : 0.f;
          const Vector result = at >= cursor.start ? Vector::narrow(waiting[j]) : Vector::zero();
          result.store(dx + j * stride);
        }
        unwritten = q;
        cursor.move(q);
      }
      if (!plain && q == cursor.start) {
        load_state<T, kVec, kWidth>(cursor.state<T>(p.initial_states, kWidth), window);
      }
      queue_x[n].widen(window[kState]);
      float d[kVec];
      queue_dout[n].widen(d);
      queue_x[n] = x.next(), queue_dout[n] = dout.next();
      if (p.silu) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) d[v] = __fmul_rn(d[v], silu_slope(taps.apply(window, v)));
      }
      if (!plain && q < cursor.start) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) d[v] = 0;
      } else if (plain || q < run.count) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sums.add(d[v], window, v);
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
#pragma unroll
        for (int k = 0; k < kState; ++k) waiting[k][v] = fmaf(taps.weight[v * kWidth + k], d[v], waiting[k][v]);
        // Rounded by itself: fused with what is added next, or not, as the compiler likes, it would have other bits.
        waiting[kState][v] = __fmul_rn(taps.weight[v * kWidth + kState], d[v]);
      }
      const int complete = q - kState;
      if (plain || (complete >= unwritten && complete < run.count)) {
        const Vector result = plain || complete >= cursor.start ? Vector::narrow(waiting[0]) : Vector::zero();
        result.store(dx);
      }
      dx += stride;
      advance<kVec, kWidth>(window);
      advance<kVec, kWidth>(waiting);
    };
    for (int q0 = 0; q0 < steps; q0 += kConvQueue) {
      if (q0 - kState >= max(cursor.start, unwritten) && q0 + kConvQueue <= min(cursor.stop, run.count)) {
#pragma unroll
        for (int n = 0; n < kConvQueue; ++n) step(n, q0 + n, std::true_type());
      } else {
#pragma unroll
        for (int n = 0; n < kConvQueue; ++n) step(n, q0 + n, std::false_type());
      }
    }
  }
  sums.write(p, params.grid, params.partial);
}

// ---- The sums over all blocks --------------------------------------------------------------------------------------

struct TapSumsParams {
  const float* partial;  // [tiles, width + 1, channels]
  int64_t tiles;
  int channels, width;
  float *dweight, *dbias;
};

constexpr int kSumValues = 32, kSumParts = 16;

// A block adds kSumValues values over all tiles, each in kSumParts parts.
__global__ void __launch_bounds__(kSumValues* kSumParts) sum_taps_kernel(const __grid_constant__ TapSumsParams p) {
  __shared__ float parts[kSumParts][kSumValues];
  const int lane = threadIdx.x % kSumValues, part = threadIdx.x / kSumValues;
  const int64_t values = int64_t(p.width + 1) * p.channels, value = blockIdx.x * int64_t(kSumValues) + lane;
  float sum = 0;
  if (value < values) {
#pragma unroll 4
    for (int64_t tile = part; tile < p.tiles; tile += kSumParts) sum += p.partial[tile * values + value];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part > 0 || value >= values) return;
  for (int i = 1; i < kSumParts; ++i) sum += parts[i][lane];
  const int k = int(value / p.channels), c = int(value % p.channels);
  if (k < p.width) {
    p.dweight[int64_t(c) * p.width + k] = sum;
  } else if (p.dbias) {
    p.dbias[c] = sum;
  }
}

}  // namespace
}  // namespace packseq
