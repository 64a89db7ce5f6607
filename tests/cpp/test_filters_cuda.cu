// Cauchy and Vandermonde sums on the GPU, against their definitions in double.
#include "device_array.cuh"
#include "filters_draws.h"
#include "longconv/filters.h"

namespace packseq::testing {
namespace {

class FiltersCuda : public GpuTest {};

constexpr int kPoles[] = {1, 2, 3, 6, 32, 64, 100, 256, 1024};
constexpr int64_t kLengths[] = {1, 3, 17, 489, 1024, 1047};

// ---- Cauchy --------------------------------------------------------------------------------------------------------

struct Cauchy {
  bool conjugate;
  int64_t groups, rows, nodes;
  int poles;
  std::vector<Float2> v, z, w, dout;

  Cauchy(bool conjugate, int64_t groups, int64_t rows, int64_t nodes, int poles, bool imaginary)
      : conjugate(conjugate),
        groups(groups),
        rows(rows),
        nodes(nodes),
        poles(poles),
        v(random_complex(groups * rows * poles, 1)),
        z(random_complex(nodes, 2)),
        w(random_poles(rows * poles, 3)),
        dout(random_complex(groups * rows * nodes, 4)) {
    for (Float2& x : z) x = {imaginary ? 0.0f : 0.1f + std::abs(x.real()), 5.0f * x.imag()};
  }
  std::string name() const {
    return std::string(conjugate ? "pairs, " : "") + std::to_string(groups) + " groups, " + std::to_string(poles) +
           " poles, " + std::to_string(nodes) + " nodes: ";
  }
};

struct CauchyResult {
  std::vector<Double2> out, dv, dz, dw;
};

CauchyResult reference(const Cauchy& c) {
  CauchyResult r;
  r.out.resize(c.dout.size()), r.dv.resize(c.v.size()), r.dz.resize(c.z.size()), r.dw.resize(c.w.size());
  for (int64_t g = 0; g < c.groups; ++g)
    for (int64_t h = 0; h < c.rows; ++h)
      for (int n = 0; n < c.poles; ++n) {
        const size_t at_v = size_t((g * c.rows + h) * c.poles + n), at_w = size_t(h * c.poles + n);
        const Double2 v = c.v[at_v], w = c.w[at_w];
        for (int64_t l = 0; l < c.nodes; ++l) {
          const size_t at = size_t((g * c.rows + h) * c.nodes + l);
          const Double2 z = c.z[size_t(l)], y = c.dout[at];
          const Double2 e = 1.0 / (z - w), f = c.conjugate ? 1.0 / (z - std::conj(w)) : 0.0;
          r.out[at] += v * e + std::conj(v) * f;
          r.dv[at_v] += y * std::conj(e) + std::conj(y) * f;
          r.dw[at_w] += y * std::conj(v * e * e) + std::conj(y) * std::conj(v) * f * f;
          r.dz[size_t(l)] -= y * std::conj(v * e * e + std::conj(v) * f * f);
        }
      }
  return r;
}

struct CauchyGot {
  std::vector<Float2> out, dv, dz, dw;
};

CauchyGot run(const Cauchy& c) {
  const DeviceArray<Float2> v(c.v), z(c.z), w(c.w), dout(c.dout);
  const DeviceArray<Float2> out(int64_t(c.dout.size())), dv(int64_t(c.v.size())), dz(c.nodes), dw(int64_t(c.w.size()));
  const CauchyProblem p = {.real = Dtype::f32,
                           .conjugate = c.conjugate,
                           .groups = c.groups,
                           .rows = c.rows,
                           .nodes = c.nodes,
                           .poles = c.poles,
                           .v = v.data(),
                           .z = z.data(),
                           .w = w.data()};
  const DeviceArray<char> workspace(int64_t(cauchy_backward_workspace(p, true)));
  cauchy_forward({.problem = p, .out = out.data()}, nullptr);
  cauchy_backward({.problem = p,
                   .dout = dout.data(),
                   .dv = dv.data(),
                   .dz = dz.data(),
                   .dw = dw.data(),
                   .workspace = workspace.data()},
                  nullptr);
  workspace.values();
  return {out.values(), dv.values(), dz.values(), dw.values()};
}

void expect_right(const Cauchy& c, double tolerance) {
  const CauchyGot got = run(c);
  const CauchyResult want = reference(c);
  expect_near(got.out, want.out, tolerance, c.name() + "out");
  expect_near(got.dv, want.dv, tolerance, c.name() + "dv");
  expect_near(got.dz, want.dz, tolerance, c.name() + "dz");
  expect_near(got.dw, want.dw, tolerance, c.name() + "dw");
}

TEST_F(FiltersCuda, CauchySizes) {
  for (const bool conjugate : {false, true})
    for (const bool imaginary : {false, true})
      for (const int poles : kPoles)
        for (const int64_t nodes : kLengths) expect_right({conjugate, 1, 2, nodes, poles, imaginary}, 2e-6);
}

TEST_F(FiltersCuda, CauchyGroups) {
  for (const bool conjugate : {false, true})
    for (const bool imaginary : {false, true})
      for (const int64_t groups : {2, 3, 4, 5, 9}) expect_right({conjugate, groups, 19, 600, 37, imaginary}, 2e-6);
}

TEST_F(FiltersCuda, CauchyOfNothing) {
  for (const bool conjugate : {false, true}) {
    expect_right({conjugate, 1, 2, 0, 5, true}, 0);
    expect_right({conjugate, 1, 0, 7, 5, true}, 0);
    expect_right({conjugate, 0, 3, 7, 5, true}, 0);
  }
}

// Nodes and poles far out, and near the axis: |D|^2 would leave the range of a float.
TEST_F(FiltersCuda, CauchyFarOut) {
  for (const float scale : {1e-14f, 1e-7f, 1e7f, 1e12f})
    for (const bool imaginary : {false, true}) {
      Cauchy c(true, 2, 2, 50, 12, imaginary);
      for (Float2& x : c.z) x *= scale;
      for (Float2& x : c.w) x *= scale;
      for (Float2& x : c.v) x *= scale;
      expect_right(c, 4e-6);
    }
  Cauchy c(true, 1, 1, 9, 4, true);
  c.z[3] = {0.0f, 4e7f}, c.z[4] = {0.0f, 0.0f}, c.w[2] = {-1e-5f, 3.0f};
  expect_right(c, 2e-6);
}

TEST_F(FiltersCuda, CauchyRepeats) {
  const Cauchy c(true, 2, 33, 3000, 40, true);
  const CauchyGot a = run(c), b = run(c);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.dv, b.dv);
  EXPECT_EQ(a.dz, b.dz);
  EXPECT_EQ(a.dw, b.dw);
}

// A NaN in one row stays there.
TEST_F(FiltersCuda, CauchyRowsAreIsolated) {
  Cauchy c(true, 2, 3, 40, 8, true);
  const CauchyGot clean = run(c);
  c.w[8] = {NAN, 0.0f}, c.v[9] = {0.0f, INFINITY};
  const CauchyGot got = run(c);
  for (int64_t g = 0; g < 2; ++g)
    for (const int64_t h : {0, 2}) {
      for (int64_t l = 0; l < 40; ++l) {
        const size_t at = size_t((g * 3 + h) * 40 + l);
        EXPECT_EQ(got.out[at], clean.out[at]);
      }
      for (int64_t n = 0; n < 8; ++n) {
        EXPECT_EQ(got.dv[size_t((g * 3 + h) * 8 + n)], clean.dv[size_t((g * 3 + h) * 8 + n)]);
        EXPECT_EQ(got.dw[size_t(h * 8 + n)], clean.dw[size_t(h * 8 + n)]);
      }
    }
}

// ---- Vandermonde ---------------------------------------------------------------------------------------------------

struct Vandermonde {
  bool conjugate;
  int64_t groups, rows, length;
  int poles;
  std::vector<Float2> v, x, u;  // u: of length, the imaginary part unused where conjugate; v: of poles

