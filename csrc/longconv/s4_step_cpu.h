// S4's recurrence, one sequence in a block of channels, poles in the lanes. The state's matrix is diagonal plus low
// rank and real inputs keep conjugate pairs conjugate, so that with real numbers g (one for each column of P)
//
//   h[t] = a h[t - 1] + b u[t] - sum over c of q_c g_c,    g_c = rho_c u[t] + 2 Re sum over the poles of r_c h[t - 1]
//
// All of it is in double, whatever the tensors are: an error in `a` would grow with every token.
#pragma once
#include "core/cpu/convert.h"
#include "core/cpu/scratch.h"
#include "longconv/filters_kernels_cpu.h"
#include "longconv/powers_cpu.h"

namespace packseq::PACKSEQ_ISA {

// One channel's numbers: rows of `padded` poles, real parts and then imaginary ones; zeros beyond the last pole.
struct StepParameters {
  int64_t padded, filters;
  double *a, *b, *q, *r, *C;  // q, r: one pair of rows for each column of P; C: for each filter, (2 re, -2 im)
  double *rho, *D;            // a number for each column; for each filter

  StepParameters(const S4Step& s, Scratch& scratch) : padded(round_up(s.poles, kLanes<double>)), filters(s.filters) {
    a = scratch.take<double>(2 * padded), b = scratch.take<double>(2 * padded);
    q = scratch.take<double>(2 * padded * s.rank), r = scratch.take<double>(2 * padded * s.rank);
    C = scratch.take<double>(2 * padded * s.filters);
    rho = scratch.take<double>(kMostRank), D = scratch.take<double>(s.filters);
  }
};

template <class Real>
class StepPreparation {
  using V = Vec<double>;
  using Number = Complex<V>;
  static constexpr int lanes = kLanes<double>;

 public:
  StepPreparation(const S4Step& s, int64_t channel, const StepParameters& to)
      : s_(s), channel_(channel), to_(to), dt_(static_cast<const Real*>(s.dt)[channel]) {}

  void run() {
    for (int64_t n = 0; n < to_.padded; n += lanes) s_.zoh ? hold(n) : bilinear(n);
    if (s_.rank > 0) woodbury();
    for (int64_t f = 0; f < s_.filters; ++f) {
      for (int64_t n = 0; n < to_.padded; n += lanes) {
        const Number c = load(s_.C, f, n);
        store(to_.C, f, n, {c.re * 2.0, c.im * -2.0});
      }
      to_.D[f] = s_.D ? double(static_cast<const Real*>(s_.D)[f * s_.channels + channel_]) : 0;
    }
  }

 private:
  // Poles n .. of a [.., channels, poles] tensor; zeros beyond the last.
  Number load(const void* from, int64_t index, int64_t n) const {
    const Real* const at = static_cast<const Real*>(from) + 2 * ((index * s_.channels + channel_) * s_.poles + n);
    double re[lanes] = {}, im[lanes] = {};
    if (n + lanes <= s_.poles) {
      split(at, lanes, re, im);  // a loop of known length: shuffles
    } else {
      split(at, s_.poles - n, re, im);
    }
    return load_complex(re, im);
  }
  PACKSEQ_INLINE void store(double* rows, int64_t index, int64_t n, const Number& x) const {
    double* const at = rows + 2 * index * to_.padded + n;
    store_complex(at, at + to_.padded, x);
  }
  PACKSEQ_INLINE Number stored(const double* rows, int64_t index, int64_t n) const {
    const double* const at = rows + 2 * index * to_.padded + n;
    return load_complex(at, at + to_.padded);
  }

  // b = (exp(dt w) - 1) / w B, which for w = 0 is dt B.
  void hold(int64_t n) const {
    const Number w = load(s_.w, 0, n), rest = exp_minus_one(scaled(w, splat(dt_)));
    Number factor = rest * inverse(w);
    const Vec<int64_t> none = (w.re == 0.0) & (w.im == 0.0);
    factor.re = none ? splat(dt_) : factor.re, factor.im = none ? V{} : factor.im;
    store(to_.a, 0, n, {rest.re + 1.0, rest.im});
    store(to_.b, 0, n, factor * load(s_.B, 0, n));
  }

