// The sums that state space models make their filters of: the C++ API.
//
//   cauchy         out[g, h, l] = sum over n of v[g, h, n] / (z[l] - w[h, n])
//   vandermonde    out[g, h, l] = sum over n of v[g, h, n] exp(x[h, n] l),  l = 0 .. length - 1
//   transpose      out[g, h, n] = sum over l of u[g, h, l] exp(x[h, n] l)
//   s4_spectrum    see S4Spectrum
//
// With `conjugate` every term stands for itself and its conjugate: v / (z - w) + conj(v) / (z - conj(w)), and twice the
// real part of v exp(x l), which is then real. Complex numbers are pairs (real, imaginary) of float32, or of float64 on
// the CPU. Everything is contiguous. Gradients are the derivative by the real part plus i times that by the imaginary
// part; a nullptr is not wanted. Sources: Gu et al., arXiv 2111.00396, 2206.11893.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/executor.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {

inline constexpr int kMostPoles = 1024, kMostRank = 2;

struct CauchyProblem {
  Dtype real;  // f32; f64 on the CPU only
  bool conjugate;
  int64_t groups;  // numerators that share one denominator
  int64_t rows;    // h
  int64_t nodes;   // l
  int poles;       // n, 1 to kMostPoles
  const void* v;   // complex [groups, rows, poles]
  const void* z;   // complex [nodes]
  const void* w;   // complex [rows, poles]
};

struct CauchyForward {
  CauchyProblem problem;
  void* out;  // complex [groups, rows, nodes]
};

struct CauchyBackward {
  CauchyProblem problem;
  const void* dout;  // complex [groups, rows, nodes]
  void *dv, *dz, *dw;
  void* workspace;  // CUDA only: cauchy_backward_workspace(problem, dz) bytes, 256-byte aligned
};

struct VandermondeProblem {
  Dtype real;
  bool conjugate;
  int64_t groups, rows, length;
  int poles;      // 1 to kMostPoles
  const void* x;  // complex [rows, poles]
};

struct VandermondeForward {
  VandermondeProblem problem;
  const void* v;  // complex [groups, rows, poles]
  void* out;      // [groups, rows, length], real where conjugate, else complex
};

struct VandermondeBackward {
  VandermondeProblem problem;
  const void* v;
  const void* dout;  // like out
  void *dv, *dx;
  void* workspace;  // CUDA only: vandermonde_backward_workspace(problem) bytes
};

// `conjugate` says that u is real.
struct VandermondeTranspose {
  VandermondeProblem problem;
  const void* u;    // [groups, rows, length], real where conjugate, else complex
  void* out;        // complex [groups, rows, poles]: the plain sum, not doubled
  void* workspace;  // CUDA only: vandermonde_backward_workspace(problem) bytes
};

struct VandermondeTransposeBackward {
  VandermondeProblem problem;
  const void* u;
  const void* dout;  // complex [groups, rows, poles]
  void *du, *dx;
  void* workspace;  // CUDA only: vandermonde_backward_workspace(problem) bytes
};

// The spectrum of an S4 filter with a diagonal plus low-rank state matrix, A = diag(w) - P P^*, by the bilinear
// transform, on the rfft's frequencies of `length` points, theta = 2 pi j / length for j = 0 .. length / 2:
//
//   out[g, h, j] = 2 / (1 + o) * (r(B, C) - r(B, P^*) (1 + r(P, P^*))^-1 r(P, C)),        o = exp(-i theta)
//   r(a, b)      = dt * sum over conjugate pairs of a b / (z - dt w),                     z = 2 (1 - o) / (1 + o)
//
// so that irfft(out) is k[l] = Cbar Abar^l Bbar for l < length, if C is the C (I - Abar^length) that 2111.00396 calls
// C tilde. Poles, P, B and C hold one of each conjugate pair. Finite at every frequency, o = -1 too. `rank` is the
// number of columns of P: 0 (diagonal) to kMostRank. Source: 2111.00396, appendix C.3.
struct S4Problem {
  Dtype real;
  int64_t filters;  // g: how many C share the rest
  int64_t channels, length;
  int poles, rank;
  const void* w;   // complex [channels, poles]
  const void* P;   // complex [rank, channels, poles]
  const void* B;   // complex [channels, poles]
  const void* C;   // complex [filters, channels, poles]
  const void* dt;  // real [channels], positive
};

struct S4Spectrum {
  S4Problem problem;
  void* out;  // complex [filters, channels, length / 2 + 1]
};

struct S4SpectrumBackward {
  S4Problem problem;
  const void* dout;
  void *dw, *dP, *dB, *dC, *ddt;  // all wanted
  void* workspace;                // CUDA only: s4_spectrum_backward_workspace(problem) bytes
};

void cauchy_forward(const CauchyForward&, const Executor&);
void cauchy_backward(const CauchyBackward&, const Executor&);
void vandermonde_forward(const VandermondeForward&, const Executor&);
void vandermonde_backward(const VandermondeBackward&, const Executor&);
void vandermonde_transpose(const VandermondeTranspose&, const Executor&);
void vandermonde_transpose_backward(const VandermondeTransposeBackward&, const Executor&);
void s4_spectrum(const S4Spectrum&, const Executor&);
void s4_spectrum_backward(const S4SpectrumBackward&, const Executor&);

#if PACKSEQ_HAS_CUDA
size_t cauchy_backward_workspace(const CauchyProblem&, bool wants_dz);
size_t vandermonde_backward_workspace(const VandermondeProblem&);
size_t s4_spectrum_backward_workspace(const S4Problem&);
void cauchy_forward(const CauchyForward&, cudaStream_t);
void cauchy_backward(const CauchyBackward&, cudaStream_t);
void vandermonde_forward(const VandermondeForward&, cudaStream_t);
void vandermonde_backward(const VandermondeBackward&, cudaStream_t);
void vandermonde_transpose(const VandermondeTranspose&, cudaStream_t);
void vandermonde_transpose_backward(const VandermondeTransposeBackward&, cudaStream_t);
void s4_spectrum(const S4Spectrum&, cudaStream_t);
void s4_spectrum_backward(const S4SpectrumBackward&, cudaStream_t);
#endif

}  // namespace packseq
