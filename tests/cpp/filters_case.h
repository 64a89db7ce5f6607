// The filters' operators as functions of arrays, each with a reference in long double.
//
// Gradients are checked against central differences of the reference, so that no derivative is written down twice.
#pragma once
#include <algorithm>
#include <complex>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "longconv/filters.h"

namespace packseq::testing {

using Wide = long double;
using WideComplex = std::complex<Wide>;
using WideArray = std::vector<Wide>;

// Numbers between guard bands.
struct Array {
  Array(Dtype t, size_t count) : dtype(t), size(count), memory(count * size_of(t)) {}
  Array(Dtype t, const WideArray& values) : Array(t, values.size()) {
    for (size_t i = 0; i < size; ++i) write(memory.data(), int64_t(i), t, double(values[i]));
  }
  double operator[](size_t i) const { return read(memory.data(), int64_t(i), dtype); }
  void* data() { return memory.data(); }
  WideArray wide() const {
    WideArray values(size);
    for (size_t i = 0; i < size; ++i) values[i] = (*this)[i];
    return values;
  }

  Dtype dtype;
  size_t size;
  Guarded memory;
};

inline WideComplex number(const WideArray& x, size_t i) { return {x[2 * i], x[2 * i + 1]}; }
inline void add(WideArray& x, size_t i, WideComplex value) { x[2 * i] += value.real(), x[2 * i + 1] += value.imag(); }

inline WideArray normal(std::mt19937& random, size_t count, double scale = 1) {
  std::normal_distribution<double> distribution;
  WideArray x(count);
  for (Wide& value : x) value = scale * distribution(random);
  return x;
}

// Values as a tensor of this type holds them.
inline WideArray rounded(const WideArray& x, Dtype t) { return Array(t, x).wide(); }

using Arrays = std::vector<Array>;
using WideArrays = std::vector<WideArray>;

// An operator on one set of sizes. Gradients come in the order of the inputs.
struct Operator {
  std::string name;
  WideArrays inputs;
  size_t out_size;
  double condition = 1;  // how much more than the last place of a number the last places of the inputs make
  std::function<WideArray(const WideArrays&)> reference;
  std::function<void(Dtype, Arrays& inputs, Array& out, const Executor&)> forward;
  std::function<void(Dtype, Arrays& inputs, Array& dout, Arrays& gradients, const Executor&)> backward;
};

struct Sizes {
  int64_t groups, rows, length;
  int poles;
  bool conjugate;