  // The diagonal's part of the bilinear transform; q = dt / 2 (1 - dt / 2 w)^-1 P.
  void bilinear(int64_t n) const {
    const Number half = scaled(load(s_.w, 0, n), splat(dt_ * 0.5));
    const Number e = inverse(Number{1.0 - half.re, -half.im});
    store(to_.a, 0, n, Number{1.0 + half.re, half.im} * e);
    store(to_.b, 0, n, scaled(e * load(s_.B, 0, n), splat(dt_)));
    for (int c = 0; c < s_.rank; ++c) store(to_.q, c, n, scaled(e * load(s_.P, c, n), splat(dt_ * 0.5)));
  }

  // The matrix's low-rank parts act twice on a state: as P^* h before the inverse, s, and by Woodbury's identity as
  // (1 + P^* q)^-1 P^* x within it, where x = a h + b u - q s. Their sum is g.
  void woodbury() const {
    double K[kMostRank][kMostRank], M[kMostRank][kMostRank], u[kMostRank];
    for (int i = 0; i < s_.rank; ++i) {
      for (int j = 0; j < s_.rank; ++j) K[i][j] = product(i, to_.q, j), M[i][j] = K[i][j] + (i == j);
      u[i] = product(i, to_.b, 0);
    }
    // (1 + K)^-1, whose Hermitian part is positive for stable w.
    double inverse[kMostRank][kMostRank] = {{1 / M[0][0]}};
    if (s_.rank == 2) {
      const double factor = M[1][0] / M[0][0], last = 1 / (M[1][1] - factor * M[0][1]);
      inverse[1][0] = -factor * last, inverse[1][1] = last;
      inverse[0][1] = -M[0][1] * last / M[0][0];
      inverse[0][0] = (1 + M[0][1] * factor * last) / M[0][0];
    }
    // g = s + M^-1 (P^* (a h + b u) - K s), and s = P^* h: r = (1 - M^-1 K) P^* + M^-1 P^* a, where 1 - M^-1 K = M^-1.
    for (int i = 0; i < s_.rank; ++i) {
      to_.rho[i] = 0;
      for (int j = 0; j < s_.rank; ++j) to_.rho[i] += inverse[i][j] * u[j];
      for (int64_t n = 0; n < to_.padded; n += lanes) {
        Number sum{};
        for (int j = 0; j < s_.rank; ++j) sum = sum + scaled(conj(load(s_.P, j, n)), splat(inverse[i][j]));
        const Number a = stored(to_.a, 0, n), r = sum * Number{1.0 + a.re, a.im};
        store(to_.r, i, n, {r.re * 2.0, r.im * -2.0});
      }
    }
  }

  // P^* x over both members of every pair.
  double product(int column, const double* rows, int64_t index) const {
    V total{};
    for (int64_t n = 0; n < to_.padded; n += lanes) {
      total += real_product(load(s_.P, column, n), stored(rows, index, n));
    }
    return 2 * sum<double>(total);
  }

  const S4Step& s_;
  const int64_t channel_;
  const StepParameters& to_;
  const double dt_;
};

template <class T, int kRank>
class StepWalk {
  using Real = typename RealOf<T>::type;
  using V = Vec<double>;
  using Number = Complex<V>;
  static constexpr int64_t kTokens = 64;  // whose inputs and outputs are fetched together

 public:
  StepWalk(const S4Step& s, Scratch& scratch) : s_(s), padded_(round_up(s.poles, kLanes<double>)) {
    u_ = scratch.take<Real>(kTokens * kStepChannels), y_ = scratch.take<Real>(kTokens * s.filters * kStepChannels);
    states_ = scratch.take<double>(2 * padded_ * kStepChannels);
  }