  Vandermonde(bool conjugate, int64_t groups, int64_t rows, int64_t length, int poles)
      : conjugate(conjugate),
        groups(groups),
        rows(rows),
        length(length),
        poles(poles),
        v(random_complex(groups * rows * poles, 5)),
        x(random_poles(rows * poles, 6, 3.0f / float(length + 2))),
        u(random_complex(groups * rows * length, 7)) {
    for (size_t n = 0; n < x.size(); n += 3)
      x[n] = {x[n].real() / 50, std::fmod(100.0f * float(length) * x[n].imag(), 3.1f)};
  }
  VandermondeProblem problem(const DeviceArray<Float2>& on_gpu) const {
    return {.real = Dtype::f32,
            .conjugate = conjugate,
            .groups = groups,
            .rows = rows,
            .length = length,
            .poles = poles,
            .x = on_gpu.data()};
  }
  std::string name() const {
    return std::string(conjugate ? "pairs, " : "") + std::to_string(groups) + " groups, " + std::to_string(poles) +
           " poles, length " + std::to_string(length) + ": ";
  }
  // f(g h, n of v, n of x, l, exp(x l)) for everything.
  template <class F>
  void for_each(const F& f) const {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t h = 0; h < rows; ++h)
        for (int n = 0; n < poles; ++n)
          for (int64_t l = 0; l < length; ++l) {
            const size_t row = size_t(g * rows + h), at_x = size_t(h * poles + n);
            f(row * size_t(length) + size_t(l), row * size_t(poles) + size_t(n), at_x, double(l),
              std::exp(Double2(x[at_x]) * double(l)));
          }
  }
};

