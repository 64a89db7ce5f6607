// S4's spectrum and its recurrence on the GPU, against the CPU's in double.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <limits>

#include "device_array.cuh"
#include "executors.h"
#include "filters_draws.h"
#include "longconv/filters.h"
#include "longconv/s4_step.h"
#include "matrix.h"

namespace packseq::testing {
namespace {

constexpr double kPi = 3.14159265358979323846;

// ---- Spectrum ------------------------------------------------------------------------------------------------------

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
  // On whatever memory `place(values)` has them in.
  template <class Place>
  S4Problem problem(Dtype real, Place& place) const {
    return {.real = real,
            .filters = filters,
            .channels = channels,
            .length = length,
            .poles = poles,
            .rank = rank,
            .w = place(w),
            .P = place(P),
            .B = place(B),
            .C = place(C),
            .dt = place(dt)};
  }
};

template <class Real>
struct S4Result {
  std::vector<std::complex<Real>> out, dw, dP, dB, dC;
  std::vector<Real> ddt;
};

S4Result<double> reference(const S4Case& c) {
  InDouble place;
  const S4Problem p = c.problem(Dtype::f64, place);
  const auto like = [](const std::vector<Float2>& x) { return std::vector<Double2>(x.size()); };
  S4Result<double> r = {like(c.dout), like(c.w), like(c.P), like(c.B), like(c.C), std::vector<double>(c.dt.size())};
  s4_spectrum({.problem = p, .out = r.out.data()}, threaded());
  s4_spectrum_backward({.problem = p,
                        .dout = place(c.dout),
                        .dw = r.dw.data(),
                        .dP = r.dP.data(),
                        .dB = r.dB.data(),
                        .dC = r.dC.data(),
                        .ddt = r.ddt.data(),
                        .workspace = nullptr},
                       threaded());
  return r;
}

S4Result<float> run(const S4Case& c) {
  DeviceCopies place;
  const S4Problem p = c.problem(Dtype::f32, place);
  const auto like = [](const std::vector<Float2>& x) { return int64_t(x.size()); };
  const DeviceArray<Float2> out(like(c.dout)), dw(like(c.w)), dP(like(c.P)), dB(like(c.B)), dC(like(c.C));
  const DeviceArray<float> ddt(c.channels);
  const DeviceArray<char> workspace(int64_t(s4_spectrum_backward_workspace(p)));
  s4_spectrum({.problem = p, .out = out.data()}, nullptr);
  s4_spectrum_backward({.problem = p,
                        .dout = place(c.dout),
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

void expect_right(const S4Case& c) {
  // Poles that turn often before they decay magnify the rounding of dt w, and of y: by |W| / Re W.
  constexpr double kGradientTolerance = 8e-6;
  const S4Result<float> got = run(c);
  const S4Result<double> want = reference(c);
  expect_near(got.out, want.out, 2e-6, c.name() + "out");
  expect_near(got.dw, want.dw, kGradientTolerance, c.name() + "dw");
  expect_near(got.dP, want.dP, kGradientTolerance, c.name() + "dP");
  expect_near(got.dB, want.dB, kGradientTolerance, c.name() + "dB");
  expect_near(got.dC, want.dC, kGradientTolerance, c.name() + "dC");
  double of_dt = 0;  // the terms of ddt, of which at low frequencies nothing is left
  for (size_t i = 0; i < c.w.size(); ++i) of_dt += std::abs(want.dw[i] * Double2(c.w[i])) / c.dt[i / size_t(c.poles)];
  expect_near(got.ddt, want.ddt, kGradientTolerance, c.name() + "ddt", of_dt);
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
    const S4Result<float> none = run({1, 0, 10, 4, rank});
    EXPECT_TRUE(none.out.empty());
    const S4Result<float> got = run({0, 2, 10, 4, rank});
    for (const Float2 x : got.dw) EXPECT_EQ(x, Float2(0));
    for (const float x : got.ddt) EXPECT_EQ(x, 0.0f);
  }
}

// Poles as HiPPO's, time steps from 1e-4 to 1e-1, a long filter: every frequency, the last one too.
TEST_F(S4Cuda, LongSpectrum) {
  S4Case c(1, 3, 16384, 32, 1);
  for (size_t i = 0; i < c.w.size(); ++i) c.w[i] = {-0.5f, float(kPi) * float(i % 32)};
  c.dt = {1e-4f, 1e-3f, 0.1f};
  // The fastest pole turns 200 times as fast as it decays: that many times the rounding of dt w.
  expect_near(run(c).out, reference(c).out, 2e-5, "long spectrum");
}

TEST_F(S4Cuda, SpectrumRepeats) {
  const S4Case c(2, 5, 3000, 40, 1);
  const S4Result<float> a = run(c), b = run(c);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.dw, b.dw);
  EXPECT_EQ(a.dP, b.dP);
  EXPECT_EQ(a.dB, b.dB);
  EXPECT_EQ(a.dC, b.dC);
  EXPECT_EQ(a.ddt, b.ddt);
}

// ---- Steps ---------------------------------------------------------------------------------------------------------

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float>    ? Dtype::f32
                         : std::is_same_v<T, __half> ? Dtype::f16
                                                     : Dtype::bf16;

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
  size_t outputs() const { return size_t(total() * c.filters * c.channels); }

  // Of u in `dtype`; on whatever memory `place(values)` has the rest in.
  template <class Place>
  S4Step call(Dtype dtype, const void* u_data, void* pool_data, void* out, Place& place) const {
    return {.dtype = dtype,
            .total = total(),
            .sequences = int64_t(lengths.size()),
            .channels = c.channels,
            .filters = int(c.filters),
            .poles = c.poles,
            .rank = c.rank,
            .zoh = zoh,
            .cu_seqlens = place(boundaries(lengths)),
            .u = {u_data, c.channels},
            .w = place(c.w),
            .P = place(c.P),
            .B = place(c.B),
            .C = place(c.C),
            .dt = place(c.dt),
            .D = place(D),
            .pool = pool_data,
            .slots = slots,
            .indices = place(indices),
            .out = out};
  }
};

template <class Real>
struct StepResult {
  std::vector<Real> out;
  std::vector<std::complex<Real>> pool;
};

template <class T>
StepResult<double> reference(const Step<T>& s) {
  InDouble place;
  StepResult<double> r = {std::vector<double>(s.outputs()), {s.pool.begin(), s.pool.end()}};
  s4_step(s.call(Dtype::f64, place(s.u), r.pool.data(), r.out.data(), place), threaded());
  return r;
}

template <class T>
StepResult<float> run(const Step<T>& s) {
  DeviceCopies place;
  std::vector<T> u;
  for (const float x : s.u) u.push_back(T(x));
  const DeviceArray<Float2> pool(s.pool);
  const DeviceArray<T> out(int64_t(s.outputs()));
  s4_step(s.call(kDtype<T>, place(u), pool.data(), out.data(), place), nullptr);
  StepResult<float> got = {{}, pool.values()};
  for (const T x : out.values()) got.out.push_back(float(x));
  return got;
}

template <class T>
void expect_right(const Step<T>& s, double tolerance) {
  const StepResult<float> got = run(s);
  const StepResult<double> want = reference(s);
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

// Slots that are not there, beside the pool and far from it: rows of zeros, and every other state as it was.
TEST_F(S4Cuda, StepsWithoutASlot) {
  const std::vector<int32_t> indices = {-1, 7, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min(),
                                        2};
  for (const int poles : {12, 100, 256}) {
    const Step<float> s(S4Case(2, 5, 1, poles, 1), false, {3, 2, 1, 4, 5}, indices);
    ASSERT_EQ(s.slots, 7);
    expect_right(s, 2e-6);
    const StepResult<float> got = run(s);
    for (size_t i = 0; i < 10 * 2 * 5; ++i) ASSERT_EQ(got.out[i], 0) << "of a sequence without a state";
    for (size_t i = 0; i < s.pool.size(); ++i) {
      if (i / size_t(5 * poles) != 2) ASSERT_EQ(got.pool[i], s.pool[i]) << "a state of nobody";
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
  const StepResult<float> got = run(packed);
  Step<float> alone(c, false, {6}, {1});
  alone.slack = 0;
  alone.u.assign(u.begin() + 7 * 5, u.begin() + 13 * 5);
  std::copy(packed.pool.begin(), packed.pool.begin() + int64_t(alone.pool.size()), alone.pool.begin());
  const StepResult<float> single = run(alone);
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
    const StepResult<float> got = run(s);
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
