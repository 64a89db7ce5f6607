// Vandermonde matrices times vectors, and their transposes, as products of two tables of powers:
//
//   exp(x (t T + j)) = exp(x t T) exp(x j)       for tile t, step j of the tile, T = kTileSteps
//
// so that most of the work is matrix products over the poles (series) or the steps of a tile (moments). The tables are
// made in double; without an exponent that grows, nothing in them overflows.
#pragma once
#include "core/cpu/gemm.h"
#include "core/cpu/scratch.h"
#include "core/cpu/transpose.h"
#include "longconv/filters_kernels_cpu.h"
#include "longconv/powers_cpu.h"

namespace packseq::PACKSEQ_ISA {

// Poles in the lanes, a few vectors of them.
template <class Real>
class PowerTables {
  using Number = Complex<Vec<double>>;
  static constexpr int lanes = kLanes<double>;
  static constexpr int kNear = 16;  // powers of their own; the others are products

 public:
  static constexpr int64_t kPoles = 64;
  int64_t poles = 0, padded = 0;

  explicit PowerTables(Scratch& s) {
    for (double** x : {&re_, &im_}) *x = s.take<double>(kPoles);
    near_ = s.take<double>(2 * kNear * kPoles);
    tiles_ = s.take<double>(2 * kChunkTiles * kPoles);
    steps_ = s.take<Real>(2 * kTileSteps * kPoles);
  }

  void load_poles(const Real* x, int64_t count) {
    poles = count, padded = round_up(count, kLanes<Real>);
    __builtin_memset(re_, 0, kPoles * sizeof(double));
    __builtin_memset(im_, 0, kPoles * sizeof(double));
    split(x, count, re_, im_);
  }

  // exp(x j) for the first `count` steps of a tile: rows of kPoles real parts and kPoles imaginary ones.
  void make_steps(int64_t count) {
    for (int64_t n = 0; n < padded; n += lanes) {
      for (int j = 0; j < least(kNear, count); ++j) put(near_, j, n, power(x(n), j));
      for (int64_t far = 0; far < count; far += kNear) {
        const Number factor = power(x(n), double(far));
        for (int64_t j = far; j < least(far + kNear, count); ++j) {
          const Number e = far == 0 ? get(near_, j, n) : factor * get(near_, j - far, n);
          Real* const to = steps_ + 2 * kPoles * j + n;
          store_narrow(to, e.re), store_narrow(to + kPoles, e.im);
        }
      }
    }
  }
  const Real* step(int64_t j) const { return steps_ + 2 * kPoles * j; }

  // exp(x t T) for the first `count` tiles of a chunk.
  void make_tiles(int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t n = 0; n < padded; n += lanes) put(tiles_, t, n, power(x(n), double(t * kTileSteps)));
    }
  }
  PACKSEQ_INLINE Number tile(int64_t t, int64_t n) const { return get(tiles_, t, n); }

  PACKSEQ_INLINE Number chunk(int64_t first_step, int64_t n) const { return power(x(n), double(first_step)); }

 private:
  PACKSEQ_INLINE Number x(int64_t n) const { return load_complex(re_ + n, im_ + n); }
  PACKSEQ_INLINE static Number get(const double* table, int64_t row, int64_t n) {
    return load_complex(table + 2 * kPoles * row + n, table + 2 * kPoles * row + kPoles + n);
  }
  PACKSEQ_INLINE static void put(double* table, int64_t row, int64_t n, const Number& e) {
    store_complex(table + 2 * kPoles * row + n, table + 2 * kPoles * row + kPoles + n, e);
  }

  double *re_, *im_, *near_, *tiles_;
  Real* steps_;
};

inline constexpr auto nothing_between = [] {};

// Tiles of a chunk that are whole, and the steps of the last one if it is not.
struct ChunkShape {
  int64_t whole, rest, tiles;
  PACKSEQ_INLINE explicit ChunkShape(int64_t steps)
      : whole(steps / kTileSteps), rest(steps % kTileSteps), tiles(whole + (rest > 0)) {}
};