// u as the operators read and write it.
DeviceArray<float> flat(const Vandermonde& c) {
  std::vector<float> all;
  for (const Float2 y : c.u) {
    all.push_back(y.real());
    if (!c.conjugate) all.push_back(y.imag());
  }
  return DeviceArray<float>(all);
}

std::vector<Float2> unflat(const Vandermonde& c, const DeviceArray<float>& x) {
  const std::vector<float> all = x.values();
  std::vector<Float2> y;
  for (size_t i = 0; i < c.u.size(); ++i) {
    y.push_back(c.conjugate ? Float2(all[i], 0.0f) : Float2(all[2 * i], all[2 * i + 1]));
  }
  return y;
}

int64_t floats_of(const Vandermonde& c) { return int64_t(c.u.size()) * (c.conjugate ? 1 : 2); }

std::vector<Float2> forward(const Vandermonde& c) {
  const DeviceArray<Float2> x(c.x), v(c.v);
  const DeviceArray<float> out(floats_of(c));
  vandermonde_forward({.problem = c.problem(x), .v = v.data(), .out = out.data()}, nullptr);
  return unflat(c, out);
}

std::vector<Double2> forward_reference(const Vandermonde& c) {
  std::vector<Double2> out(c.u.size());
  c.for_each([&](size_t at_u, size_t at_v, size_t, double, Double2 e) {
    const Double2 y = Double2(c.v[at_v]) * e;
    out[at_u] += c.conjugate ? 2.0 * y.real() : y;
  });
  return out;
}

