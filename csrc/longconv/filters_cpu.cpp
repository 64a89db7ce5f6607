// The filters on the CPU: cuts the work into parts of rows, hands these to the kernels of the machine's instruction
// set, and adds up what concerns whole rows or all of them, in double and in a fixed order.
#include <cmath>
#include <complex>
#include <numbers>
#include <vector>

#include "longconv/filter_parts_cpu.h"
#include "longconv/filters.h"

namespace packseq {

namespace {

using Number = std::complex<double>;

// f(Real{}) for the type that a Dtype names.
template <class F>
void with_real(Dtype real, const F& f) {
  real == Dtype::f64 ? f(double{}) : f(float{});
}

template <class Real>
Number number_at(const void* x, int64_t i) {
  const Real* const at = static_cast<const Real*>(x) + 2 * i;
  return {at[0], at[1]};
}

template <class Real>
void put(void* x, int64_t i, Number value) {
  Real* const at = static_cast<Real*>(x) + 2 * i;
  at[0] = Real(value.real()), at[1] = Real(value.imag());
}

// Number i of each of `parts` arrays of doubles, added up in their order.
Number total_of(const double* sums, int64_t parts, int64_t doubles, int64_t i) {
  Number total = 0;
  for (int64_t part = 0; part < parts; ++part) {
    total += Number{sums[part * doubles + 2 * i], sums[part * doubles + 2 * i + 1]};
  }
  return total;
}

}  // namespace

// ---- Cauchy --------------------------------------------------------------------------------------------------------

namespace {

double cost_of_node(const CauchyProblem& p) { return double(p.poles) * double(8 + 4 * p.groups); }

template <class Real>
void finish(const CauchyBackward& b, const RowParts& cut, const std::vector<double>& sums, int64_t row) {
  const CauchyProblem& p = b.problem;
  const int64_t parts = cut.per_row(), doubles = CauchyPartSums::doubles(p);
  const double* const own = sums.data() + row * parts * doubles;
  for (int64_t n = 0; b.dw && n < p.poles; ++n) {
    put<Real>(b.dw, row * p.poles + n, total_of(own, parts, doubles, n));
  }
  for (int64_t g = 0; b.dv && g < p.groups; ++g) {
    for (int64_t n = 0; n < p.poles; ++n) {
      put<Real>(b.dv, (g * p.rows + row) * p.poles + n, total_of(own, parts, doubles, (g + 1) * p.poles + n));
    }
  }
}

}  // namespace

void cauchy_forward(const CauchyForward& f, const Executor& executor) {
  const CauchyProblem& p = f.problem;
  const FilterKernels kernels = PACKSEQ_BY_ISA(filter_kernels(p.real));
  const RowParts cut = {p.rows, p.nodes, kNodeSegment};
  cut.each(executor, cost_of_node(p), kernels.cauchy_scratch(p),
           [&](const FilterPart& part, int64_t, int64_t, void* scratch) { kernels.cauchy(f, part, scratch); });
}

void cauchy_backward(const CauchyBackward& b, const Executor& executor) {
  constexpr int64_t most_runs = 16;  // each of which has its own sums of dz
  const CauchyProblem& p = b.problem;
  const FilterKernels kernels = PACKSEQ_BY_ISA(filter_kernels(p.real));
  const RowParts cut = {p.rows, p.nodes, kNodeSegment, b.dz ? std::max<int64_t>(1, divide_up(p.rows, most_runs)) : 1};
  const int64_t doubles = CauchyPartSums::doubles(p);
  std::vector<double> sums(size_t(p.rows * cut.per_row() * doubles)), dz(b.dz ? size_t(2 * cut.runs() * p.nodes) : 0);
  cut.each(executor, 3 * cost_of_node(p), kernels.cauchy_scratch(p),
           [&](const FilterPart& part, int64_t number, int64_t run, void* scratch) {
             kernels.cauchy_backward(b, part, &sums[size_t(number * doubles)],
                                     b.dz ? &dz[size_t(2 * run * p.nodes)] : nullptr, scratch);
           });
  with_real(p.real, [&](auto real) {
    using Real = decltype(real);
    for_ranges(executor, p.rows, double(cut.per_row() * doubles), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t row = begin; row < end; ++row) finish<Real>(b, cut, sums, row);
    });
    if (!b.dz) return;
    for_ranges(executor, p.nodes, double(2 * cut.runs()), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t i = begin; i < end; ++i) put<Real>(b.dz, i, total_of(dz.data(), cut.runs(), 2 * p.nodes, i));
    });
  });
}

