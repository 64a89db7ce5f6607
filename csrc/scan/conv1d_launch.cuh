// Launches the convolution's kernels for one element type: chooses vectors of channels, and how rows are cut.
#pragma once
#include <algorithm>

#include "core/dispatch.h"
#include "core/divide_up.h"
#include "core/launch.h"
#include "scan/conv1d_backward.cuh"
#include "scan/conv1d_forward.cuh"
#include "scan/conv1d_launch.h"
#include "scan/conv1d_step.cuh"

namespace packseq::conv1d {
namespace {

// Whether every vector of kVec channels begins at a multiple of its size, in everything that the kernels read and
// write.
class Alignment {
 public:
  Alignment(const Conv1dProblem& p, int bytes) : bytes_(bytes), vec_(bytes / int(size_of(p.dtype))) {
    holds_ = p.channels % vec_ == 0;
    add(p.x), add(p.initial_states), add(p.weight, 16), add(p.bias, 16);
  }
  void add(const void* x) { add(x, bytes_); }
  void add(const Rows& x) { add(x.data), holds_ &= x.token % vec_ == 0; }
  bool holds() const { return holds_; }

 private:
  void add(const void* x, int bytes) { holds_ &= reinterpret_cast<uintptr_t>(x) % uintptr_t(bytes) == 0; }

  int bytes_, vec_;
  bool holds_;
};

int64_t state_blocks(const Conv1dProblem& p, const void* states) {
  return states ? divide_up(p.sequences * p.channels, kConvThreads) : 0;
}

// f(width, vec): the constants that the kernels are compiled for.
template <class T, template <int> class Bytes, class F>
void with_constants(const Conv1dProblem& p, bool vectors, const F& f) {
  dispatch<2, 3, 4, 5, 6, 7, 8>("width", p.width, [&](auto width) {
    constexpr int vec = Bytes<width>::value / int(sizeof(T));
    vectors ? f(width, constant<vec>{}) : f(width, constant<1>{});
  });
}

// Bytes a thread owns of a row, as its registers allow.
template <int kWidth>
using ForwardBytes = constant<(kWidth <= 4 ? 16 : 8)>;
template <int>
using BackwardBytes = constant<8>;
template <int>
using StepBytes = constant<4>;

}  // namespace

template <class T>
void forward(const Conv1dForward& f, cudaStream_t stream) {
  const Conv1dProblem& p = f.problem;
  Alignment alignment(p, p.width <= 4 ? 16 : 8);
  alignment.add(f.out);
  with_constants<T, ForwardBytes>(p, alignment.holds(), [&](auto width, auto vec) {
    const Conv1dForwardParams params = {f, forward_grid(p.total, p.channels / vec)};
    launch("conv1d forward", conv1d_forward_kernel<T, vec, width>, params.grid.blocks + state_blocks(p, f.final_states),
           kConvThreads, 0, stream, params);
  });
}

template <class T>
void backward(const Conv1dBackward& b, cudaStream_t stream) {
  const Conv1dProblem& p = b.problem;
  Alignment alignment(p, 8);
  alignment.add(b.dout), alignment.add(b.dfinal_states), alignment.add(b.dx), alignment.add(b.dinitial_states);
  with_constants<T, BackwardBytes>(p, alignment.holds(), [&](auto width, auto vec) {
    const Conv1dBackwardParams params = {b, backward_grid(p.total, p.channels / vec), static_cast<float*>(b.workspace)};
    launch("conv1d backward", conv1d_backward_kernel<T, vec, width>,
           params.grid.blocks + state_blocks(p, b.dinitial_states), kConvThreads, 0, stream, params);
    const TapSumsParams sums = {.partial = params.partial,
                                .tiles = params.grid.row_tiles(),
                                .channels = p.channels,
                                .width = p.width,
                                .dweight = static_cast<float*>(b.dweight),
                                .dbias = static_cast<float*>(b.dbias)};
    const int64_t values = int64_t(p.width + 1) * p.channels;
    launch("conv1d backward", sum_taps_kernel, divide_up(values, kSumValues), kSumValues * kSumParts, 0, stream, sums);
  });
}

template <class T>
void step(const Conv1dStep& s, cudaStream_t stream) {
  const Conv1dProblem& p = s.problem;
  Alignment alignment(p, 4);
  alignment.add(s.pool), alignment.add(s.out);
  with_constants<T, StepBytes>(p, alignment.holds(), [&](auto width, auto vec) {
    constexpr int64_t kThreads = 1 << 18;  // enough for a large GPU
    const int columns = p.channels / vec;
    const int64_t groups = std::min(p.sequences, (kThreads + columns - 1) / std::max(columns, 1));
    const int64_t blocks = divide_up(groups * columns, kConvThreads);
    const Conv1dStepParams params = {.call = s, .columns = columns, .groups = groups, .blocks = blocks};
    const int64_t clear = p.total * p.channels > 0 ? kClearBlocks : 0;
    launch("conv1d step", conv1d_step_kernel<T, vec, width>, blocks + clear, kConvThreads, 0, stream, params);
  });
}

}  // namespace packseq::conv1d