  std::string name(const char* what) const {
    return std::string(what) + (conjugate ? " pairs" : "") + " groups " + std::to_string(groups) + " rows " +
           std::to_string(rows) + " length " + std::to_string(length) + " poles " + std::to_string(poles);
  }
  size_t shared() const { return size_t(2 * rows * poles); }
  size_t grouped() const { return size_t(groups) * shared(); }
  size_t series() const { return size_t(groups * rows * length) * (conjugate ? 1 : 2); }
};

// Poles as state space models have them: in the left half plane, higher and higher.
inline WideArray stable_poles(std::mt19937& random, int64_t rows, int64_t poles, double decay, double rise) {
  std::uniform_real_distribution<double> distribution(0.5, 1.5);
  WideArray w;
  for (int64_t i = 0; i < rows * poles; ++i) {
    w.push_back(-decay * distribution(random));
    w.push_back(rise * (double(i % poles) + distribution(random)));
  }
  return w;
}

// ---- Cauchy --------------------------------------------------------------------------------------------------------

inline Operator cauchy_operator(const Sizes& s) {
  std::mt19937 random(3);
  Operator op;
  op.name = s.name("cauchy");
  WideArray z = normal(random, size_t(2 * s.length), 0.2);
  for (size_t i = 1; i < z.size(); i += 2) z[i] = 6 * z[i] * Wide(s.poles);
  op.inputs = {normal(random, s.grouped()), z, stable_poles(random, s.rows, s.poles, 1.5, 1)};
  op.out_size = size_t(2 * s.groups * s.rows * s.length);
  op.reference = [=](const WideArrays& in) {
    WideArray out(op.out_size);
    for (int64_t gh = 0; gh < s.groups * s.rows; ++gh)
      for (int64_t l = 0; l < s.length; ++l)
        for (int64_t n = 0; n < s.poles; ++n) {
          const WideComplex v = number(in[0], size_t(gh * s.poles + n)), z = number(in[1], size_t(l));
          const WideComplex w = number(in[2], size_t(gh % s.rows * s.poles + n));
          add(out, size_t(gh * s.length + l), v / (z - w));
          if (s.conjugate) add(out, size_t(gh * s.length + l), std::conj(v) / (z - std::conj(w)));
        }
    return out;
  };
  const auto problem = [=](Dtype t, Arrays& in) {
    return CauchyProblem{t, s.conjugate, s.groups, s.rows, s.length, s.poles, in[0].data(), in[1].data(), in[2].data()};
  };
  op.forward = [=](Dtype t, Arrays& in, Array& out, const Executor& executor) {
    cauchy_forward({problem(t, in), out.data()}, executor);
  };
  op.backward = [=](Dtype t, Arrays& in, Array& dout, Arrays& d, const Executor& executor) {
    cauchy_backward({problem(t, in), dout.data(), d[0].data(), d[1].data(), d[2].data(), nullptr}, executor);
  };
  return op;
}

// ---- Vandermonde ---------------------------------------------------------------------------------------------------

inline VandermondeProblem problem_of(const Sizes& s, Dtype t, Array& x) {
  return {t, s.conjugate, s.groups, s.rows, s.length, s.poles, x.data()};
}

// exp(x l), the angle less whole turns: even a long double's last place would be too coarse for the product. x is a
// double.
inline WideComplex power(const WideArray& x, size_t i, int64_t l) {
  const double im = double(x[2 * i + 1]);
  const float high = float(im);
  const Wide turn = 0x6.487ED51p0L, turn_rest = 0x1.0B4611A62633145Cp-32L;
  const Wide angle = Wide(high) * Wide(l), turns = std::round(angle / turn);
  const Wide rest = (angle - turns * turn) - turns * turn_rest + (Wide(im) - Wide(high)) * Wide(l);
  return std::polar(std::exp(x[2 * i] * Wide(l)), rest);
}

inline Operator vandermonde_operator(const Sizes& s) {
  std::mt19937 random(4);
  Operator op;
  op.name = s.name("vandermonde");
  op.inputs = {normal(random, s.grouped()), stable_poles(random, s.rows, s.poles, 0.01, 3.0 / s.poles)};
  op.out_size = s.series();
  op.reference = [=](const WideArrays& in) {
    WideArray out(op.out_size);
    for (int64_t h = 0; h < s.rows; ++h)
      for (int64_t l = 0; l < s.length; ++l)
        for (int64_t n = 0; n < s.poles; ++n) {
          const WideComplex e = power(in[1], size_t(h * s.poles + n), l);
          for (int64_t g = 0; g < s.groups; ++g) {
            const int64_t gh = g * s.rows + h;
            const WideComplex term = number(in[0], size_t(gh * s.poles + n)) * e;
            if (s.conjugate) {
              out[size_t(gh * s.length + l)] += 2 * term.real();
            } else {
              add(out, size_t(gh * s.length + l), term);
            }
          }
        }
    return out;
  };
  op.forward = [=](Dtype t, Arrays& in, Array& out, const Executor& executor) {
    vandermonde_forward({problem_of(s, t, in[1]), in[0].data(), out.data()}, executor);
  };
  op.backward = [=](Dtype t, Arrays& in, Array& dout, Arrays& d, const Executor& executor) {
    vandermonde_backward({problem_of(s, t, in[1]), in[0].data(), dout.data(), d[0].data(), d[1].data(), nullptr},
                         executor);
  };
  return op;
}

inline Operator transpose_operator(const Sizes& s) {
  std::mt19937 random(5);
  Operator op;
  op.name = s.name("transpose");
  op.inputs = {normal(random, s.series()), stable_poles(random, s.rows, s.poles, 0.01, 3.0 / s.poles)};
  op.out_size = s.grouped();
  op.reference = [=](const WideArrays& in) {
    WideArray out(op.out_size);
    for (int64_t h = 0; h < s.rows; ++h)
      for (int64_t l = 0; l < s.length; ++l)
        for (int64_t n = 0; n < s.poles; ++n) {
          const WideComplex e = power(in[1], size_t(h * s.poles + n), l);
          for (int64_t g = 0; g < s.groups; ++g) {
            const size_t from = size_t((g * s.rows + h) * s.length + l);
            const WideComplex u = s.conjugate ? WideComplex(in[0][from]) : number(in[0], from);
            add(out, size_t((g * s.rows + h) * s.poles + n), u * e);
          }
        }
    return out;
  };
  op.forward = [=](Dtype t, Arrays& in, Array& out, const Executor& executor) {
    vandermonde_transpose({problem_of(s, t, in[1]), in[0].data(), out.data(), nullptr}, executor);
  };
  op.backward = [=](Dtype t, Arrays& in, Array& dout, Arrays& d, const Executor& executor) {
    vandermonde_transpose_backward(
        {problem_of(s, t, in[1]), in[0].data(), dout.data(), d[0].data(), d[1].data(), nullptr}, executor);
  };
  return op;
}

// ---- S4 ------------------------------------------------------------------------------------------------------------

// The system's dense matrix over both members of every conjugate pair, A = diag(w) - P P^*, and B.
struct DenseSystem {
  size_t size;
  std::vector<WideComplex> A, B;

