// S4's spectrum and its recurrence on the GPU, against their definitions in double.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "device_array.cuh"
#include "filters_draws.h"
#include "longconv/filters.h"
#include "longconv/s4_step.h"

namespace packseq::testing {
namespace {

constexpr double kPi = 3.14159265358979323846;

// ---- Spectrum ------------------------------------------------------------------------------------------------------

// The parameters in double, one vector each, so that the reference can be differentiated numerically.
struct S4Values {
  std::vector<Double2> w, P, B, C;
  std::vector<double> dt;
};

struct S4Case {
  int64_t filters, channels, length;
  int poles, rank;
  std::vector<Float2> w, P, B, C, dout;
  std::vector<float> dt;

  S4Case(int64_t filters, int64_t channels, int64_t length, int poles, int rank, float fastest = 0.1f)
      : filters(filters),
        channels(channels),
        length(length),
        poles(poles),
        rank(rank),
        w(random_poles(channels * poles, 1)),
        P(random_complex(rank * channels * poles, 2, 0.7f / std::sqrt(float(poles)))),
        B(random_complex(channels * poles, 3)),
        C(random_complex(filters * channels * poles, 4)),
        dout(random_complex(filters * channels * frequencies(), 5)),
        dt(size_t(channels)) {
    for (size_t h = 0; h < dt.size(); ++h) dt[h] = fastest / float(h + 1);
  }
  int64_t frequencies() const { return length / 2 + 1; }
  std::string name() const {
    return "rank " + std::to_string(rank) + ", " + std::to_string(filters) + " filters, " + std::to_string(poles) +
           " poles, length " + std::to_string(length) + ": ";
  }
  S4Values values() const {
    return {
        {w.begin(), w.end()}, {P.begin(), P.end()}, {B.begin(), B.end()}, {C.begin(), C.end()}, {dt.begin(), dt.end()}};
  }
};

// By the definition in filters.h; at theta = pi by its limit.
std::vector<Double2> reference(const S4Case& c, const S4Values& x) {
  std::vector<Double2> out(size_t(c.filters * c.channels * c.frequencies()));
  for (int64_t h = 0; h < c.channels; ++h)
    for (int64_t j = 0; j < c.frequencies(); ++j) {
      const bool last = 2 * j == c.length;
      const Double2 o = std::polar(1.0, -2 * kPi * double(j) / double(c.length)), z = 2.0 * (1.0 - o) / (1.0 + o);
      const double dt = x.dt[size_t(h)];
      const auto r = [&](const auto& a, const auto& b) {
        Double2 sum = 0;
        for (int n = 0; n < c.poles; ++n) {
          const Double2 w = dt * x.w[size_t(h * c.poles + n)], v = a(n) * b(n);
          sum += last ? v + std::conj(v) : v / (z - w) + std::conj(v) / (z - std::conj(w));
        }
        return dt * sum;
      };
      const auto B = [&](int n) { return x.B[size_t(h * c.poles + n)]; };
      const auto P = [&](int k) { return [&, k](int n) { return x.P[size_t((k * c.channels + h) * c.poles + n)]; }; };
      const auto conj = [](const auto& f) { return [f](int n) { return std::conj(f(n)); }; };
      for (int64_t g = 0; g < c.filters; ++g) {
        const auto C = [&](int n) { return x.C[size_t((g * c.channels + h) * c.poles + n)]; };
        Double2& y = out[size_t((g * c.channels + h) * c.frequencies() + j)];
        y = r(B, C);
        if (last) {  // 2 / (1 + o) grows as z / 2, and r as 1 / z; the rest vanishes
          y *= 0.5;
          continue;
        }
        if (c.rank == 1) y -= r(B, conj(P(0))) / (1.0 + r(P(0), conj(P(0)))) * r(P(0), C);
        if (c.rank == 2) {
          const Double2 a = 1.0 + r(P(0), conj(P(0))), b = r(P(1), conj(P(0))), d = r(P(0), conj(P(1))),
                        e = 1.0 + r(P(1), conj(P(1)));
          const Double2 b0 = r(B, conj(P(0))), b1 = r(B, conj(P(1)));
          y -= (r(P(0), C) * (e * b0 - b * b1) + r(P(1), C) * (a * b1 - d * b0)) / (a * e - b * d);
        }
        y *= 2.0 / (1.0 + o);
      }
    }
  return out;
}

struct S4Got {
  std::vector<Float2> out, dw, dP, dB, dC;
  std::vector<float> ddt;
};

S4Got run(const S4Case& c) {
  const DeviceArray<Float2> w(c.w), P(c.P), B(c.B), C(c.C), dout(c.dout);
  const DeviceArray<float> dt(c.dt), ddt(c.channels);
  const DeviceArray<Float2> out(int64_t(c.dout.size())), dw(int64_t(c.w.size())), dP(int64_t(c.P.size())),
      dB(int64_t(c.B.size())), dC(int64_t(c.C.size()));
  const S4Problem p = {.real = Dtype::f32,
                       .filters = c.filters,
                       .channels = c.channels,
                       .length = c.length,
                       .poles = c.poles,
                       .rank = c.rank,
                       .w = w.data(),
                       .P = P.data(),
                       .B = B.data(),
                       .C = C.data(),
                       .dt = dt.data()};
  const DeviceArray<char> workspace(int64_t(s4_spectrum_backward_workspace(p)));
  s4_spectrum({.problem = p, .out = out.data()}, nullptr);
  s4_spectrum_backward({.problem = p,
                        .dout = dout.data(),
                        .dw = dw.data(),
                        .dP = dP.data(),
                        .dB = dB.data(),
                        .dC = dC.data(),
                        .ddt = ddt.data(),
                        .workspace = workspace.data()},
                       nullptr);
  workspace.values();
  return {out.values(), dw.values(), dP.values(), dB.values(), dC.values(), ddt.values()};
}

double loss(const S4Case& c, const S4Values& x) {
  const std::vector<Double2> out = reference(c, x);
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += (std::conj(Double2(c.dout[i])) * out[i]).real();
  return sum;
}

// The loss's derivative along a change of `x`, which `move` makes of a given size.
template <class Move>
double slope(const S4Case& c, const Move& move) {
  constexpr double kStep = 1e-4;
  const auto at = [&](double step) {
    S4Values x = c.values();
    move(x, step);
    return loss(c, x);
  };
  return (8 * (at(kStep) - at(-kStep)) - (at(2 * kStep) - at(-2 * kStep))) / (12 * kStep);
}

// Poles that turn often before they decay magnify the rounding of dt w, and of y: by |W| / Re W.
constexpr double kGradientTolerance = 8e-6;

// Gradients of one tensor, element by element where there are few, else along a few directions of random signs.
template <class Got, class Value>
void expect_gradient(const S4Case& c, const std::vector<Got>& got, std::vector<Value> S4Values::*tensor,
                     const std::string& what, double scale = 1e-30) {
  const size_t count = got.size();
  if (count == 0) return;
  constexpr bool kComplex = std::is_same_v<Value, Double2>;
  const auto change = [](double step, bool imaginary, double by) -> Value {
    if constexpr (kComplex) return by * (imaginary ? Double2(0, step) : Double2(step, 0));
    return by * step;
  };
  const auto part = [](Got x, bool imaginary) {
    return double(imaginary ? std::imag(Double2(x)) : std::real(Double2(x)));
  };
  // Relative to each channel's scale, dt's change must be small.
  const double by = std::is_same_v<Value, double> ? 0.01 : 1.0;
  for (int imaginary = 0; imaginary < (kComplex ? 2 : 1); ++imaginary) {
    std::vector<double> want, have;
    if (count <= 40) {
      for (size_t i = 0; i < count; ++i) {
        want.push_back(slope(c, [&](S4Values& x, double step) { (x.*tensor)[i] += change(step, imaginary, by); }) / by);
        have.push_back(part(got[i], imaginary));
      }
      expect_near(have, want, kGradientTolerance, c.name() + what, scale);
      continue;
    }
    std::mt19937 random(8);
    for (int direction = 0; direction < 3; ++direction) {
      std::vector<double> signs;
      double sum = 0, size = 0;
      for (size_t i = 0; i < count; ++i) {
        signs.push_back(random() % 2 ? 1.0 : -1.0);
        sum += signs[i] * part(got[i], imaginary), size += std::abs(part(got[i], imaginary));
      }
      const double right = slope(c,
                                 [&](S4Values& x, double step) {
                                   for (size_t i = 0; i < count; ++i)
                                     (x.*tensor)[i] += change(step, imaginary, signs[i] * by);
                                 }) /
                           by;
      EXPECT_NEAR(sum, right, kGradientTolerance * std::max(size, scale))
          << c.name() << what << ", direction " << direction;
    }
  }
}

void expect_right(const S4Case& c) {
  const S4Got got = run(c);
  expect_near(got.out, reference(c, c.values()), 2e-6, c.name() + "out");
  expect_gradient(c, got.dw, &S4Values::w, "dw");
  expect_gradient(c, got.dP, &S4Values::P, "dP");
  expect_gradient(c, got.dB, &S4Values::B, "dB");
  expect_gradient(c, got.dC, &S4Values::C, "dC");
  double of_dt = 0;  // the terms of ddt, of which at low frequencies nothing is left
  for (size_t i = 0; i < c.w.size(); ++i) of_dt += std::abs(got.dw[i] * c.w[i]) / c.dt[i / size_t(c.poles)];
  expect_gradient(c, got.ddt, &S4Values::dt, "ddt", of_dt);
}

class S4Cuda : public GpuTest {};

TEST_F(S4Cuda, SpectrumSizes) {
  for (const int rank : {0, 1, 2}) {
    for (const int poles : {1, 2, 3, 6, 32, 64, 100}) expect_right({1, 2, 17, poles, rank});
    for (const int64_t length : {1, 2, 3, 17, 489, 1024, 1047}) expect_right({1, 2, length, 3, rank});
    for (const int poles : {256, 1024}) expect_right({1, 1, 6, poles, rank});
    expect_right({1, 1, 2200, 2, rank});  // several tiles
  }
}

TEST_F(S4Cuda, SpectrumFilters) {
  for (const int rank : {0, 1, 2})
    for (const int64_t filters : {2, 3, 4}) expect_right({filters, 3, 40, 5, rank});
}

TEST_F(S4Cuda, SpectrumOfNothing) {
  for (const int rank : {0, 1, 2}) {
    const S4Got none = run({1, 0, 10, 4, rank});
    EXPECT_TRUE(none.out.empty());
    const S4Got got = run({0, 2, 10, 4, rank});
    for (const Float2 x : got.dw) EXPECT_EQ(x, Float2(0));
    for (const float x : got.ddt) EXPECT_EQ(x, 0.0f);
  }
}

// Poles as HiPPO's, time steps from 1e-4 to 1e-1, a long filter: every frequency, the last one too.
TEST_F(S4Cuda, LongSpectrum) {
  S4Case c(1, 3, 16384, 32, 1);
  for (size_t i = 0; i < c.w.size(); ++i) c.w[i] = {-0.5f, float(kPi) * float(i % 32)};
  c.dt = {1e-4f, 1e-3f, 0.1f};
  const DeviceArray<Float2> w(c.w), P(c.P), B(c.B), C(c.C), out(3 * c.frequencies());
  const DeviceArray<float> dt(c.dt);
  s4_spectrum({.problem = {.real = Dtype::f32,
                           .filters = 1,
                           .channels = 3,
                           .length = c.length,
                           .poles = 32,
                           .rank = 1,
                           .w = w.data(),
                           .P = P.data(),
                           .B = B.data(),
                           .C = C.data(),
                           .dt = dt.data()},
               .out = out.data()},
              nullptr);
  // The fastest pole turns 200 times as fast as it decays: that many times the rounding of dt w.
  expect_near(out.values(), reference(c, c.values()), 2e-5, "long spectrum");
}

TEST_F(S4Cuda, SpectrumRepeats) {
  const S4Case c(2, 5, 3000, 40, 1);
  const S4Got a = run(c), b = run(c);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.dw, b.dw);
  EXPECT_EQ(a.dP, b.dP);
  EXPECT_EQ(a.dB, b.dB);
  EXPECT_EQ(a.dC, b.dC);
  EXPECT_EQ(a.ddt, b.ddt);
}

// ---- Steps ---------------------------------------------------------------------------------------------------------

template <class T>
struct Step {
  S4Case c;
  bool zoh;
  std::vector<int> lengths;
  std::vector<int32_t> indices;
  int64_t slack = 3, slots;
  std::vector<float> u, D;
  std::vector<Float2> pool;

