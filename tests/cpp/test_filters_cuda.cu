// Cauchy and Vandermonde sums on the GPU, against the CPU's in double.
#include "device_array.cuh"
#include "executors.h"
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
  // On whatever memory `place(values)` has them in.
  template <class Place>
  CauchyProblem problem(Dtype real, Place& place) const {
    return {.real = real,
            .conjugate = conjugate,
            .groups = groups,
            .rows = rows,
            .nodes = nodes,
            .poles = poles,
            .v = place(v),
            .z = place(z),
            .w = place(w)};
  }
  std::string name() const {
    return std::string(conjugate ? "pairs, " : "") + std::to_string(groups) + " groups, " + std::to_string(poles) +
           " poles, " + std::to_string(nodes) + " nodes: ";
  }
};

template <class Number>
struct CauchyResult {
  std::vector<Number> out, dv, dz, dw;
};

CauchyResult<Double2> reference(const Cauchy& c) {
  InDouble place;
  const CauchyProblem p = c.problem(Dtype::f64, place);
  const auto like = [](const std::vector<Float2>& x) { return std::vector<Double2>(x.size()); };
  CauchyResult<Double2> r = {like(c.dout), like(c.v), like(c.z), like(c.w)};
  cauchy_forward({.problem = p, .out = r.out.data()}, threaded());
  cauchy_backward({.problem = p,
                   .dout = place(c.dout),
                   .dv = r.dv.data(),
                   .dz = r.dz.data(),
                   .dw = r.dw.data(),
                   .workspace = nullptr},
                  threaded());
  return r;
}

CauchyResult<Float2> run(const Cauchy& c) {
  DeviceCopies place;
  const CauchyProblem p = c.problem(Dtype::f32, place);
  const DeviceArray<Float2> out(int64_t(c.dout.size())), dv(int64_t(c.v.size())), dz(c.nodes), dw(int64_t(c.w.size()));
  const DeviceArray<char> workspace(int64_t(cauchy_backward_workspace(p, true)));
  cauchy_forward({.problem = p, .out = out.data()}, nullptr);
  cauchy_backward({.problem = p,
                   .dout = place(c.dout),
                   .dv = dv.data(),
                   .dz = dz.data(),
                   .dw = dw.data(),
                   .workspace = workspace.data()},
                  nullptr);
  workspace.values();
  return {out.values(), dv.values(), dz.values(), dw.values()};
}

void expect_right(const Cauchy& c, double tolerance) {
  const CauchyResult<Float2> got = run(c);
  const CauchyResult<Double2> want = reference(c);
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

// Numerators for which v |w|^3 would leave the range of a float.
TEST_F(FiltersCuda, CauchyNumeratorsFarOut) {
  for (const auto& [numerators, scale] : {std::pair(1e26f, 1e4f), std::pair(1e-26f, 1e-4f)}) {
    Cauchy c(true, 2, 2, 50, 12, true);
    for (Float2& x : c.z) x *= scale;
    for (Float2& x : c.w) x *= scale;
    for (Float2& x : c.v) x *= numerators;
    expect_near(run(c).out, reference(c).out, 4e-6, c.name() + "out");
  }
}

TEST_F(FiltersCuda, CauchyRepeats) {
  const Cauchy c(true, 2, 33, 3000, 40, true);
  const CauchyResult<Float2> a = run(c), b = run(c);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.dv, b.dv);
  EXPECT_EQ(a.dz, b.dz);
  EXPECT_EQ(a.dw, b.dw);
}

// A NaN in one row stays there.
TEST_F(FiltersCuda, CauchyRowsAreIsolated) {
  Cauchy c(true, 2, 3, 40, 8, true);
  const CauchyResult<Float2> clean = run(c);
  c.w[8] = {NAN, 0.0f}, c.v[9] = {0.0f, INFINITY};
  const CauchyResult<Float2> got = run(c);
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
  template <class Place>
  VandermondeProblem problem(Dtype real, Place& place) const {
    return {.real = real,
            .conjugate = conjugate,
            .groups = groups,
            .rows = rows,
            .length = length,
            .poles = poles,
            .x = place(x)};
  }
  std::string name() const {
    return std::string(conjugate ? "pairs, " : "") + std::to_string(groups) + " groups, " + std::to_string(poles) +
           " poles, length " + std::to_string(length) + ": ";
  }
};

