// What the convolution's kernels share: vectors of channels, the taps, and the walk along rows through the sequences.
//
// A thread owns kVec neighbouring channels and walks a run of rows in the order of time (downwards where the sequences
// are reversed), the last rows in registers. Runs are cut from the flat rows, wherever sequences begin and end: the
// thread finds the sequence of its first row and moves on from there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "core/device/exp2.cuh"
#include "scan/conv1d.h"
#include "scan/conv1d_grid.h"

namespace packseq {
namespace {

constexpr int kFar = 1 << 30;  // steps; no run is as long
constexpr int kConvQueue = 4;  // rows of a tensor that are on their way at once

template <int kBytes>
using ConvUnit =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// kVec neighbouring elements as they lie in memory, at a multiple of their size.
template <class T, int kVec>
struct ConvVector {
  using Unit = ConvUnit<int(sizeof(T)) * kVec>;
  Unit bits;

  __device__ static ConvVector load(const T* p) { return {*reinterpret_cast<const Unit*>(p)}; }
  __device__ static ConvVector load_constant(const T* p) { return {__ldg(reinterpret_cast<const Unit*>(p))}; }
  __device__ void store(T* p) const { *reinterpret_cast<Unit*>(p) = bits; }
  __device__ static ConvVector zero() { return {Unit{}}; }

  __device__ void widen(float* x) const {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = reinterpret_cast<const float*>(&bits)[i];
    } else if constexpr (kVec == 1) {
      x[0] = float(*reinterpret_cast<const T*>(&bits));
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        const uint32_t pair = reinterpret_cast<const uint32_t*>(&bits)[i];
        if constexpr (std::is_same_v<T, __half>) {
          const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
          x[2 * i] = both.x, x[2 * i + 1] = both.y;
        } else {
          x[2 * i] = __uint_as_float(pair << 16), x[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
        }
      }
    }
  }

  __device__ static ConvVector narrow(const float* x) {
    ConvVector v;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) reinterpret_cast<float*>(&v.bits)[i] = x[i];
    } else if constexpr (kVec == 1) {
      *reinterpret_cast<T*>(&v.bits) = T(x[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        uint32_t& pair = reinterpret_cast<uint32_t*>(&v.bits)[i];
        if constexpr (std::is_same_v<T, __half>) {
          *reinterpret_cast<__half2*>(&pair) = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        } else {
          *reinterpret_cast<__nv_bfloat162*>(&pair) = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        }
      }
    }
    return v;
  }
};

// kCount neighbouring floats, in the widest loads that kCount allows where `p` is a multiple of 16 bytes.
template <int kCount, bool kAligned>
__device__ void load_floats(const float* p, float* x) {
  constexpr int vec = !kAligned ? 1 : kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += vec) ConvVector<float, vec>::load_constant(p + i).widen(x + i);
}

template <int kVec, int kWidth>
struct ConvTaps {
  float weight[kVec * kWidth], bias[kVec];

  __device__ ConvTaps(const Conv1dProblem& p, int c) {
    load_floats<kVec * kWidth, (kVec > 1)>(static_cast<const float*>(p.weight) + int64_t(c) * kWidth, weight);
#pragma unroll
    for (int v = 0; v < kVec; ++v) bias[v] = 0;
    if (p.bias) load_floats<kVec, (kVec > 1)>(static_cast<const float*>(p.bias) + c, bias);
  }

  // window[k]: what tap k reads.
  __device__ float apply(const float (&window)[kWidth][kVec], int v) const {
    float sum = bias[v];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum = fmaf(weight[v * kWidth + k], window[k][v], sum);
    return sum;
  }
};

template <int kVec, int kWidth>
__device__ void advance(float (&window)[kWidth][kVec]) {
#pragma unroll
  for (int k = 0; k + 1 < kWidth; ++k)
#pragma unroll
    for (int v = 0; v < kVec; ++v) window[k][v] = window[k + 1][v];
}

// The state of kVec channels, [kVec, width - 1], as the first rows of a window; nullptr: zeros.
template <class T, int kVec, int kWidth>
__device__ void load_state(const T* state, float (&window)[kWidth][kVec]) {
  constexpr int kState = kWidth - 1;
  float values[kState * kVec];
#pragma unroll
  for (int j = 0; j < kState; ++j) {
    const auto unit = state ? ConvVector<T, kVec>::load(state + j * kVec) : ConvVector<T, kVec>::zero();
    unit.widen(values + j * kVec);
  }
#pragma unroll
  for (int j = 0; j < kState; ++j)
#pragma unroll
    for (int v = 0; v < kVec; ++v) window[j][v] = values[v * kState + j];
}

// ---- The walk ------------------------------------------------------------------------------------------------------

__device__ inline Span conv_span(const Conv1dProblem& p, int64_t i) {
  return span_of(p.cu_seqlens, p.sequences, p.total, i);
}

// A thread's run: step q of the walk is row first + step * q.
struct ConvRun {
  int64_t first, step;
  int count;      // rows of the run; 0 where the thread has none
  int c;          // its first channel
  int low, high;  // steps whose rows lie in the tensor and before its slack

