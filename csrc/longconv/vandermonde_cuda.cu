// Vandermonde sums on the GPU, host side: each operator and gradient is one of two products of matrices, or both.
#include "core/check.h"
#include "core/workspace.h"
#include "longconv/vandermonde_backward.cuh"

namespace packseq {
namespace {

constexpr int kGatherThreads = 128;

// What the sums over all tokens, in the order of their tiles, become.
struct Gather {
  Complex* sums = nullptr;     // [groups, rows, poles]: factor S0, its conjugate where `conjugate_sums`; nullptr: none
  Complex* dx = nullptr;       // [rows, poles]: conj(factor times the sum over groups of a S1); nullptr: none
  const Complex* a = nullptr;  // [groups, rows, poles]
  bool conjugate_sums = false, conjugate_a = false;
  float factor = 1.0f;
  const float4* partial = nullptr;  // [tiles, groups, rows, poles]: S0 and S1
  int64_t tiles = 0, groups = 0, rows = 0;
  int poles = 0;
};

__global__ void __launch_bounds__(kGatherThreads) vandermonde_gather_kernel(const __grid_constant__ Gather g) {
  const int64_t i = blockIdx.x * int64_t(kGatherThreads) + threadIdx.x, size = g.rows * g.poles;
  if (i >= size) return;
  Complex dx = {};
  for (int64_t group = 0; group < g.groups; ++group) {
    const int64_t at = group * size + i;
    Complex S0 = {}, S1 = {};
#pragma unroll 4
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
      const float4 x = g.partial[tile * g.groups * size + at];
      S0 = S0 + Complex{x.x, x.y}, S1 = S1 + Complex{x.z, x.w};
    }
    if (g.sums) g.sums[at] = g.factor * (g.conjugate_sums ? conj(S0) : S0);
    if (g.dx) dx = dx + g.factor * ((g.conjugate_a ? conj(g.a[at]) : g.a[at]) * S1);
  }
  if (g.dx) g.dx[i] = conj(dx);
}

void check_problem(const VandermondeProblem& p) {
  check(p.real == Dtype::f32, "vandermonde: on a GPU float32 only, got ", name_of(p.real));
  check(p.poles >= 1 && p.poles <= kMostPoles, "vandermonde: poles must be between 1 and ", kMostPoles, ", got ",
        p.poles);
}

void gather(Gather g, const VandermondeProblem& p, const void* u, bool conjugate_u, void* workspace,
            cudaStream_t stream) {
  if (!g.sums && !g.dx) return;
  launch_weighted_sums(
      {
          .x = static_cast<const Complex*>(p.x),
          .u = u,
          .partial = static_cast<float*>(workspace),
          .groups = p.groups,
          .rows = p.rows,
          .length = p.length,
          .poles = p.poles,
          .real = p.conjugate,
          .conjugate_u = conjugate_u,
      },
      g.dx != nullptr, stream);
  g.partial = static_cast<const float4*>(workspace);
  g.tiles = weighted_tiles(p.conjugate, p.length);
  g.groups = p.groups, g.rows = p.rows, g.poles = p.poles;
  launch("vandermonde backward: sums", vandermonde_gather_kernel, divide_up(p.rows * p.poles, kGatherThreads),
         kGatherThreads, 0, stream, g);
}

}  // namespace

void vandermonde_forward(const VandermondeForward& f, cudaStream_t stream) {
  const VandermondeProblem& p = f.problem;
  check_problem(p);
  launch_power_sums(
      {
          .x = static_cast<const Complex*>(p.x),
          .v = static_cast<const Complex*>(f.v),
          .out = f.out,
          .rows = p.rows,
          .length = p.length,
          .poles = p.poles,
          .real = p.conjugate,
          .factor = p.conjugate ? 1.0f : 0.5f,  // times the table's 2
      },
      p.groups, stream);
}

size_t vandermonde_backward_workspace(const VandermondeProblem& p) {
  Workspace pieces(nullptr);
  pieces.take<float4>(weighted_tiles(p.conjugate, p.length) * p.groups * p.rows * p.poles);
  return pieces.used();
}

// With g the gradient of out: dv = conj(sum of conj(g) exp(x l)) and dx = conj(v sum of conj(g) l exp(x l)), twice
// where the result is twice the real part.
void vandermonde_backward(const VandermondeBackward& b, cudaStream_t stream) {
  const VandermondeProblem& p = b.problem;
  check_problem(p);
  gather({.sums = static_cast<Complex*>(b.dv),
          .dx = static_cast<Complex*>(b.dx),
          .a = static_cast<const Complex*>(b.v),
          .conjugate_sums = true,
          .factor = p.conjugate ? 2.0f : 1.0f},
         p, b.dout, true, b.workspace, stream);
}

void vandermonde_transpose(const VandermondeTranspose& t, cudaStream_t stream) {
  check_problem(t.problem);
  gather({.sums = static_cast<Complex*>(t.out), .factor = 1.0f}, t.problem, t.u, false, t.workspace, stream);
}

// With g the gradient of out: du = conj(sum of conj(g) exp(x l)), its real part where u is real, and
// dx = conj(conj(g) sum of u l exp(x l)).
void vandermonde_transpose_backward(const VandermondeTransposeBackward& b, cudaStream_t stream) {
  const VandermondeProblem& p = b.problem;
  check_problem(p);
  if (b.du) {
    launch_power_sums({.x = static_cast<const Complex*>(p.x),
                       .v = static_cast<const Complex*>(b.dout),
                       .out = b.du,
                       .rows = p.rows,
                       .length = p.length,
                       .poles = p.poles,
                       .real = p.conjugate,
                       .factor = 0.5f,  // times the table's 2
                       .conjugate_v = true,
                       .conjugate_out = true},
                      p.groups, stream);
  }
  gather({.dx = static_cast<Complex*>(b.dx),
          .a = static_cast<const Complex*>(b.dout),
          .conjugate_a = true,
          .factor = 1.0f},
         p, b.u, false, b.workspace, stream);
}

}  // namespace packseq