// u as the operators read and write it; and back.
std::vector<float> flat(const Vandermonde& c) {
  std::vector<float> all;
  for (const Float2 y : c.u) {
    all.push_back(y.real());
    if (!c.conjugate) all.push_back(y.imag());
  }
  return all;
}

template <class Real>
std::vector<std::complex<Real>> unflat(const Vandermonde& c, const std::vector<Real>& all) {
  std::vector<std::complex<Real>> y;
  for (size_t i = 0; i < c.u.size(); ++i) {
    c.conjugate ? y.emplace_back(all[i]) : y.emplace_back(all[2 * i], all[2 * i + 1]);
  }
  return y;
}

int64_t floats_of(const Vandermonde& c) { return int64_t(c.u.size()) * (c.conjugate ? 1 : 2); }

std::vector<Float2> forward(const Vandermonde& c) {
  DeviceCopies place;
  const DeviceArray<float> out(floats_of(c));
  vandermonde_forward({.problem = c.problem(Dtype::f32, place), .v = place(c.v), .out = out.data()}, nullptr);
  return unflat(c, out.values());
}

// u is the gradient of the sums' output too, and v that of the transpose's.
struct VandermondeReference {
  std::vector<Double2> out, dv, dx, transpose, du, dx_of_transpose;

  explicit VandermondeReference(const Vandermonde& c)
      : dv(c.v.size()), dx(c.x.size()), transpose(c.v.size()), dx_of_transpose(c.x.size()) {
    InDouble place;
    const VandermondeProblem p = c.problem(Dtype::f64, place);
    const void *const u = place(flat(c)), *const v = place(c.v);
    std::vector<double> of_out(size_t(floats_of(c))), of_u(of_out.size());
    vandermonde_forward({.problem = p, .v = v, .out = of_out.data()}, threaded());
    vandermonde_backward({p, v, u, dv.data(), dx.data(), nullptr}, threaded());
    vandermonde_transpose({.problem = p, .u = u, .out = transpose.data(), .workspace = nullptr}, threaded());
    vandermonde_transpose_backward({p, u, v, of_u.data(), dx_of_transpose.data(), nullptr}, threaded());
    out = unflat(c, of_out), du = unflat(c, of_u);
  }
};

void expect_right(const Vandermonde& c, double tolerance) {
  const VandermondeReference want(c);
  expect_near(forward(c), want.out, tolerance, c.name() + "out");

  DeviceCopies place;
  const VandermondeProblem p = c.problem(Dtype::f32, place);
  const void *const u = place(flat(c)), *const v = place(c.v);
  const DeviceArray<Float2> dv(int64_t(c.v.size())), dx(int64_t(c.x.size()));
  const DeviceArray<float> du(floats_of(c));
  const DeviceArray<char> workspace(int64_t(vandermonde_backward_workspace(p)));
  vandermonde_backward({p, v, u, dv.data(), dx.data(), workspace.data()}, nullptr);
  expect_near(dv.values(), want.dv, tolerance, c.name() + "dv");
  expect_near(dx.values(), want.dx, tolerance, c.name() + "dx");

  vandermonde_transpose({.problem = p, .u = u, .out = dv.data(), .workspace = workspace.data()}, nullptr);
  vandermonde_transpose_backward({p, u, v, du.data(), dx.data(), workspace.data()}, nullptr);
  expect_near(dv.values(), want.transpose, tolerance, c.name() + "transpose");
  expect_near(unflat(c, du.values()), want.du, tolerance, c.name() + "transpose, du");
  expect_near(dx.values(), want.dx_of_transpose, tolerance, c.name() + "transpose, dx");
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
