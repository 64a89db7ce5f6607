// Matrix products of small tiles: C = A B, A's elements broadcast, B and C in vectors.
#pragma once
#include "core/cpu/vector.h"

namespace packseq::PACKSEQ_ISA {

// What C holds before the product is added: nothing, itself, or itself times a factor for each column.
enum class Start { zero, add, scale_add };

template <class Real>
struct Gemm {
  int64_t m, k;
  const Real* a;  // [m, k], or [k, m] where it is read by columns
  int64_t lda;
  const Real* b;  // [k, columns]
  int64_t ldb;
  Real* c;  // [m, columns]
  int64_t ldc;
  const Real* scale = nullptr;  // [columns]
};

// Rows of C that one kernel holds in registers, beside one row of B and one element of A.
constexpr int kGemmRows = kVectorRegisters == 32 ? 8 : 6;

// M rows by N vectors of C. The product is summed by itself and then added: over many calls the error of a long sum
// grows with the number of calls, not of terms.
template <class Real, int M, int N, bool kColumns, Start kStart>
inline void gemm_kernel(int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c, int64_t ldc,
                        const Real* scale) {
  constexpr int lanes = kLanes<Real>;
  Vec<Real> sum[M][N];
  PACKSEQ_UNROLL
  for (int i = 0; i < M; ++i) {
    PACKSEQ_UNROLL
    for (int v = 0; v < N; ++v) sum[i][v] = Vec<Real>{};
  }
  for (int64_t j = 0; j < k; ++j) {
    Vec<Real> row[N];
    PACKSEQ_UNROLL
    for (int v = 0; v < N; ++v) row[v] = load(b + j * ldb + v * lanes);
    PACKSEQ_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec<Real> x = splat(kColumns ? a[j * lda + i] : a[i * lda + j]);
      PACKSEQ_UNROLL
      for (int v = 0; v < N; ++v) sum[i][v] += x * row[v];
    }
  }
  PACKSEQ_UNROLL
  for (int i = 0; i < M; ++i) {
    PACKSEQ_UNROLL
    for (int v = 0; v < N; ++v) {
      Real* const at = c + i * ldc + v * lanes;
      if constexpr (kStart == Start::add) sum[i][v] += load(at);
      if constexpr (kStart == Start::scale_add) sum[i][v] += load(at) * load(scale + v * lanes);
      store(at, sum[i][v]);
    }
  }
}

PACKSEQ_INLINE int64_t gemm_groups(int64_t m) { return (m + kGemmRows - 1) / kGemmRows; }

// Calls the kernel for `rows` rows, 1 to M.
template <class Real, int M, int N, bool kColumns, Start kStart>
PACKSEQ_INLINE void gemm_rows(int64_t rows, const Gemm<Real>& g, const Real* a, Real* c) {
  if (rows == M) {
    gemm_kernel<Real, M, N, kColumns, kStart>(g.k, a, g.lda, g.b, g.ldb, c, g.ldc, g.scale);
  } else if constexpr (M > 1) {
    gemm_rows<Real, M - 1, N, kColumns, kStart>(rows, g, a, c);
  }
}

// C has N vectors of columns. `between` is called between one group of rows and the next.
template <int N, bool kColumns, Start kStart, class Real, class F>
inline void gemm(const Gemm<Real>& g, const F& between) {
  // Groups of nearly equal size: a last group of one or two rows would leave the multipliers waiting.
  int64_t groups = gemm_groups(g.m);
  for (int64_t i = 0; groups > 0; --groups) {
    const int64_t rows = (g.m - i + groups - 1) / groups;
    gemm_rows<Real, kGemmRows, N, kColumns, kStart>(rows, g, g.a + (kColumns ? i : i * g.lda), g.c + i * g.ldc);
    i += rows;
    between();
  }
}

// C has any whole number of vectors of columns.
template <bool kColumns, Start kStart, class Real, class F>
inline void gemm_wide(Gemm<Real> g, int64_t columns, const F& between) {
  constexpr int lanes = kLanes<Real>;
  const auto advance = [&](int n) {
    g.b += n * lanes, g.c += n * lanes, columns -= n * lanes;
    if (g.scale) g.scale += n * lanes;
  };
  for (; columns >= 2 * lanes; advance(2)) gemm<2, kColumns, kStart>(g, between);
  if (columns > 0) gemm<1, kColumns, kStart>(g, between);
}

}  // namespace packseq::PACKSEQ_ISA