  template <int kVec>
  __device__ static ConvRun of(const Conv1dProblem& p, const ConvGrid& grid) {
    const int column = threadIdx.x % grid.columns, line = threadIdx.x / grid.columns;
    const int64_t tile = blockIdx.x / grid.column_tiles;
    const int64_t begin = (tile * grid.lines + line) * grid.rows;
    ConvRun run;
    run.c = int((blockIdx.x % grid.column_tiles * int64_t(grid.columns) + column) * kVec);
    const bool active = line < grid.lines && run.c < p.channels && begin < p.total;
    run.count = active ? int(min(int64_t(grid.rows), p.total - begin)) : 0;
    run.step = p.reverse ? -1 : 1;
    run.first = p.reverse ? begin + run.count - 1 : begin;
    const int64_t live = min(max(int64_t(p.cu_seqlens[p.sequences]), int64_t(0)), p.total);
    run.low = bounded(p.reverse ? run.first - live + 1 : -run.first);
    run.high = bounded(p.reverse ? run.first + 1 : live - run.first);
    return run;
  }

  // Far from any step it does not matter how far.
  __device__ static int bounded(int64_t q) { return int(min(max(q, int64_t(-kFar)), int64_t(kFar))); }
  __device__ int64_t row(int q) const { return first + step * q; }
};

// The sequence that the walk is in, in steps: from `start` (which may lie before the run) to `stop`.
class ConvCursor {
 public:
  int start = kFar, stop = kFar;

  __device__ ConvCursor(const Conv1dProblem& p, const ConvRun& run) : p_(p), run_(run) {
    for (int64_t low = 1, high = p.sequences; low < high;) {  // the last sequence that begins at the row or before
      const int64_t middle = (low + high) / 2;
      if (p.cu_seqlens[middle] <= run.first) {
        i_ = middle, low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (p.sequences > 0) enter();
  }

  // To the sequence that stops after step q; to none, for good, where there is none.
  __device__ void move(int q) {
    while (q >= stop) {
      if (p_.reverse ? i_ == 0 : i_ + 1 == p_.sequences) {
        start = stop = kFar;
      } else {
        i_ += run_.step;
        enter();
      }
    }
  }

  // The thread's channels of the sequence's part of a tensor of states.
  template <class T>
  __device__ const T* state(const void* states, int width) const {
    return states ? static_cast<const T*>(states) + (i_ * p_.channels + run_.c) * (width - 1) : nullptr;
  }

 private:
  __device__ void enter() {
    const Span span = conv_span(p_, i_);
    start = ConvRun::bounded(p_.reverse ? run_.first - span.end + 1 : span.begin - run_.first);
    stop = ConvRun::bounded(p_.reverse ? run_.first - span.begin + 1 : span.end - run_.first);
  }

  const Conv1dProblem& p_;
  const ConvRun& run_;
  int64_t i_ = 0;
};

// Reads a tensor's rows, one step after another from step q on; steps outside low .. high read nothing and give zeros.
template <class T, int kVec>
struct ConvReader {
  const T* at;
  int64_t stride;
  int q, low, high;

  __device__ ConvReader(const Rows& x, const ConvRun& run, int q_, int high_)
      : at(static_cast<const T*>(x.data) + (run.first + run.step * q_) * x.token + run.c),
        stride(run.step * x.token),
        q(q_),
        low(run.low),
        high(min(run.high, high_)) {}

  __device__ ConvVector<T, kVec> next() {
    const bool exists = q >= low && q < high;
    const auto v = exists ? ConvVector<T, kVec>::load_constant(at) : ConvVector<T, kVec>::zero();
    at += stride, ++q;
    return v;
  }
};

// What a run that begins inside a sequence finds before it: rows of the sequence, and values of its initial state.
template <class T, int kVec, int kWidth>
__device__ void start_window(const ConvVector<T, kVec> (&halo)[kWidth - 1], const ConvCursor& cursor, const T* state,
                             float (&window)[kWidth][kVec]) {
  constexpr int kState = kWidth - 1;
#pragma unroll
  for (int j = 0; j < kState; ++j) halo[j].widen(window[j]);
  if (cursor.start <= -kState) return;
#pragma unroll
  for (int j = 0; j < kState; ++j) {
    const int before = cursor.start - (j - kState);  // steps from this one to the sequence's first
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      if (before > 0) window[j][v] = state && before <= kState ? float(state[v * kState + kState - before]) : 0.f;
    }
  }
}

// ---- States: a thread for each sequence and channel ----------------------------------------------------------------

__device__ inline bool state_place(const Conv1dProblem& p, int64_t first_block, int64_t* i, int* c) {
  const int64_t place = (blockIdx.x - first_block) * kConvThreads + threadIdx.x;
  if (place >= p.sequences * p.channels) return false;
  *i = place / p.channels, *c = int(place % p.channels);
  return true;
}

__device__ inline int64_t row_at(const Conv1dProblem& p, const Span& span, int64_t t) {
  return p.reverse ? span.end - 1 - t : span.begin + t;
}

}  // namespace
}  // namespace packseq
