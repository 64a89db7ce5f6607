// S4's spectra: at every node a few sums over the poles, and of them the filter by Woodbury's identity.
//
// With theta = 2 pi j / length, s = sin(theta / 2) and c = cos(theta / 2), everything is finite in terms of
//
//   k(a, b) = sum over conjugate pairs of a b / (2 i s - c dt w)
//   out     = dt exp(i theta / 2) (k(B, C) - y . k(P, C)),   (1 / (c dt) + k(P, P^*)) y = k(B, P^*)
//
// where both sides of the equation for y are taken times c dt. Gradients go back through the same equation.
#pragma once
#include "longconv/filters_kernels_cpu.h"
#include "longconv/pole_sums_cpu.h"

namespace packseq::PACKSEQ_ISA {

// (M^-1) t and (M^-*) t of a matrix whose Hermitian part is positive, as I + P^* (z - w)^-1 P has it for stable w:
// elimination needs no pivots.
template <class V, int kRank>
struct Elimination {
  Complex<V> first, last, above, factor;  // inverse pivots, M[0][1], M[1][0] / M[0][0]

  PACKSEQ_INLINE explicit Elimination(const Complex<V> (&m)[kMostRank][kMostRank]) {
    first = inverse(m[0][0]);
    if constexpr (kRank == 2) {
      above = m[0][1];
      factor = m[1][0] * first;
      last = inverse(m[1][1] - factor * above);
    }
  }

  PACKSEQ_INLINE void solve(Complex<V> (&t)[kMostRank]) const {
    if constexpr (kRank == 2) {
      t[1] = (t[1] - factor * t[0]) * last;
      t[0] = t[0] - above * t[1];
    }
    t[0] = t[0] * first;
  }

  PACKSEQ_INLINE void solve_adjoint(Complex<V> (&t)[kMostRank]) const {
    t[0] = t[0] * conj(first);
    if constexpr (kRank == 2) {
      t[1] = (t[1] - conj(above) * t[0]) * conj(last);
      t[0] = t[0] - conj(factor) * t[1];
    }
  }
};

template <class Real, int kRank>
class S4Filter {
  using Form = PoleForm<Real, true, true>;
  using V = Vec<Real>;
  using Number = Complex<V>;
  static constexpr int kMostSums = (1 + kRank) * (kFilterRun + kRank);

 public:
  S4Filter(const S4Problem& p, const double* circle, Scratch& s)
      : p_(p), nodes_count_(p.length / 2 + 1), circle_(circle), nodes_(s) {
    poles_ = s.take<Real>(2 * p.poles);
    numerators_ = s.take<Real>(2 * kMostSums * int64_t(p.poles));
    sums_ = s.take<Real>(2 * kMostSums * int64_t{kNodes});
    sine_ = s.take<Real>(kNodes);
    douts_ = s.take<Real>(2 * kFilterRun * int64_t{kNodes});
  }

  void forward(void* out, const FilterPart& part) {
    begin(part.row);
    for (int64_t filter = 0; filter < p_.filters; filter += kFilterRun) {
      load_numerators(part.row, filter);
      for (int64_t first = part.span.begin; first < part.span.end; first += kNodes) {
        load_nodes(first, part.span.end);
        pole_sums<Form>(nodes_, poles_, p_.poles, numerators_, columns_ * (1 + kRank), sums_);
        for (int64_t i = 0; i < nodes_.padded(); i += kLanes<Real>) combine(i);
        for (int g = 0; g < filters_; ++g) {
          merge(row(0, g), row(0, g) + kNodes, nodes_.count,
                static_cast<Real*>(out) + place(filter + g, part.row, first));
        }
      }
    }
  }