  Step(const S4Case& c, bool zoh, std::vector<int> lengths, std::vector<int32_t> indices)
      : c(c),
        zoh(zoh),
        lengths(lengths),
        indices(indices),
        slots(int64_t(indices.size()) + 2),
        u(random_real(total() * c.channels, 11)),
        D(random_real(c.filters * c.channels, 12)),
        pool(random_complex(slots * c.channels * c.poles, 13)) {
    for (float& x : u) x = float(T(x));
  }
  int64_t total() const {
    int64_t sum = slack;
    for (const int x : lengths) sum += x;
    return sum;
  }
};

struct StepResult {
  std::vector<double> out;
  std::vector<Double2> pool;
};

// One channel's state and its conjugate as one dense system, solved by taking the low-rank terms one after another.
template <class T>
StepResult reference(const Step<T>& s) {
  const S4Case& c = s.c;
  const S4Values x = c.values();
  StepResult r = {std::vector<double>(size_t(s.total() * c.filters * c.channels)), {s.pool.begin(), s.pool.end()}};
  const size_t N = size_t(c.poles);
  for (int64_t h = 0; h < c.channels; ++h) {
    const double dt = x.dt[size_t(h)];
    const auto both = [&](const std::vector<Double2>& of, int64_t first) {
      std::vector<Double2> y(of.begin() + first * c.poles, of.begin() + (first + 1) * c.poles);
      for (size_t n = 0; n < N; ++n) y.push_back(std::conj(y[n]));
      return y;
    };
    const std::vector<Double2> w = both(x.w, h), B = both(x.B, h);
    std::vector<std::vector<Double2>> P;
    for (int k = 0; k < c.rank; ++k) P.push_back(both(x.P, k * c.channels + h));
    const auto product = [](const std::vector<Double2>& p, const std::vector<Double2>& y) {
      Double2 sum = 0;
      for (size_t n = 0; n < p.size(); ++n) sum += std::conj(p[n]) * y[n];
      return sum;
    };
    // (I - dt/2 A)^-1 y: first without P, then each column of it by Sherman's and Morrison's formula.
    std::vector<std::vector<Double2>> solved;
    const auto solve = [&](std::vector<Double2> y) {
      for (size_t n = 0; n < y.size(); ++n) y[n] /= 1.0 - dt / 2 * w[n];
      for (size_t k = 0; k < solved.size(); ++k) {
        const Double2 by = dt / 2 * product(P[k], y) / (1.0 + dt / 2 * product(P[k], solved[k]));
        for (size_t n = 0; n < y.size(); ++n) y[n] -= by * solved[k][n];
      }
      return y;
    };
    for (int k = 0; k < c.rank; ++k) solved.push_back(solve(P[size_t(k)]));
    int64_t row = 0;
    for (size_t i = 0; i < s.lengths.size(); ++i) {
      const int64_t slot = s.indices[i], end = row + s.lengths[i];
      if (slot < 0 || slot >= s.slots) {
        row = end;
        continue;
      }
      std::vector<Double2> state = both(r.pool, slot * c.channels + h);
      for (; row < end; ++row) {
        const double u = s.u[size_t(row * c.channels + h)];
        std::vector<Double2> next(2 * N);
        for (size_t n = 0; n < 2 * N; ++n) {
          if (s.zoh) {
            const Double2 A = std::exp(dt * w[n]);
            next[n] = A * state[n] + (w[n] == 0.0 ? Double2(dt) : (A - 1.0) / w[n]) * B[n] * u;
          } else {
            next[n] = (1.0 + dt / 2 * w[n]) * state[n] + dt * B[n] * u;
          }
        }
        if (!s.zoh) {
          for (const auto& p : P) {
            const Double2 by = dt / 2 * product(p, state);
            for (size_t n = 0; n < 2 * N; ++n) next[n] -= by * p[n];
          }
          next = solve(next);
        }
        state = next;
        for (int64_t f = 0; f < c.filters; ++f) {
          double y = s.D[size_t(f * c.channels + h)] * u;
          for (size_t n = 0; n < N; ++n) y += 2 * (x.C[size_t((f * c.channels + h) * c.poles) + n] * state[n]).real();
          r.out[size_t((row * c.filters + f) * c.channels + h)] = y;
        }
      }
      for (size_t n = 0; n < N; ++n) r.pool[size_t((slot * c.channels + h) * c.poles) + n] = state[n];
    }
  }
  return r;
}

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float>    ? Dtype::f32
                         : std::is_same_v<T, __half> ? Dtype::f16
                                                     : Dtype::bf16;

struct StepGot {
  std::vector<float> out;
  std::vector<Float2> pool;
};

template <class T>
StepGot run(const Step<T>& s) {
  const S4Case& c = s.c;
  std::vector<int32_t> cu = {0};
  for (const int x : s.lengths) cu.push_back(cu.back() + x);
  std::vector<T> u_values;
  for (const float x : s.u) u_values.push_back(T(x));
  const DeviceArray<int32_t> boundaries(cu), indices(s.indices);
  const DeviceArray<T> u(u_values), out(s.total() * c.filters * c.channels);
  const DeviceArray<float> dt(c.dt), D(s.D);
  const DeviceArray<Float2> w(c.w), P(c.P), B(c.B), C(c.C), pool(s.pool);
  s4_step({.dtype = kDtype<T>,
           .total = s.total(),
           .sequences = int64_t(s.lengths.size()),
           .channels = c.channels,
           .filters = int(c.filters),
           .poles = c.poles,
           .rank = c.rank,
           .zoh = s.zoh,
           .cu_seqlens = boundaries.data(),
           .u = {u.data(), c.channels},
           .w = w.data(),
           .P = P.data(),
           .B = B.data(),
           .C = C.data(),
           .dt = dt.data(),
           .D = D.data(),
           .pool = pool.data(),
           .slots = s.slots,
           .indices = indices.data(),
           .out = out.data()},
          nullptr);
  StepGot got = {{}, pool.values()};
  for (const T x : out.values()) got.out.push_back(float(x));
  return got;
}

template <class T>
void expect_right(const Step<T>& s, double tolerance) {
  const StepGot got = run(s);
  const StepResult want = reference(s);
  const std::string name = s.c.name() + (s.zoh ? "zoh, " : "") + name_of(kDtype<T>);
  expect_near(got.out, want.out, tolerance, name + ": out");
  expect_near(got.pool, want.pool, 2e-6, name + ": pool");
}

TEST_F(S4Cuda, Steps) {
  const std::vector<int> lengths = {1, 0, 5, 2, 40, 1};
  const std::vector<int32_t> indices = {3, 1, -1, 0, 6, 8};
  for (const int rank : {0, 1, 2})
    for (const bool zoh : {false, true}) {
      if (zoh && rank) continue;
      for (const int poles : {1, 2, 3, 6, 32, 64, 100, 256, 1024}) {
        const S4Case c(1 + poles % 3, poles == 3 ? 37 : 3, 1, poles, rank, 0.5f);
        expect_right(Step<float>(c, zoh, lengths, indices), 2e-6);
        expect_right(Step<__half>(c, zoh, lengths, indices), 1e-3);
        expect_right(Step<__nv_bfloat16>(c, zoh, lengths, indices), 8e-3);
      }
    }
}

TEST_F(S4Cuda, StepsOfSlowAndStillPoles) {
  for (const bool zoh : {false, true}) {
    S4Case c(1, 2, 1, 4, 0);
    c.w = {{0, 0}, {-1e-6f, 0}, {-1e-3f, 1e-4f}, {-0.5f, 200}, {0, 30}, {-20, 0}, {-1, 1e-5f}, {-0.5f, 3}};
    expect_right(Step<float>(c, zoh, {30, 7}, {0, 1}), 4e-6);
  }
}

// A sequence of NaNs changes nobody's bits, and a sequence alone has the bits it has in a pack.
TEST_F(S4Cuda, StepsAreIsolated) {
  const S4Case c(2, 5, 1, 12, 2);
  Step<float> packed(c, false, {4, 3, 6}, {2, 0, 1});
  const std::vector<float> u = packed.u;
  for (int64_t i = 4 * 5; i < 7 * 5; ++i) packed.u[size_t(i)] = NAN;
  const StepGot got = run(packed);
  Step<float> alone(c, false, {6}, {1});
  alone.slack = 0;
  alone.u.assign(u.begin() + 7 * 5, u.begin() + 13 * 5);
  std::copy(packed.pool.begin(), packed.pool.begin() + int64_t(alone.pool.size()), alone.pool.begin());
  const StepGot single = run(alone);
  EXPECT_EQ(std::memcmp(got.out.data() + 7 * 10, single.out.data(), 6 * 10 * sizeof(float)), 0);
  EXPECT_EQ(std::memcmp(got.pool.data() + 60, single.pool.data() + 60, 60 * sizeof(Float2)), 0);
  for (size_t i = 13 * 10; i < got.out.size(); ++i) EXPECT_EQ(got.out[i], 0.0f) << "slack";
}

TEST_F(S4Cuda, StepsWithMalformedBoundaries) {
  const S4Case c(1, 5, 1, 12, 1);
  Step<float> s(c, false, {4, 900, -30, 17}, {2, 0, 1, 1});  // beyond the end, and backwards
  s.slack = -870;
  s.u.resize(size_t(s.total() * 5));
  run(s);
}

// The transform of the spectrum is the recurrence's answer to an impulse: C is C tilde where Abar^length vanishes.
TEST_F(S4Cuda, SpectrumAndStepsAgree) {
  for (const int rank : {0, 1, 2}) {
    const int64_t length = 700;
    S4Case c(1, 2, length, 8, rank);
    c.dt = {0.5f, 0.3f};
    const std::vector<Float2> spectrum = run(c).out;
    Step<float> s(c, false, {int(length)}, {0});
    std::fill(s.u.begin(), s.u.end(), 0.0f), std::fill(s.D.begin(), s.D.end(), 0.0f);
    std::fill(s.pool.begin(), s.pool.end(), Float2(0));
    s.u[0] = s.u[1] = 1.0f;
    const StepGot got = run(s);
    std::vector<double> want(size_t(s.total() * 2));
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t l = 0; l < length; ++l) {
        double sum = 0;
        for (int64_t j = 0; j < c.frequencies(); ++j) {
          const double weight = j == 0 || 2 * j == length ? 1 : 2;
          sum += weight * (Double2(spectrum[size_t(h * c.frequencies() + j)]) *
                           std::polar(1.0, 2 * kPi * double(j) * double(l) / double(length)))
                              .real();
        }
        want[size_t(l * 2 + h)] = sum / double(length);
      }
    expect_near(got.out, want, 4e-6, c.name() + "impulse");
  }
}

}  // namespace
}  // namespace packseq::testing