void expect_right(const Vandermonde& c, double tolerance) {
  expect_near(forward(c), forward_reference(c), tolerance, c.name() + "out");

  const DeviceArray<Float2> x(c.x), v(c.v), dv(int64_t(c.v.size())), dx(int64_t(c.x.size()));
  const DeviceArray<float> u = flat(c), du(floats_of(c));
  const VandermondeProblem p = c.problem(x);
  const DeviceArray<char> workspace(int64_t(vandermonde_backward_workspace(p)));
  std::vector<Double2> want_v(c.v.size()), want_x(c.x.size()), want_u(c.u.size());
  const auto u_at = [&](size_t i) { return c.conjugate ? Double2(c.u[i].real()) : Double2(c.u[i]); };

  vandermonde_backward(
      {.problem = p, .v = v.data(), .dout = u.data(), .dv = dv.data(), .dx = dx.data(), .workspace = workspace.data()},
      nullptr);
  c.for_each([&](size_t at_u, size_t at_v, size_t at_x, double l, Double2 e) {
    const Double2 y = (c.conjugate ? 2.0 : 1.0) * u_at(at_u) * std::conj(e);
    want_v[at_v] += y;
    want_x[at_x] += y * l * std::conj(Double2(c.v[at_v]));
  });
  expect_near(dv.values(), want_v, tolerance, c.name() + "dv");
  expect_near(dx.values(), want_x, tolerance, c.name() + "dx");

  vandermonde_transpose({.problem = p, .u = u.data(), .out = dv.data(), .workspace = workspace.data()}, nullptr);
  vandermonde_transpose_backward(
      {.problem = p, .u = u.data(), .dout = v.data(), .du = du.data(), .dx = dx.data(), .workspace = workspace.data()},
      nullptr);
  want_v.assign(want_v.size(), 0), want_x.assign(want_x.size(), 0);
  c.for_each([&](size_t at_u, size_t at_v, size_t at_x, double l, Double2 e) {
    const Double2 y = c.v[at_v], back = y * std::conj(e);
    want_v[at_v] += u_at(at_u) * e;
    want_u[at_u] += c.conjugate ? back.real() : back;
    want_x[at_x] += back * l * std::conj(u_at(at_u));
  });
  expect_near(dv.values(), want_v, tolerance, c.name() + "transpose");
  expect_near(unflat(c, du), want_u, tolerance, c.name() + "transpose, du");
  expect_near(dx.values(), want_x, tolerance, c.name() + "transpose, dx");
  workspace.values();
}

TEST_F(FiltersCuda, VandermondeSizes) {
  for (const bool conjugate : {false, true})
    for (const int poles : kPoles)
      for (const int64_t length : kLengths) expect_right({conjugate, 1, 2, length, poles}, 2e-6);
}

TEST_F(FiltersCuda, VandermondeGroups) {
  for (const bool conjugate : {false, true})
    for (const int64_t groups : {0, 2, 3, 5}) expect_right({conjugate, groups, 3, 300, 37}, 2e-6);
}

TEST_F(FiltersCuda, VandermondeOfNothing) {
  for (const bool conjugate : {false, true}) {
    expect_right({conjugate, 2, 3, 0, 4}, 0);
    expect_right({conjugate, 2, 0, 5, 4}, 0);
  }
}

TEST_F(FiltersCuda, VandermondeLong) {
  for (const bool conjugate : {false, true}) {
    for (const int64_t length : {8192, 8320, 16384}) expect_right({conjugate, 1, 1, length, 32}, 1e-6);
  }
}

// Phases of many thousand turns, decay to nothing, no decay; and growth, which is infinite only where it must be.
TEST_F(FiltersCuda, VandermondeOfAMillion) {
  Vandermonde c(true, 1, 1, 1 << 20, 4);
  c.x = {{0.0f, 3.1f}, {-1e-6f, 1e-3f}, {-2.0f, 1.0f}, {-1e-5f, -2.7f}};
  expect_right(c, 1e-6);
  for (const bool conjugate : {false, true}) {
    Vandermonde grows(conjugate, 1, 1, 20000, 1);
    for (const float v : {1.0f, 1e-30f}) {
      for (const float re : {0.005f, 0.01f, 2.0f}) {
        grows.x = {{re, 0.0f}}, grows.v = {{v, 0.0f}};
        const std::vector<Float2> got = forward(grows);
        for (int64_t l = 0; l < grows.length; ++l) {
          const double exponent = double(re) * double(l) + std::log(v * (conjugate ? 2.0 : 1.0));
          const float y = got[size_t(l)].real();
          if (exponent > 88.8) {
            ASSERT_TRUE(std::isinf(y)) << "at " << l << ": " << y;
          } else if (exponent < 88.6) {
            ASSERT_NEAR(std::log(double(y)), exponent, 1e-5 * std::max(1.0, std::abs(exponent))) << "at " << l;
          }
          ASSERT_FALSE(std::isnan(got[size_t(l)].imag())) << "at " << l;
        }
      }
    }
  }
}

}  // namespace
}  // namespace packseq::testing
