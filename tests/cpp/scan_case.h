// One selective scan with its tensors, and the loop in double that says what is right.
#pragma once
#include <cmath>
#include <complex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention_case.h"
#include "scan/scan.h"

namespace packseq::testing {

struct ScanCase {
  std::vector<int> lengths = {5, 0, 37, 1, 130};
  int channels = 8, states = 4, groups = 1;
  Dtype dtype = Dtype::f32;
  bool complex = false;
  bool constant_B = false, constant_C = false;  // one for all tokens
  bool D = true, z = true, delta_bias = true, softplus = true;
  bool initial = true, dfinal = true;
  bool reverse = false;
  int slack = 3;
  bool strided = false;  // tokens and groups further apart than they need be
  std::string name = "case";
};

// A tensor whose rows are `gap` elements further apart than they are wide.
inline Tensor gapped(Dtype t, int64_t total, int64_t heads, int64_t dim, int64_t gap) {
  Tensor x(t, total, heads, dim + gap);
  x.dim = dim;
  return x;
}

// The tensors of one call: heads are groups and channels, dim the numbers of a state, two where they are complex.
// Inputs' slack rows and gaps hold NaN, and so do outputs before the call.
struct Scan {
  const ScanCase c;
  const Dtype param;  // of parameters and states
  const int parts;    // real numbers of one state
  std::vector<int32_t> cu;
  Tensor u, delta, z, dout, A, B, C, D, delta_bias, initial, dfinal;
  Tensor out, final, du, ddelta, dz, dA, dB, dC, dD, ddelta_bias, dinitial;

  explicit Scan(const ScanCase& c_, unsigned seed = 1)
      : c(c_),
        param(c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
        parts(c.complex ? 2 : 1),
        cu(Attention::boundaries(c.lengths)),
        u(row_tensor(5)),
        delta(row_tensor(2)),
        z(row_tensor(3)),
        dout(row_tensor(1)),
        A(param, 1, c.channels, width()),
        B(matrix(c.constant_B, true)),
        C(matrix(c.constant_C, true)),
        D(param, 1, 1, c.channels),
        delta_bias(param, 1, 1, c.channels),
        initial(states()),
        dfinal(states()),
        out(row_tensor(0)),
        final(states()),
        du(row_tensor(0)),
        ddelta(row_tensor(0)),
        dz(row_tensor(0)),
        dA(param, 1, c.channels, width()),
        dB(matrix(c.constant_B, false)),
        dC(matrix(c.constant_C, false)),
        dD(param, 1, 1, c.channels),
        ddelta_bias(param, 1, 1, c.channels),
        dinitial(states()) {
    std::mt19937 random(seed);
    for (Tensor* x : {&u, &delta, &z, &dout}) x->fill(random, 0, cu.back());
    for (Tensor* x : {&A, &D, &delta_bias}) x->fill(random, 0, 1);
    for (Tensor* x : {&initial, &dfinal}) x->fill(random, 0, x->total);
    B.fill(random, 0, c.constant_B ? 1 : cu.back());
    C.fill(random, 0, c.constant_C ? 1 : cu.back());
    // Decays shorter and longer than a sequence; steps are positive, so nothing grows.
    for (int64_t i = 0; i < c.channels; ++i) {
      for (int64_t n = 0; n < width(); n += parts) A.set(0, i, n, -std::exp(A.at(0, i, n)) - 0.01);
      if (!c.softplus) delta_bias.set(0, 0, i, std::abs(delta_bias.at(0, 0, i)) / 8);
    }
    for (int64_t t = 0; t < cu.back() && !c.softplus; ++t)
      for (int64_t i = 0; i < c.channels; ++i) delta.set(t, 0, i, std::abs(delta.at(t, 0, i)) / 2);
  }

  int64_t width() const { return int64_t(c.states) * parts; }
  int64_t total() const { return cu.back() + c.slack; }
  int64_t sequences() const { return int64_t(cu.size()) - 1; }

  ScanProblem problem() const {
    const auto rows = [](const Tensor& x) { return Rows{x.memory.data(), x.token}; };
    const auto matrix = [&](const Tensor& x, bool constant) {
      if (constant) return StateMatrix{{}, x.memory.data()};
      return StateMatrix{{x.memory.data(), x.token / parts, x.head / parts}, nullptr};
    };
    return {.dtype = c.dtype,
            .complex = c.complex,
            .total = total(),
            .sequences = sequences(),
            .channels = c.channels,
            .states = c.states,
            .groups = c.groups,
            .cu_seqlens = cu.data(),
            .reverse = c.reverse,
            .delta_softplus = c.softplus,
            .u = rows(u),
            .delta = rows(delta),
            .z = c.z ? rows(z) : Rows{},
            .A = A.memory.data(),
            .B = matrix(B, c.constant_B),
            .C = matrix(C, c.constant_C),
            .D = c.D ? D.memory.data() : nullptr,
            .delta_bias = c.delta_bias ? delta_bias.memory.data() : nullptr,
            .initial_states = c.initial ? initial.memory.data() : nullptr};
  }

  void forward(const Executor& executor) {
    scan_forward(
        {.problem = problem(), .out = out.memory.data(), .final_states = final.memory.data(), .workspace = nullptr},
        executor);
  }

  void backward(const Executor& executor) {
    scan_backward({.problem = problem(),
                   .dout = {dout.memory.data(), dout.token},
                   .dfinal_states = c.dfinal ? dfinal.memory.data() : nullptr,
                   .du = du.memory.data(),
                   .ddelta = ddelta.memory.data(),
                   .dz = c.z ? dz.memory.data() : nullptr,
                   .dA = dA.memory.data(),
                   .dB = dB.memory.data(),
                   .dC = dC.memory.data(),
                   .dD = c.D ? dD.memory.data() : nullptr,
                   .ddelta_bias = c.delta_bias ? ddelta_bias.memory.data() : nullptr,
                   .dinitial_states = c.initial ? dinitial.memory.data() : nullptr,
                   .workspace = nullptr},
                  executor);
  }

  // What the two calls write, by name.
  std::vector<std::pair<const char*, Tensor*>> outputs() {
    std::vector<std::pair<const char*, Tensor*>> all = {
        {"out", &out}, {"final", &final}, {"du", &du}, {"ddelta", &ddelta}, {"dA", &dA}, {"dB", &dB}, {"dC", &dC}};
    if (c.z) all.emplace_back("dz", &dz);
    if (c.D) all.emplace_back("dD", &dD);
    if (c.delta_bias) all.emplace_back("ddelta_bias", &ddelta_bias);
    if (c.initial) all.emplace_back("dinitial", &dinitial);
    return all;
  }

 private:
  Tensor row_tensor(int gap) const { return gapped(c.dtype, total(), 1, c.channels, c.strided ? gap : 0); }
  Tensor states() const { return Tensor(param, sequences(), c.channels, width()); }
  Tensor matrix(bool constant, bool input) const {
    if (constant) return Tensor(param, 1, c.channels, width());
    return gapped(c.complex ? param : c.dtype, total(), c.groups, width(), c.strided && input ? 2 * parts : 0);
  }
};

// One channel of one sequence at a time, in double, straight from the formulas of scan.h; the backward is the
// derivative of each line, last line first. Real numbers are complex ones without an imaginary part.
struct ScanReference {
  std::vector<double> out, final, du, ddelta, dz, dA, dB, dC, dD, ddelta_bias, dinitial;

