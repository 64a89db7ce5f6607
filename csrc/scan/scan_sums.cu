// The second step of the scan's backward: sums of what many blocks have a share in, in the order of the shares.
#include "core/divide_up.h"
#include "core/launch.h"
#include "scan/scan_kernels.h"
#include "scan/scan_math.cuh"

namespace packseq {
namespace {

constexpr int kSumThreads = 256;

struct MatrixSums {
  ScanProblem problem;
  int32_t count;        // of shares: blocks of channels of a group
  int32_t width;        // states there is room for
  int32_t parts;        // floats of a state
  const float* shares;  // [count, total, groups, 2, width, parts]
  void *dB, *dC;        // [total, groups, states, parts]; nullptr where constant
  Dtype dtype;          // of them
};

// A thread sums one number of dB or dC of a token.
__global__ void __launch_bounds__(kSumThreads) sum_matrices_kernel(const __grid_constant__ MatrixSums params) {
  const ScanProblem& p = params.problem;
  const int width = params.width * params.parts, states = p.states * params.parts;
  const int64_t item = blockIdx.x * int64_t(kSumThreads) + threadIdx.x, matrix_row = item / (2 * width);
  const int matrix = int(item / width % 2), n = int(item % width);
  const int64_t row = matrix_row / p.groups;
  void* const to = matrix ? params.dC : params.dB;
  if (row >= p.total || n >= states || !to) return;
  float sum = 0.0f;
  if (row < span_of(p.cu_seqlens, p.sequences, p.total, p.sequences).begin) {
    const int64_t stride = int64_t(2) * width * p.total * p.groups;
#pragma unroll 8
    for (int i = 0; i < params.count; ++i) sum += params.shares[i * stride + item];
  }
  using Item = Element<AnyType>;
  Item::store(static_cast<char*>(to) + (matrix_row * states + n) * Item::bytes(params.dtype), sum, params.dtype);
}

struct ParameterSums {
  struct {
    const float* shares;  // [count, size]
    float* to;            // [size], nullptr for none
    int64_t size;
  } sums[5];
  int64_t count;
};

__global__ void __launch_bounds__(kSumThreads) sum_parameters_kernel(const __grid_constant__ ParameterSums params) {
  int64_t item = blockIdx.x * int64_t(kSumThreads) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    const auto& [shares, to, size] = params.sums[k];
    if (item >= 0 && item < size && to) {
      float sum = 0.0f;
#pragma unroll 8
      for (int64_t i = 0; i < params.count; ++i) sum += shares[i * size + item];
      to[item] = sum;
    }
    item -= size;
  }
}

}  // namespace

void sum_scan_shares(const ScanBackward& call, const ScanGrid& grid, const BackwardScratch& scratch,
                     cudaStream_t stream) {
  const ScanProblem& p = call.problem;
  const int parts = p.complex ? 2 : 1;
  const auto blocks_of = [](int64_t items) { return divide_up(items, kSumThreads); };
  const MatrixSums matrices = {.problem = p,
                               .count = grid.channel_blocks / p.groups,
                               .width = scratch.width,
                               .parts = parts,
                               .shares = static_cast<const float*>(scratch.matrices),
                               .dB = p.B.constants ? nullptr : call.dB,
                               .dC = p.C.constants ? nullptr : call.dC,
                               .dtype = p.complex ? Dtype::f32 : p.dtype};
  if (matrices.dB || matrices.dC) {
    launch("scan backward: dB, dC", sum_matrices_kernel, blocks_of(p.total * p.groups * 2 * scratch.width * parts),
           kSumThreads, 0, stream, matrices);
  }
  const int64_t of_states = int64_t(p.channels) * p.states * parts;
  const auto floats = [](void* to) { return static_cast<float*>(to); };
  const ParameterSums parameters = {.sums = {{scratch.dA, floats(call.dA), of_states},
                                             {scratch.dB, floats(p.B.constants ? call.dB : nullptr), of_states},
                                             {scratch.dC, floats(p.C.constants ? call.dC : nullptr), of_states},
                                             {scratch.dD, floats(call.dD), p.channels},
                                             {scratch.ddelta_bias, floats(call.ddelta_bias), p.channels}},
                                    .count = scratch.shares};
  launch("scan backward: parameters", sum_parameters_kernel, blocks_of(3 * of_states + 2 * int64_t(p.channels)),
         kSumThreads, 0, stream, parameters);
}

}  // namespace packseq