template <class Real>
class PowerSeries {
  using Tables = PowerTables<Real>;
  static constexpr int64_t kPoles = Tables::kPoles, kColumns = 2 * kTileSteps;

 public:
  PowerSeries(const VandermondeProblem& p, Scratch& s) : p_(p), parts_(p.conjugate ? 1 : 2), tables_(s) {
    stride_ = row_stride<Real>(parts_ * kTileSteps);
    matrix_ = s.take<Real>(2 * kPoles * stride_);
    for (Real** x : {&re_, &im_}) *x = s.take<Real>(kTileSteps * kPoles);
    factors_ = s.take<Real>(kChunkTiles * kFactors);
    rest_ = s.take<Real>(kColumns);
    v_re_ = s.take<double>(kPoles), v_im_ = s.take<double>(kPoles);
  }

  void run(const VandermondeSeries& series, const FilterPart& part) {
    for (int64_t first = 0; first < p_.poles; first += kPoles) {
      const int64_t count = least(kPoles, p_.poles - first);
      tables_.load_poles(static_cast<const Real*>(p_.x) + 2 * (part.row * p_.poles + first), count);
      const int64_t steps = least(kTileSteps, part.span.size());
      fill_matrix(round_up(steps, kLanes<Real>), series.conjugated);
      tables_.make_tiles(least(kChunkTiles, (part.span.size() + kTileSteps - 1) / kTileSteps));
      for (int64_t group = 0; group < p_.groups; ++group) {
        load_v(series, (group * p_.rows + part.row) * p_.poles + first, count);
        Real* const out = static_cast<Real*>(series.out) + (group * p_.rows + part.row) * p_.length * parts_;
        for (int64_t step = part.span.begin; step < part.span.end; step += kChunkSteps) {
          const int64_t size = least(kChunkSteps, part.span.end - step);
          fill_factors(step, ChunkShape(size).tiles);
          first == 0 ? multiply<Start::zero>(out + step * parts_, size)
                     : multiply<Start::add>(out + step * parts_, size);
        }
      }
    }
  }

 private:
  static constexpr int64_t kFactors = 2 * kPoles + 16;  // of a tile: the real parts of all poles, then the imaginary

  // What v exp(x t T) is multiplied by: rows are the real and the imaginary parts of exp(x j), columns the steps of a
  // tile; where the result is complex, pairs of columns.
  void fill_matrix(int64_t steps, bool conjugated) {
    constexpr int lanes = kLanes<Real>;
    tables_.make_steps(steps);
    const int64_t poles = tables_.poles, padded = tables_.padded;
    // The real parts' rows first: those beyond the last pole are overwritten.
    for (int part = 0; part < 2; ++part) {
      Real* const rows = p_.conjugate ? matrix_ + part * poles * stride_ : part == 0 ? re_ : im_;
      const int64_t stride = p_.conjugate ? stride_ : kTileSteps;
      for (int64_t n = 0; n < padded; n += lanes) {
        for (int64_t j = 0; j < steps; j += lanes) {
          transpose(tables_.step(j) + part * kPoles + n, 2 * kPoles, rows + n * stride + j, stride);
        }
      }
    }
    if (p_.conjugate) return;
    const Real sign = conjugated ? Real(-1) : Real(1);
    for (int64_t n = 0; n < poles; ++n) {
      const Real *const re = re_ + n * kTileSteps, *const im = im_ + n * kTileSteps;
      Real *const to = matrix_ + n * stride_, *const to_im = to + poles * stride_;
      for (int64_t j = 0; j < steps; ++j) {
        to[2 * j] = re[j], to[2 * j + 1] = sign * im[j];
        to_im[2 * j] = im[j], to_im[2 * j + 1] = -sign * re[j];
      }
    }
  }