// ---- Vandermonde ---------------------------------------------------------------------------------------------------

namespace {

double cost_of_step(const VandermondeProblem& p, bool second) {
  return double(p.poles * p.groups) * (p.conjugate ? 2 : 4) * (second ? 2 : 1);
}

void run_series(const VandermondeSeries& series, const Executor& executor) {
  const VandermondeProblem& p = *series.problem;
  const FilterKernels kernels = PACKSEQ_BY_ISA(filter_kernels(p.real));
  const RowParts cut = {p.rows, p.length, kStepSegment};
  cut.each(executor, cost_of_step(p, false), kernels.vandermonde_scratch(p),
           [&](const FilterPart& part, int64_t, int64_t, void* scratch) { kernels.series(series, part, scratch); });
}

// The moments of every row, and what becomes of them: plain(group, row, n, sum) and second(...).
class Moments {
 public:
  Moments(const VandermondeMoments& m, const Executor& executor)
      : m_(m), p_(*m.problem), cut_{p_.rows, p_.length, kStepSegment} {
    const FilterKernels kernels = PACKSEQ_BY_ISA(filter_kernels(p_.real));
    sums_.resize(size_t(p_.rows * cut_.per_row() * m.doubles()));
    cut_.each(executor, cost_of_step(p_, m.second), kernels.vandermonde_scratch(p_),
              [&](const FilterPart& part, int64_t number, int64_t, void* scratch) {
                kernels.moments(m, part, sums_.data() + number * m.doubles(), scratch);
              });
  }

  Number plain(int64_t group, int64_t row, int64_t n) const { return at(group, row, n); }
  Number second(int64_t group, int64_t row, int64_t n) const { return at(p_.groups + group, row, n); }

  // f(row) for all rows.
  template <class F>
  void for_rows(const Executor& executor, const F& f) const {
    for_ranges(executor, p_.rows, double(cut_.per_row() * m_.doubles()), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t row = begin; row < end; ++row) f(row);
    });
  }

 private:
  Number at(int64_t index, int64_t row, int64_t n) const {
    const double* const own = sums_.data() + row * cut_.per_row() * m_.doubles();
    return total_of(own, cut_.per_row(), m_.doubles(), index * p_.poles + n);
  }

  const VandermondeMoments& m_;
  const VandermondeProblem& p_;
  const RowParts cut_;
  std::vector<double> sums_;
};

}  // namespace

void vandermonde_forward(const VandermondeForward& f, const Executor& executor) {
  run_series(
      {.problem = &f.problem, .v = f.v, .out = f.out, .factor = f.problem.conjugate ? 2.0 : 1.0, .conjugated = false},
      executor);
}

// dv = conj(the sum of conj(dout) exp(x l)), dx = conj(v times that of l conj(dout) exp(x l)).
void vandermonde_backward(const VandermondeBackward& b, const Executor& executor) {
  const VandermondeProblem& p = b.problem;
  const VandermondeMoments wanted = {.problem = &p, .u = b.dout, .second = b.dx != nullptr, .conjugated = true};
  const Moments moments(wanted, executor);
  const double factor = p.conjugate ? 2 : 1;
  with_real(p.real, [&](auto real) {
    using Real = decltype(real);
    moments.for_rows(executor, [&](int64_t row) {
      for (int64_t n = 0; n < p.poles; ++n) {
        Number dx = 0;
        for (int64_t g = 0; g < p.groups; ++g) {
          const int64_t i = (g * p.rows + row) * p.poles + n;
          if (b.dv) put<Real>(b.dv, i, factor * std::conj(moments.plain(g, row, n)));
          if (b.dx) dx += factor * std::conj(number_at<Real>(b.v, i) * moments.second(g, row, n));
        }
        if (b.dx) put<Real>(b.dx, row * p.poles + n, dx);
      }
    });
  });
}