  void backward(const void* dout, const FilterPart& part, double* sums) {
    begin(part.row);
    double *dnumerators = sums + 2 * p_.poles, *const ddt = sums + S4Sums::doubles(p_) - 1;
    for (int64_t filter = 0; filter < p_.filters; filter += kFilterRun) {
      load_numerators(part.row, filter);
      const int count = columns_ * (1 + kRank);
      for (int64_t first = part.span.begin; first < part.span.end; first += kNodes) {
        load_nodes(first, part.span.end);
        pole_sums<Form>(nodes_, poles_, p_.poles, numerators_, count, sums_);
        for (int g = 0; g < filters_; ++g) {
          Real* const re = douts_ + 2 * g * kNodes;
          __builtin_memset(re, 0, 2 * kNodes * sizeof(Real));
          split(static_cast<const Real*>(dout) + place(filter + g, part.row, first), nodes_.count, re, re + kNodes);
        }
        V by_dt{};
        for (int64_t i = 0; i < nodes_.padded(); i += kLanes<Real>) by_dt += combine_backward(i);
        *ddt += sum<Real>(by_dt);
        pole_sums_backward<Form>(nodes_, poles_, p_.poles, numerators_, count, sums_, dnumerators, sums, nullptr,
                                 nullptr);
      }
      dnumerators += 2 * count * int64_t(p_.poles);
    }
  }

 private:
  int64_t place(int64_t filter, int64_t channel, int64_t i) const {
    return 2 * ((filter * p_.channels + channel) * nodes_count_ + i);
  }
  // Sum (a, column), a = 0 being B and the others P's columns; columns are filters, then the conjugate of P's.
  Real* row(int a, int column) const { return sums_ + 2 * (a * columns_ + column) * kNodes; }
  PACKSEQ_INLINE Number at(int a, int column, int64_t i) const {
    return load_complex(row(a, column) + i, row(a, column) + kNodes + i);
  }
  PACKSEQ_INLINE void put(int a, int column, int64_t i, const Number& x) const {
    store_complex(row(a, column) + i, row(a, column) + kNodes + i, x);
  }

  void begin(int64_t channel) {
    dt_ = static_cast<const Real*>(p_.dt)[channel];
    const Real* const w = static_cast<const Real*>(p_.w) + 2 * channel * p_.poles;
    for (int i = 0; i < 2 * p_.poles; ++i) poles_[i] = dt_ * w[i];
  }

  // Pole n of a parameter's part `index`: of B 0, of C the filter, of P the column.
  const Real* parameter(const void* x, int64_t index, int64_t channel, int n) const {
    return static_cast<const Real*>(x) + 2 * ((index * p_.channels + channel) * p_.poles + n);
  }

  void load_numerators(int64_t channel, int64_t filter) {
    filters_ = int(S4Sums::run(p_, filter)), columns_ = S4Sums::columns(p_, filters_);
    Real* to = numerators_;
    for (int n = 0; n < p_.poles; ++n) {
      for (int a = 0; a <= kRank; ++a) {
        const Real* const left = a == 0 ? parameter(p_.B, 0, channel, n) : parameter(p_.P, a - 1, channel, n);
        for (int b = 0; b < columns_; ++b, to += 2) {
          const bool filtered = b < filters_;
          const Real* const right =
              filtered ? parameter(p_.C, filter + b, channel, n) : parameter(p_.P, b - filters_, channel, n);
          const double re = right[0], im = filtered ? right[1] : -right[1];
          to[0] = Real(left[0] * re - left[1] * im), to[1] = Real(left[0] * im + left[1] * re);
        }
      }
    }
  }

  void load_nodes(int64_t first, int64_t end) {
    nodes_.count = least(kNodes, end - first);
    for (int64_t i = 0; i < nodes_.count; ++i) {
      const double cosine = circle_[2 * (first + i)], sine = circle_[2 * (first + i) + 1];
      nodes_.re[i] = 0, nodes_.im[i] = Real(2 * sine), nodes_.weight[i] = Real(cosine), sine_[i] = Real(sine);
    }
    nodes_.pad();
    for (int64_t i = nodes_.count; i < nodes_.padded(); ++i) sine_[i] = sine_[nodes_.count - 1];
  }