  // Channels from `first` on; parameters_of(channel) gives their numbers.
  template <class F>
  void run(const Span& rows, Real* states, int64_t first, const F& parameters_of) {
    const int64_t channels = least(kStepChannels, s_.channels - first), filters = s_.filters;
    if (padded_ > s_.poles) __builtin_memset(states_, 0, 2 * padded_ * kStepChannels * sizeof(double));
    for (int64_t c = 0; c < channels; ++c) {
      split(states + 2 * (first + c) * s_.poles, s_.poles, state(c), state(c) + padded_);
    }
    for (int64_t row = rows.begin; row < rows.end; row += kTokens) {
      const int64_t count = least(kTokens, rows.end - row);
      const T* const from = static_cast<const T*>(s_.u.data) + row * s_.u.token + first;
      for (int64_t t = 0; t < count; ++t)
        load_row(from + t * s_.u.token, channels, u_ + t * kStepChannels, channels_up(channels));
      for (int64_t c = 0; c < channels; ++c) walk(parameters_of(first + c), c, count);
      T* const to = static_cast<T*>(s_.out) + row * filters * s_.channels + first;
      for (int64_t t = 0; t < count * filters; ++t) store_row(y_ + t * kStepChannels, channels, to + t * s_.channels);
    }
    for (int64_t c = 0; c < channels; ++c) {
      merge(state(c), state(c) + padded_, s_.poles, states + 2 * (first + c) * s_.poles);
    }
  }

 private:
  double* state(int64_t c) const { return states_ + 2 * padded_ * c; }
  static int64_t channels_up(int64_t channels) { return round_up(channels, kLanes<Real>); }

  // One channel's tokens of a tile. A walk over the state gives the token's outputs and the next one's g.
  void walk(const StepParameters& p, int64_t c, int64_t count) {
    double* const h = state(c);
    double g[kMostRank] = {};
    if constexpr (kRank > 0) {
      V sums[kMostRank] = {};
      for (int64_t n = 0; n < padded_; n += kLanes<double>) add_products(p, n, at(h, 0, n), sums);
      for (int i = 0; i < kRank; ++i) g[i] = sum<double>(sums[i]);
    }
    for (int64_t t = 0; t < count; ++t) {
      const double u = u_[t * kStepChannels + c];
      V sums[kMostRank] = {}, y{};
      if constexpr (kRank > 0) g[0] += p.rho[0] * u;
      if constexpr (kRank > 1) g[1] += p.rho[1] * u;
      for (int64_t n = 0; n < padded_; n += kLanes<double>) {
        Number next = at(p.a, 0, n) * at(h, 0, n) + scaled(at(p.b, 0, n), splat(u));
        PACKSEQ_UNROLL
        for (int i = 0; i < kRank; ++i) next = next - scaled(at(p.q, i, n), splat(g[i]));
        store_complex(h + n, h + padded_ + n, next);
        add_products(p, n, next, sums);
        y += real_part(at(p.C, 0, n), next);
      }
      for (int i = 0; i < kRank; ++i) g[i] = sum<double>(sums[i]);
      Real* const to = y_ + t * p.filters * kStepChannels + c;
      for (int64_t f = 0; f < p.filters; ++f) {
        if (f > 0) {
          y = V{};
          for (int64_t n = 0; n < padded_; n += kLanes<double>) y += real_part(at(p.C, f, n), at(h, 0, n));
        }
        to[f * kStepChannels] = Real(sum<double>(y) + p.D[f] * u);
      }
    }
  }

  PACKSEQ_INLINE Number at(const double* rows, int64_t index, int64_t n) const {
    const double* const at = rows + 2 * index * padded_ + n;
    return load_complex(at, at + padded_);
  }
  // Coefficients are kept as (2 re, -2 im): twice the real part of a product.
  PACKSEQ_INLINE static V real_part(const Number& coefficient, const Number& x) { return real_product(coefficient, x); }
  PACKSEQ_INLINE void add_products(const StepParameters& p, int64_t n, const Number& h, V (&sums)[kMostRank]) const {
    PACKSEQ_UNROLL
    for (int i = 0; i < kRank; ++i) sums[i] += real_part(at(p.r, i, n), h);
  }

  const S4Step& s_;
  const int64_t padded_;
  Real *u_, *y_;
  double* states_;
};

}  // namespace packseq::PACKSEQ_ISA