  explicit ScanReference(const Scan& s)
      : out(size(s.out)),
        final(size(s.final)),
        du(size(s.out)),
        ddelta(size(s.out)),
        dz(size(s.out)),
        dA(size(s.A)),
        dB(size(s.B)),
        dC(size(s.C)),
        dD(size(s.D)),
        ddelta_bias(size(s.D)),
        dinitial(size(s.final)) {
    for (int64_t i = 0; i < s.sequences(); ++i)
      for (int64_t c = 0; c < s.c.channels; ++c) channel(s, i, c);
  }

  // By the names of Scan::outputs().
  const std::vector<double>& operator[](const std::string& name) const {
    for (const auto& [known, values] : {std::pair{"out", &out},
                                        {"final", &final},
                                        {"du", &du},
                                        {"ddelta", &ddelta},
                                        {"dz", &dz},
                                        {"dA", &dA},
                                        {"dB", &dB},
                                        {"dC", &dC},
                                        {"dD", &dD},
                                        {"ddelta_bias", &ddelta_bias},
                                        {"dinitial", &dinitial}}) {
      if (name == known) return *values;
    }
    throw std::out_of_range(name);
  }

 private:
  using Number = std::complex<double>;

  static size_t size(const Tensor& x) { return size_t(x.total * x.heads * x.dim); }

  static Number number(const Scan& s, const Tensor& x, int64_t t, int64_t h, int64_t n) {
    return s.c.complex ? Number(x.at(t, h, 2 * n), x.at(t, h, 2 * n + 1)) : Number(x.at(t, h, n));
  }
  static void add(const Scan& s, std::vector<double>& sums, const Tensor& x, int64_t t, int64_t h, int64_t n,
                  Number value) {
    double* const at = &sums[size_t((t * x.heads + h) * x.dim + n * s.parts)];
    at[0] += value.real();
    if (s.c.complex) at[1] += value.imag();
  }