  // The equation for y at a vector of nodes.
  PACKSEQ_INLINE Elimination<V, kRank> equation(int64_t i, V c_dt, Number (&y)[kMostRank]) const {
    Number m[kMostRank][kMostRank];
    PACKSEQ_UNROLL
    for (int b = 0; b < kRank; ++b) {
      PACKSEQ_UNROLL
      for (int a = 0; a < kRank; ++a) {
        m[b][a] = scaled(at(1 + a, filters_ + b, i), c_dt);
        if (a == b) m[b][a].re += Real(1);
      }
      y[b] = at(0, filters_ + b, i);
    }
    return Elimination<V, kRank>(m);
  }

  // k(B, C) - c dt (y . k(P, C)) of filter g, with y = (1 + c dt k(P, P^*))^-1 k(B, P^*).
  PACKSEQ_INLINE Number filtered(int g, int64_t i, V c_dt, const Number (&y)[kMostRank]) const {
    Number k = at(0, g, i);
    PACKSEQ_UNROLL
    for (int a = 0; a < kRank; ++a) k = k - scaled(y[a] * at(1 + a, g, i), c_dt);
    return k;
  }

  PACKSEQ_INLINE Number outer(int64_t i) const { return {load(nodes_.weight + i) * dt_, load(sine_ + i) * dt_}; }

  PACKSEQ_INLINE void combine(int64_t i) const {
    const V c_dt = load(nodes_.weight + i) * dt_;
    Number y[kMostRank];
    if constexpr (kRank > 0) equation(i, c_dt, y).solve(y);
    for (int g = 0; g < filters_; ++g) put(0, g, i, outer(i) * filtered(g, i, c_dt, y));
  }

  // Sums become their gradients; gives dt's, but for what goes through the poles.
  PACKSEQ_INLINE V combine_backward(int64_t i) const {
    const V c = load(nodes_.weight + i), c_dt = c * dt_;
    Number y[kMostRank], dy[kMostRank] = {};
    V by_outer{}, by_c_dt{};
    if constexpr (kRank == 0) {
      for (int g = 0; g < filters_; ++g) {
        const Number d = conj(outer(i)) * dout(g, i);
        by_outer += real_product(d, at(0, g, i));
        put(0, g, i, d);
      }
    } else {
      const Elimination<V, kRank> m = equation(i, c_dt, y);
      m.solve(y);
      for (int g = 0; g < filters_; ++g) {
        const Number d = conj(outer(i)) * dout(g, i), minus = scaled(d, -c_dt);
        by_outer += real_product(d, filtered(g, i, c_dt, y));
        PACKSEQ_UNROLL
        for (int a = 0; a < kRank; ++a) {
          const Number k = at(1 + a, g, i);
          by_c_dt -= real_product(d, y[a] * k);
          dy[a] = dy[a] + conj(k) * minus;
          put(1 + a, g, i, conj(y[a]) * minus);
        }
        put(0, g, i, d);
      }
      m.solve_adjoint(dy);
      PACKSEQ_UNROLL
      for (int b = 0; b < kRank; ++b) {
        PACKSEQ_UNROLL
        for (int a = 0; a < kRank; ++a) {
          const Number dm = conj(y[a]) * dy[b];
          by_c_dt -= real_product(dm, at(1 + a, filters_ + b, i));
          put(1 + a, filters_ + b, i, scaled(dm, -c_dt));
        }
        put(0, filters_ + b, i, dy[b]);
      }
    }
    return by_outer / dt_ + by_c_dt * c;
  }

  PACKSEQ_INLINE Number dout(int g, int64_t i) const {
    return load_complex(douts_ + 2 * g * kNodes + i, douts_ + (2 * g + 1) * kNodes + i);
  }

  const S4Problem& p_;
  const int64_t nodes_count_;
  const double* circle_;
  Nodes<Real> nodes_;
  Real *poles_, *numerators_, *sums_, *sine_, *douts_;
  Real dt_ = 0;
  int filters_ = 0, columns_ = 0;
};

}  // namespace packseq::PACKSEQ_ISA