void vandermonde_transpose(const VandermondeTranspose& t, const Executor& executor) {
  const VandermondeProblem& p = t.problem;
  const VandermondeMoments wanted = {.problem = &p, .u = t.u, .second = false, .conjugated = false};
  const Moments moments(wanted, executor);
  with_real(p.real, [&](auto real) {
    moments.for_rows(executor, [&](int64_t row) {
      for (int64_t g = 0; g < p.groups; ++g) {
        for (int64_t n = 0; n < p.poles; ++n) {
          put<decltype(real)>(t.out, (g * p.rows + row) * p.poles + n, moments.plain(g, row, n));
        }
      }
    });
  });
}

// du is the series of conj(dout), conjugate, or its real part; dx = conj(the sum of l u exp(x l)) dout.
void vandermonde_transpose_backward(const VandermondeTransposeBackward& b, const Executor& executor) {
  const VandermondeProblem& p = b.problem;
  if (b.du) {
    run_series({.problem = &p, .v = b.dout, .out = b.du, .factor = 1, .conjugated = true}, executor);
  }
  if (!b.dx) return;
  const VandermondeMoments wanted = {.problem = &p, .u = b.u, .second = true, .conjugated = false};
  const Moments moments(wanted, executor);
  with_real(p.real, [&](auto real) {
    using Real = decltype(real);
    moments.for_rows(executor, [&](int64_t row) {
      for (int64_t n = 0; n < p.poles; ++n) {
        Number dx = 0;
        for (int64_t g = 0; g < p.groups; ++g) {
          dx += std::conj(moments.second(g, row, n)) * number_at<Real>(b.dout, (g * p.rows + row) * p.poles + n);
        }
        put<Real>(b.dx, row * p.poles + n, dx);
      }
    });
  });
}

// ---- S4 ------------------------------------------------------------------------------------------------------------

namespace {

int64_t nodes_of(const S4Problem& p) { return p.length / 2 + 1; }

double cost_of_node(const S4Problem& p) { return double(p.poles) * double(10 + 4 * S4Sums::count(p, p.filters)); }

// cos and sin of pi j / length: the halves of the nodes' angles, of which the smaller one's sine is taken.
std::vector<double> circle_of(const S4Problem& p, const Executor& executor) {
  std::vector<double> circle(size_t(2 * nodes_of(p)));
  for_ranges(executor, nodes_of(p), 100, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t j = begin; j < end; ++j) {
      const double unit = std::numbers::pi / double(2 * p.length);
      const bool low = 4 * j <= p.length;
      const double angle = unit * double(low ? 2 * j : p.length - 2 * j), sine = std::sin(angle),
                   cosine = std::cos(angle);
      circle[size_t(2 * j)] = low ? cosine : sine, circle[size_t(2 * j + 1)] = low ? sine : cosine;
    }
  });
  return circle;
}