  void load_v(const VandermondeSeries& series, int64_t first, int64_t count) {
    __builtin_memset(v_re_, 0, kPoles * sizeof(double));
    __builtin_memset(v_im_, 0, kPoles * sizeof(double));
    split(static_cast<const Real*>(series.v) + 2 * first, count, v_re_, v_im_);
    for (int64_t n = 0; n < count; ++n) {
      v_re_[n] *= series.factor, v_im_[n] *= series.conjugated ? -series.factor : series.factor;
    }
  }

  // v exp(x t T), the imaginary parts with the other sign.
  void fill_factors(int64_t first_step, int64_t tiles) {
    constexpr int lanes = kLanes<double>;
    for (int64_t n = 0; n < tables_.padded; n += lanes) {
      const Complex<Vec<double>> e = tables_.chunk(first_step, n) * load_complex(v_re_ + n, v_im_ + n);
      for (int64_t t = 0; t < tiles; ++t) {
        const Complex<Vec<double>> f = e * tables_.tile(t, n);
        store_narrow(factors_ + t * kFactors + n, f.re);
        store_narrow(im_ + t * kPoles + n, -f.im);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {  // not at once: a vector may be longer than the poles that are left
      __builtin_memcpy(factors_ + t * kFactors + tables_.poles, im_ + t * kPoles, tables_.poles * sizeof(Real));
    }
  }

  template <Start kStart>
  void multiply(Real* out, int64_t steps) {
    const ChunkShape shape(steps);
    const int64_t columns = parts_ * kTileSteps;
    Gemm<Real> g = {.m = shape.whole,
                    .k = 2 * tables_.poles,
                    .a = factors_,
                    .lda = kFactors,
                    .b = matrix_,
                    .ldb = stride_,
                    .c = out,
                    .ldc = columns};
    gemm_wide<false, kStart>(g, columns, nothing_between);
    if (shape.rest == 0) return;
    Real* const to = out + shape.whole * columns;
    const int64_t rest = parts_ * shape.rest;
    if (kStart == Start::add) __builtin_memcpy(rest_, to, rest * sizeof(Real));
    g.m = 1, g.a += shape.whole * kFactors, g.c = rest_;
    gemm_wide<false, kStart>(g, round_up(rest, kLanes<Real>), nothing_between);
    __builtin_memcpy(to, rest_, rest * sizeof(Real));
  }

  const VandermondeProblem& p_;
  const int64_t parts_;
  Tables tables_;
  int64_t stride_;
  Real *matrix_, *re_, *im_, *factors_, *rest_;
  double *v_re_, *v_im_;
};

template <class Real>
class PowerMoments {
  using Tables = PowerTables<Real>;
  using Number = Complex<Vec<double>>;
  static constexpr int64_t kPoles = Tables::kPoles, kColumns = 4 * kPoles;

 public:
  PowerMoments(const VandermondeProblem& p, Scratch& s) : p_(p), parts_(p.conjugate ? 1 : 2), tables_(s) {
    stride_ = row_stride<Real>(kColumns);
    matrix_ = s.take<Real>(parts_ * kTileSteps * stride_);
    products_ = s.take<Real>(kChunkTiles * kColumns);
    totals_ = s.take<double>(kColumns);
  }

  // sums: pairs, [1 or 2, groups, poles]
  void run(const VandermondeMoments& moments, const FilterPart& part, double* sums) {
    for (int64_t first = 0; first < p_.poles; first += kPoles) {
      const int64_t count = least(kPoles, p_.poles - first);
      tables_.load_poles(static_cast<const Real*>(p_.x) + 2 * (part.row * p_.poles + first), count);
      columns_ = (moments.second ? 4 : 2) * tables_.padded;
      fill_matrix(least(kTileSteps, part.span.size()), moments);
      tables_.make_tiles(least(kChunkTiles, (part.span.size() + kTileSteps - 1) / kTileSteps));
      for (int64_t group = 0; group < p_.groups; ++group) {
        const Real* const u = static_cast<const Real*>(moments.u) + (group * p_.rows + part.row) * p_.length * parts_;
        __builtin_memset(totals_, 0, kColumns * sizeof(double));
        for (int64_t step = part.span.begin; step < part.span.end; step += kChunkSteps) {
          const int64_t size = least(kChunkSteps, part.span.end - step);
          multiply(u + step * parts_, size);
          moments.second ? add<true>(step, ChunkShape(size).tiles) : add<false>(step, ChunkShape(size).tiles);
        }
        for (int which = 0; which <= int(moments.second); ++which) {
          const double* const re = totals_ + 2 * which * kPoles;
          merge(re, re + kPoles, count, sums + 2 * ((which * p_.groups + group) * p_.poles + first));
        }
      }
    }
  }

 private:
  // What a tile's u is multiplied by: columns are the real and imaginary parts of exp(x j), then of j exp(x j). Where u
  // is complex, its parts have rows of their own.
  void fill_matrix(int64_t steps, const VandermondeMoments& moments) {
    constexpr int lanes = kLanes<Real>;
    tables_.make_steps(steps);
    const int64_t padded = tables_.padded;
    const Real sign = moments.conjugated ? Real(-1) : Real(1);
    for (int64_t j = 0; j < steps; ++j) {
      const Real* const from = tables_.step(j);
      Real *const row = matrix_ + parts_ * j * stride_, *const imaginary = row + stride_;
      for (int which = 0; which <= int(moments.second); ++which) {
        const Real factor = which ? Real(j) : Real(1);
        Real *const to = row + 2 * which * padded, *const to_im = imaginary + 2 * which * padded;
        for (int64_t n = 0; n < padded; n += lanes) {
          const Vec<Real> re = load(from + n) * factor, im = load(from + kPoles + n) * factor;
          store_complex(to + n, to + padded + n, {re, im});
          if (parts_ == 2) store_complex(to_im + n, to_im + padded + n, {-sign * im, sign * re});
        }
      }
    }
  }

  void multiply(const Real* u, int64_t steps) {
    const ChunkShape shape(steps);
    Gemm<Real> g = {.m = shape.whole,
                    .k = parts_ * kTileSteps,
                    .a = u,
                    .lda = parts_ * kTileSteps,
                    .b = matrix_,
                    .ldb = stride_,
                    .c = products_,
                    .ldc = kColumns};
    gemm_wide<false, Start::zero>(g, columns_, nothing_between);
    if (shape.rest == 0) return;
    g.m = 1, g.k = parts_ * shape.rest, g.a += shape.whole * g.lda, g.c += shape.whole * kColumns;
    gemm_wide<false, Start::zero>(g, columns_, nothing_between);
  }

  // A chunk's tiles: each product times exp(x t T).
  template <bool kSecond>
  void add(int64_t first_step, int64_t tiles) {
    const int64_t padded = tables_.padded;
    for (int64_t n = 0; n < padded; n += kLanes<double>) {
      Number plain{}, second{};
      for (int64_t t = 0; t < tiles; ++t) {
        const Real* const from = products_ + t * kColumns + n;
        const Number e = tables_.tile(t, n), w = {load_wide(from), load_wide(from + padded)};
        plain = plain + e * w;
        if constexpr (kSecond) {
          const Number inside = {load_wide(from + 2 * padded), load_wide(from + 3 * padded)};
          second = second + e * (inside + scaled(w, splat(double(t * kTileSteps))));
        }
      }
      const Number factor = tables_.chunk(first_step, n);
      double* const to = totals_ + n;
      store_complex(to, to + kPoles, load_complex(to, to + kPoles) + factor * plain);
      if constexpr (!kSecond) continue;
      second = factor * (second + scaled(plain, splat(double(first_step))));
      store_complex(to + 2 * kPoles, to + 3 * kPoles, load_complex(to + 2 * kPoles, to + 3 * kPoles) + second);
    }
  }

  const VandermondeProblem& p_;
  const int64_t parts_;
  Tables tables_;
  int64_t stride_, columns_ = 0;
  Real *matrix_, *products_;
  double* totals_;
};

}  // namespace packseq::PACKSEQ_ISA
