// Cauchy sums on the GPU, host side: how work is cut, and the sums of the blocks' shares of gradients.
#include "core/check.h"
#include "core/dispatch.h"
#include "core/divide_up.h"
#include "core/workspace.h"
#include "longconv/cauchy_backward.cuh"

namespace packseq {
namespace {

constexpr int kSumThreads = 128;
constexpr int64_t kShareRows = 16;  // rows that one block sums dz over

struct ShareSums {
  const Complex* shares;  // [count, size]
  Complex* sums;
  int64_t count, size;
};

__global__ void __launch_bounds__(kSumThreads) sum_complex_shares_kernel(const __grid_constant__ ShareSums s) {
  const int64_t i = blockIdx.x * int64_t(kSumThreads) + threadIdx.x;
  if (i >= s.size) return;
  Complex sum = {};
#pragma unroll 4
  for (int64_t share = 0; share < s.count; ++share) sum = sum + s.shares[share * s.size + i];
  s.sums[i] = sum;
}

// f(constant<groups at a time>).
template <class F>
void with_groups(int64_t groups, const F& f) {
  dispatch<1, 2, 4>("groups", groups <= 1 ? 1 : groups == 2 ? 2 : 4, f);
}

void check_problem(const CauchyProblem& p) {
  check(p.real == Dtype::f32, "cauchy: on a GPU float32 only, got ", name_of(p.real));
  check(p.poles >= 1 && p.poles <= kMostPoles, "cauchy: poles must be between 1 and ", kMostPoles, ", got ", p.poles);
}

CauchySums sums_of(const CauchyProblem& p, int64_t tile) {
  return {.v = static_cast<const Complex*>(p.v),
          .z = static_cast<const Complex*>(p.z),
          .w = static_cast<const Complex*>(p.w),
          .out = nullptr,
          .groups = p.groups,
          .rows = p.rows,
          .nodes = p.nodes,
          .poles = p.poles,
          .conjugate = p.conjugate,
          .tiles = divide_up(p.nodes, tile)};
}

struct CauchyShares {
  int64_t tiles, row_shares;
  Complex *dv, *dw, *dz;  // [tiles, groups, rows, poles], [tiles, rows, poles], [row_shares, nodes]
};

CauchyShares take_shares(Workspace& pieces, const CauchyProblem& p, bool wants_dz) {
  CauchyShares shares = {};
  with_groups(p.groups, [&](auto groups) { shares.tiles = divide_up(p.nodes, CauchyBackwardTile<groups>::kSize); });
  if (p.groups == 0) shares.tiles = 0;
  shares.row_shares = wants_dz ? divide_up(p.rows, kShareRows) : 0;
  shares.dv = pieces.take<Complex>(shares.tiles * p.groups * p.rows * p.poles);
  shares.dw = pieces.take<Complex>(shares.tiles * p.rows * p.poles);
  shares.dz = pieces.take<Complex>(shares.row_shares * p.nodes);
  return shares;
}

void sum_shares(const Complex* shares, void* sums, int64_t count, int64_t size, cudaStream_t stream) {
  if (!sums) return;
  launch("cauchy backward: sums", sum_complex_shares_kernel, divide_up(size, kSumThreads), kSumThreads, 0, stream,
         {.shares = shares, .sums = static_cast<Complex*>(sums), .count = count, .size = size});
}

}  // namespace

void cauchy_forward(const CauchyForward& f, cudaStream_t stream) {
  const CauchyProblem& p = f.problem;
  check_problem(p);
  with_groups(p.groups, [&](auto groups) {
    CauchySums sums = sums_of(p, CauchyTile<groups>::kSize);
    sums.out = static_cast<Complex*>(f.out);
    launch("cauchy", cauchy_forward_kernel<groups>, p.groups ? p.rows * sums.tiles : 0, kCauchyThreads, 0, stream,
           sums);
  });
}

size_t cauchy_backward_workspace(const CauchyProblem& p, bool wants_dz) {
  Workspace pieces(nullptr);
  take_shares(pieces, p, wants_dz);
  return pieces.used();
}

void cauchy_backward(const CauchyBackward& b, cudaStream_t stream) {
  const CauchyProblem& p = b.problem;
  check_problem(p);
  Workspace pieces(b.workspace);
  const CauchyShares shares = take_shares(pieces, p, b.dz != nullptr);
  const Complex* const dout = static_cast<const Complex*>(b.dout);
  if (b.dv || b.dw) {
    with_groups(p.groups, [&](auto groups) {
      const CauchyGradients gradients = {
          .sums = sums_of(p, CauchyBackwardTile<groups>::kSize), .dout = dout, .dv = shares.dv, .dw = shares.dw};
      launch("cauchy backward", cauchy_backward_kernel<groups>, p.rows * shares.tiles, kCauchyThreads, 0, stream,
             gradients);
    });
    sum_shares(shares.dv, b.dv, shares.tiles, p.groups * p.rows * p.poles, stream);
    sum_shares(shares.dw, b.dw, shares.tiles, p.rows * p.poles, stream);
  }
  if (b.dz) {
    const CauchyNodeGradients gradients = {
        .sums = sums_of(p, kCauchyThreads), .dout = dout, .dz = shares.dz, .share_rows = kShareRows};
    launch("cauchy backward: dz", cauchy_node_gradients_kernel, shares.row_shares * gradients.sums.tiles,
           kCauchyThreads, 0, stream, gradients);
    sum_shares(shares.dz, b.dz, shares.row_shares, p.nodes, stream);
  }
}

}  // namespace packseq