  void channel(const Scan& s, int64_t sequence, int64_t c) {
    const ScanCase& k = s.c;
    const int64_t begin = s.cu[sequence], end = s.cu[sequence + 1], length = end - begin, states = k.states;
    const int64_t group = c / (k.channels / k.groups);
    const double twice = k.complex ? 2 : 1;
    const auto row = [&](int64_t i) { return k.reverse ? end - 1 - i : begin + i; };
    const auto B = [&](int64_t t, int64_t n) {
      return k.constant_B ? number(s, s.B, 0, c, n) : number(s, s.B, t, group, n);
    };
    const auto C = [&](int64_t t, int64_t n) {
      return k.constant_C ? number(s, s.C, 0, c, n) : number(s, s.C, t, group, n);
    };
    const auto raw = [&](int64_t t) { return s.delta.at(t, 0, c) + (k.delta_bias ? s.delta_bias.at(0, 0, c) : 0); };
    const auto step = [&](int64_t t) { return k.softplus && raw(t) <= 20 ? std::log1p(std::exp(raw(t))) : raw(t); };

    std::vector<Number> h(size_t((length + 1) * states));  // h[i * states + n]: before the i-th row
    std::vector<double> y(size_t(length), 0.0);            // with D u
    for (int64_t n = 0; n < states && k.initial; ++n) h[size_t(n)] = number(s, s.initial, sequence, c, n);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t t = row(i);
      const double u = s.u.at(t, 0, c), d = step(t);
      for (int64_t n = 0; n < states; ++n) {
        const Number A = number(s, s.A, 0, c, n), before = h[size_t(i * states + n)];
        const Number after = std::exp(d * A) * before + d * u * B(t, n);
        h[size_t((i + 1) * states + n)] = after;
        y[size_t(i)] += twice * (C(t, n) * after).real();
      }
      if (k.D) y[size_t(i)] += s.D.at(0, 0, c) * u;
      const double z = k.z ? s.z.at(t, 0, c) : 0, gate = k.z ? z / (1 + std::exp(-z)) : 1;
      out[size_t(t * k.channels + c)] = y[size_t(i)] * gate;
    }
    for (int64_t n = 0; n < states; ++n) add(s, final, s.final, sequence, c, n, h[size_t(length * states + n)]);

    std::vector<Number> dh(size_t(states), 0.0);  // of the state after row i, then before it
    for (int64_t n = 0; n < states && k.dfinal; ++n) dh[size_t(n)] = number(s, s.dfinal, sequence, c, n);
    for (int64_t i = length - 1; i >= 0; --i) {
      const int64_t t = row(i);
      const size_t at = size_t(t * k.channels + c);
      const double u = s.u.at(t, 0, c), d = step(t);
      double dy = s.dout.at(t, 0, c);
      if (k.z) {
        const double z = s.z.at(t, 0, c), sigmoid = 1 / (1 + std::exp(-z));
        dz[at] = dy * y[size_t(i)] * sigmoid * (1 + z * (1 - sigmoid));
        dy *= z * sigmoid;
      }
      double dstep = 0;
      if (k.D) {
        dD[size_t(c)] += dy * u;
        du[at] += dy * s.D.at(0, 0, c);
      }
      for (int64_t n = 0; n < states; ++n) {
        const Number A = number(s, s.A, 0, c, n), decay = std::exp(d * A);
        const Number before = h[size_t(i * states + n)], after = h[size_t((i + 1) * states + n)];
        const Number dafter = dh[size_t(n)] + twice * dy * std::conj(C(t, n));
        add(s, dC, s.C, k.constant_C ? 0 : t, k.constant_C ? c : group, n, twice * dy * std::conj(after));
        add(s, dB, s.B, k.constant_B ? 0 : t, k.constant_B ? c : group, n, d * u * dafter);
        const double input = (std::conj(B(t, n)) * dafter).real();
        const Number dexponent = std::conj(decay * before) * dafter;
        du[at] += d * input;
        dstep += u * input + (std::conj(A) * dexponent).real();
        add(s, dA, s.A, 0, c, n, d * dexponent);
        dh[size_t(n)] = std::conj(decay) * dafter;
      }
      if (k.softplus && raw(t) <= 20) dstep /= 1 + std::exp(-raw(t));
      ddelta[at] = dstep;
      ddelta_bias[size_t(c)] += dstep;
    }
    for (int64_t n = 0; n < states; ++n) add(s, dinitial, s.final, sequence, c, n, dh[size_t(n)]);
  }
};

}  // namespace packseq::testing