  // w, P, B as tensors: [channels, poles], [rank, channels, poles], [channels, poles]
  DenseSystem(const WideArray& w, const WideArray& P, const WideArray& b, size_t channel, size_t channels, size_t poles,
              size_t rank)
      : size(2 * poles), A(size * size), B(size) {
    const auto both = [&](const WideArray& x, size_t index, size_t i) {
      const WideComplex one = number(x, (index * channels + channel) * poles + i % poles);
      return i < poles ? one : std::conj(one);
    };
    for (size_t i = 0; i < size; ++i) {
      A[i * size + i] = both(w, 0, i), B[i] = both(b, 0, i);
      for (size_t c = 0; c < rank; ++c)
        for (size_t j = 0; j < size; ++j) A[i * size + j] -= both(P, c, i) * std::conj(both(P, c, j));
    }
  }
};

// x with M x = b, by elimination with pivots.
inline std::vector<WideComplex> solve(std::vector<WideComplex> M, std::vector<WideComplex> b) {
  const size_t n = b.size();
  for (size_t k = 0; k < n; ++k) {
    size_t pivot = k;
    for (size_t i = k + 1; i < n; ++i) pivot = std::abs(M[i * n + k]) > std::abs(M[pivot * n + k]) ? i : pivot;
    for (size_t j = 0; j < n; ++j) std::swap(M[k * n + j], M[pivot * n + j]);
    std::swap(b[k], b[pivot]);
    for (size_t i = k + 1; i < n; ++i) {
      const WideComplex factor = M[i * n + k] / M[k * n + k];
      for (size_t j = k; j < n; ++j) M[i * n + j] -= factor * M[k * n + j];
      b[i] -= factor * b[k];
    }
  }
  for (size_t k = n; k-- > 0;) {
    for (size_t j = k + 1; j < n; ++j) b[k] -= M[k * n + j] * b[j];
    b[k] /= M[k * n + k];
  }
  return b;
}

struct S4Sizes {
  int64_t filters, channels, length;
  int poles, rank;

  std::string name() const {
    return "s4 filters " + std::to_string(filters) + " channels " + std::to_string(channels) + " length " +
           std::to_string(length) + " poles " + std::to_string(poles) + " rank " + std::to_string(rank);
  }
};

// w, P, B, C, dt of S4's kind.
inline WideArrays s4_inputs(const S4Sizes& s) {
  std::mt19937 random(6);
  const size_t shared = size_t(2 * s.channels * s.poles);
  WideArray dt;
  for (int64_t c = 0; c < s.channels; ++c) dt.push_back(0.02 + 0.05 * double(c % 4));
  return {stable_poles(random, s.channels, s.poles, 0.5, 3), normal(random, size_t(s.rank) * shared, 0.7),
          normal(random, shared), normal(random, size_t(s.filters) * shared), dt};
}

// C (I - o Abar)^-1 Bbar of the dense system: C [((1 - o) I - dt / 2 (1 + o) A)]^-1 dt B.
inline WideArray s4_reference(const S4Sizes& s, const WideArrays& in) {
  const int64_t nodes = s.length / 2 + 1;
  WideArray out(size_t(2 * s.filters * s.channels * nodes));
  for (int64_t c = 0; c < s.channels; ++c) {
    const DenseSystem system(in[0], in[1], in[2], size_t(c), size_t(s.channels), size_t(s.poles), size_t(s.rank));
    const Wide dt = in[4][size_t(c)];
    for (int64_t j = 0; j < nodes; ++j) {
      const WideComplex o = std::polar<Wide>(1, -2 * acosl(-1) * Wide(j) / Wide(s.length));
      std::vector<WideComplex> M = system.A, b = system.B;
      for (WideComplex& m : M) m *= -dt / 2 * (Wide(1) + o);
      for (size_t i = 0; i < system.size; ++i) M[i * system.size + i] += Wide(1) - o, b[i] *= dt;
      const std::vector<WideComplex> x = solve(M, b);
      for (int64_t g = 0; g < s.filters; ++g)
        for (int64_t n = 0; n < s.poles; ++n) {
          const WideComplex C = number(in[3], size_t((g * s.channels + c) * s.poles + n));
          add(out, size_t((g * s.channels + c) * nodes + j), C * x[size_t(n)] + std::conj(C) * x[size_t(s.poles + n)]);
        }
    }
  }
  return out;
}

inline Operator s4_operator(const S4Sizes& s) {
  Operator op;
  op.name = s.name();
  op.condition = 8;  // near a resonance the difference of two large numbers counts
  op.inputs = s4_inputs(s);
  op.out_size = size_t(2 * s.filters * s.channels * (s.length / 2 + 1));
  op.reference = [=](const WideArrays& in) { return s4_reference(s, in); };
  const auto problem = [=](Dtype t, Arrays& in) {
    return S4Problem{t,           s.filters,    s.channels,   s.length,     s.poles,
                     s.rank,      in[0].data(), in[1].data(), in[2].data(), in[3].data(),
                     in[4].data()};
  };
  op.forward = [=](Dtype t, Arrays& in, Array& out, const Executor& executor) {
    s4_spectrum({problem(t, in), out.data()}, executor);
  };
  op.backward = [=](Dtype t, Arrays& in, Array& dout, Arrays& d, const Executor& executor) {
    s4_spectrum_backward(
        {problem(t, in), dout.data(), d[0].data(), d[1].data(), d[2].data(), d[3].data(), d[4].data(), nullptr},
        executor);
  };
  return op;
}

}  // namespace packseq::testing