// A channel's gradients from the sums of its parts.
template <class Real>
void finish(const S4SpectrumBackward& b, const double* sums, int64_t parts, int64_t channel) {
  const S4Problem& p = b.problem;
  const int64_t doubles = S4Sums::doubles(p), N = p.poles;
  const auto place = [&](int64_t index, int64_t n) { return (index * p.channels + channel) * N + n; };
  const double dt = double(static_cast<const Real*>(p.dt)[channel]);
  double ddt = 0;
  for (int64_t part = 0; part < parts; ++part) ddt += sums[(part + 1) * doubles - 1];
  for (int64_t n = 0; n < N; ++n) {
    const Number w = number_at<Real>(p.w, place(0, n)), dpole = total_of(sums, parts, doubles, n);
    put<Real>(b.dw, place(0, n), dt * dpole);
    ddt += (std::conj(dpole) * w).real();

    Number left[1 + kMostRank], dleft[1 + kMostRank] = {};  // B and the columns of P
    for (int a = 0; a <= p.rank; ++a) left[a] = number_at<Real>(a == 0 ? p.B : p.P, place(a == 0 ? 0 : a - 1, n));
    int64_t at = N;
    for (int64_t filter = 0; filter < p.filters; filter += kFilterRun) {
      const int64_t filters = S4Sums::run(p, filter), columns = S4Sums::columns(p, filters);
      const auto gradient = [&](int a, int64_t column) {  // of left[a] times what the column stands for
        return total_of(sums, parts, doubles, at + (n * (1 + p.rank) + a) * columns + column);
      };
      for (int64_t g = 0; g < filters; ++g) {
        const Number C = number_at<Real>(p.C, place(filter + g, n));
        Number dC = 0;
        for (int a = 0; a <= p.rank; ++a) {
          const Number d = gradient(a, g);
          dC += std::conj(left[a]) * d, dleft[a] += std::conj(C) * d;
        }
        put<Real>(b.dC, place(filter + g, n), dC);
      }
      for (int column = 0; column < p.rank; ++column) {
        for (int a = 0; a <= p.rank; ++a) {
          const Number d = gradient(a, filters + column);
          dleft[a] += left[1 + column] * d, dleft[1 + column] += left[a] * std::conj(d);
        }
      }
      at += N * (1 + p.rank) * columns;
    }
    put<Real>(b.dB, place(0, n), dleft[0]);
    for (int a = 1; a <= p.rank; ++a) put<Real>(b.dP, place(a - 1, n), dleft[a]);
  }
  static_cast<Real*>(b.ddt)[channel] = Real(ddt);
}

}  // namespace

void s4_spectrum(const S4Spectrum& f, const Executor& executor) {
  const S4Problem& p = f.problem;
  const FilterKernels kernels = PACKSEQ_BY_ISA(filter_kernels(p.real));
  const std::vector<double> circle = circle_of(p, executor);
  const RowParts cut = {p.channels, nodes_of(p), kNodeSegment};
  cut.each(executor, cost_of_node(p), kernels.s4_scratch(p),
           [&](const FilterPart& part, int64_t, int64_t, void* scratch) {
             kernels.s4_spectrum(f, part, circle.data(), scratch);
           });
}

void s4_spectrum_backward(const S4SpectrumBackward& b, const Executor& executor) {
  const S4Problem& p = b.problem;
  const FilterKernels kernels = PACKSEQ_BY_ISA(filter_kernels(p.real));
  const std::vector<double> circle = circle_of(p, executor);
  const RowParts cut = {p.channels, nodes_of(p), kNodeSegment};
  const int64_t doubles = S4Sums::doubles(p), parts = cut.per_row();
  std::vector<double> sums(size_t(p.channels * parts * doubles));
  cut.each(executor, 3 * cost_of_node(p), kernels.s4_scratch(p),
           [&](const FilterPart& part, int64_t number, int64_t, void* scratch) {
             kernels.s4_backward(b, part, circle.data(), &sums[size_t(number * doubles)], scratch);
           });
  with_real(p.real, [&](auto real) {
    for_ranges(executor, p.channels, double(4 * parts * doubles), 0, [&](int64_t begin, int64_t end, void*) {
      for (int64_t c = begin; c < end; ++c) finish<decltype(real)>(b, &sums[size_t(c * parts * doubles)], parts, c);
    });
  });
}

}  // namespace packseq
