// The pieces that CPU kernels are made of, compiled for the compiler's default instruction set.
#define PACKSEQ_ISA test
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "core/cpu/convert.h"
#include "core/cpu/gemm.h"
#include "core/cpu/isa.h"
#include "core/cpu/math.h"
#include "core/cpu/prefetch.h"
#include "core/cpu/scratch.h"
#include "core/cpu/transpose.h"
#include "core/cpu/work_list.h"
#include "guarded.h"

namespace packseq::testing {
namespace {

namespace cpu = packseq::test;

template <class Real>
Real one(cpu::Vec<Real> (*f)(cpu::Vec<Real>), Real x) {
  return f(cpu::splat(x))[cpu::kLanes<Real> - 1];
}

// Error in units of the last place of the right result.
template <class Real>
double ulps(Real got, long double want) {
  const Real rounded = Real(want);
  const Real next = std::nextafter(rounded, std::numeric_limits<Real>::infinity());
  return double(std::fabs((long double)(got)-want) / (long double)(next - rounded));
}

template <class Real>
void check_exp2(Real low, double limit) {
  for (int i = 0; i <= 200000; ++i) {
    const Real x = low + (Real(1) - low) * Real(i) / 200000;
    ASSERT_LE(ulps(one(cpu::exp2_down<Real>, x), std::exp2((long double)(x))), limit) << x;
  }
  const Real infinity = std::numeric_limits<Real>::infinity();
  EXPECT_EQ(one(cpu::exp2_down<Real>, Real(0)), 1);
  EXPECT_EQ(one(cpu::exp2_down<Real>, -infinity), 0);
  EXPECT_EQ(one(cpu::exp2_down<Real>, Real(-2000)), 0);
  EXPECT_EQ(one(cpu::exp2<Real>, infinity), infinity);
  EXPECT_EQ(one(cpu::exp2<Real>, Real(2000)), infinity);
  EXPECT_EQ(one(cpu::exp2<Real>, Real(10)), 1024);
  EXPECT_TRUE(std::isnan(one(cpu::exp2<Real>, std::numeric_limits<Real>::quiet_NaN())));
  EXPECT_TRUE(std::isnan(one(cpu::exp2_down<Real>, std::numeric_limits<Real>::quiet_NaN())));
}

TEST(CpuMath, Exp2) {
  check_exp2<float>(-126, 1.2);
  check_exp2<double>(-1022, 1.2);
}

template <class Real>
void check_exp2_of_product(int most) {
  const auto of = [](Real a, Real b, bool bounded) {
    return cpu::exp2_of_product<Real>(cpu::splat(a), cpu::splat(b), bounded)[cpu::kLanes<Real> - 1];
  };
  std::mt19937 random(3);
  std::uniform_real_distribution<Real> size(Real(-8), Real(8)), product(Real(-most), Real(most));
  for (int i = 0; i < 200000; ++i) {
    const Real a = std::exp2(size(random)), x = product(random), b = x / a;
    ASSERT_LE(ulps(of(a, b, true), std::exp2((long double)(a)*b)), 1.2 + std::fabs(x)) << a << " * " << b;
    ASSERT_EQ(of(a, b, true), of(a, b, false)) << a << " * " << b;
  }
  const Real infinity = std::numeric_limits<Real>::infinity(), nan = std::numeric_limits<Real>::quiet_NaN();
  for (const Real large : {Real(3 * most), Real(1e30), infinity}) {
    EXPECT_EQ(of(2, large, false), infinity);
    EXPECT_EQ(of(-2, large, false), 0);
  }
  EXPECT_EQ(of(0, 5, false), 1);
  for (const auto& [a, b] : {std::pair{nan, Real(1)}, {Real(1), nan}, {Real(0), infinity}}) {
    EXPECT_TRUE(std::isnan(of(a, b, false))) << a << " * " << b;
  }
}

TEST(CpuMath, Exp2OfProduct) {
  check_exp2_of_product<float>(126);
  check_exp2_of_product<double>(1022);
}

template <class Real>
void check_tanh(double limit) {
  for (int i = -100000; i <= 100000; ++i) {
    for (const Real x : {Real(i) / 4000, Real(i) * Real(1e-9), std::ldexp(Real(i), -40)}) {
      if (x == 0) continue;
      ASSERT_LE(ulps(one(cpu::tanh<Real>, x), std::tanh((long double)(x))), limit) << x;
    }
  }
  EXPECT_EQ(one(cpu::tanh<Real>, Real(0)), 0);
  EXPECT_EQ(one(cpu::tanh<Real>, std::numeric_limits<Real>::infinity()), 1);
  EXPECT_EQ(one(cpu::tanh<Real>, Real(-1e30)), -1);
  EXPECT_TRUE(std::isnan(one(cpu::tanh<Real>, std::numeric_limits<Real>::quiet_NaN())));
}

TEST(CpuMath, Tanh) {
  check_tanh<float>(4);
  check_tanh<double>(4);
}

// Every function over its whole range; results that would be denormal are 0.
template <class Real>
void check_functions() {
  using Wide = long double;
  const Real infinity = std::numeric_limits<Real>::infinity(), nan = std::numeric_limits<Real>::quiet_NaN();
  const Real lowest = sizeof(Real) == 4 ? Real(-87) : Real(-708);
  for (int i = 1; i <= 100000; ++i) {
    const Real down = lowest * Real(i) / 100000, small = std::ldexp(Real(i) / 100000, -(i % 60)),
               x = Real(i - 50000) / 700;
    ASSERT_LE(ulps(one(cpu::exp_down<Real>, down), std::exp(Wide(down))), 1.6) << down;
    ASSERT_LE(ulps(one(cpu::log1p<Real>, small), std::log1p(Wide(small))), 2.5) << small;
    const Wide e = std::exp(-Wide(x));
    ASSERT_LE(ulps(one(cpu::sigmoid<Real>, x), 1 / (1 + e)), 3) << x;
    const cpu::Softplus<Real> softplus(cpu::splat(x));
    ASSERT_LE(ulps(softplus.value[0], x > 20 ? Wide(x) : std::log1p(std::exp(Wide(x)))), 4) << x;
    ASSERT_LE(ulps(softplus.slope[0], x > 20 ? Wide(1) : 1 / (1 + e)), 3) << x;
  }
  EXPECT_EQ(one(cpu::exp_down<Real>, -infinity), 0);
  EXPECT_EQ(one(cpu::exp_down<Real>, Real(0)), 1);
  EXPECT_TRUE(std::isnan(one(cpu::exp_down<Real>, nan)));
  EXPECT_EQ(one(cpu::sigmoid<Real>, infinity), 1);
  EXPECT_EQ(one(cpu::sigmoid<Real>, -infinity), 0);
  EXPECT_EQ(cpu::Softplus<Real>(cpu::splat(infinity)).value[0], infinity);
  EXPECT_EQ(cpu::Softplus<Real>(cpu::splat(-infinity)).value[0], 0);
  EXPECT_TRUE(std::isnan(cpu::Softplus<Real>(cpu::splat(nan)).value[0]));
}

TEST(CpuMath, Functions) {
  check_functions<float>();
  check_functions<double>();
}

// By the error itself, near 1; angles of every size, those with a lane beyond the fast path too.
template <class Real>
void check_circle(double limit) {
  for (int i = -100000; i <= 100000; ++i) {
    for (const Real x : {Real(i) / 3000, Real(i) / 7, Real(i) * Real(1e4), Real(i) * Real(1e-9)}) {
      cpu::Vec<Real> angles = cpu::splat(x);
      if (i % 3 == 0) angles[0] = Real(1e30);
      const cpu::Circle<Real> circle(angles);
      const int lane = cpu::kLanes<Real> - 1;
      const double unit = std::numeric_limits<Real>::epsilon();
      ASSERT_LE(std::fabs(double(circle.sin[lane] - std::sin((long double)(x)))), limit * unit) << x;
      ASSERT_LE(std::fabs(double(circle.cos[lane] - std::cos((long double)(x)))), limit * unit) << x;
    }
  }
  const Real infinity = std::numeric_limits<Real>::infinity();
  EXPECT_TRUE(std::isnan(cpu::Circle<Real>(cpu::splat(infinity)).sin[0]));
  EXPECT_TRUE(std::isnan(cpu::Circle<Real>(cpu::splat(Real(std::nan("")))).cos[0]));
  EXPECT_EQ(cpu::Circle<Real>(cpu::splat(Real(0))).sin[0], 0);
  EXPECT_EQ(cpu::Circle<Real>(cpu::splat(Real(0))).cos[0], 1);
}

TEST(CpuMath, Circle) {
  check_circle<float>(1.2);
  check_circle<double>(1.2);
}

template <class Half>
void check_half(Dtype dtype) {
  constexpr int lanes = cpu::kLanes<float>;
  for (int bits = 0; bits < 65536; bits += lanes) {
    Half half[lanes], back[lanes];
    for (int i = 0; i < lanes; ++i) half[i].bits = uint16_t(bits + i);
    const cpu::Vec<float> wide = cpu::load_real(half);
    cpu::store_real(back, wide);
    for (int i = 0; i < lanes; ++i) {
      const float want = half_to_float(half[i].bits, dtype);
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(wide[i]));
        EXPECT_TRUE(std::isnan(half_to_float(back[i].bits, dtype)));
      } else {
        EXPECT_EQ(wide[i], want);
        EXPECT_EQ(back[i].bits, half[i].bits);
      }
    }
  }
}

TEST(CpuConvert, EveryHalfAndBack) {
  check_half<cpu::Float16>(Dtype::f16);
  check_half<cpu::Bfloat16>(Dtype::bf16);
}

template <class Half>
void check_rounding(Dtype dtype, double largest) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> exponent(-30, std::log2(largest)), mantissa(1, 2);
  for (int i = 0; i < 100000; ++i) {
    float x = float(std::exp2(std::floor(exponent(random))) * mantissa(random)) * (i % 2 ? 1.f : -1.f);
    if (i % 3 == 0) {  // half way between two neighbours
      const uint16_t low = float_to_half(x, dtype) & 0x7ffe;
      x = (half_to_float(low, dtype) + half_to_float(low + 1, dtype)) / 2;
    }
    Half got[cpu::kLanes<float>];
    cpu::store_real(got, cpu::splat(x));
    ASSERT_EQ(got[0].bits, float_to_half(x, dtype)) << x;
  }
}

TEST(CpuConvert, RoundsToNearestEven) {
  check_rounding<cpu::Float16>(Dtype::f16, 30000);
  check_rounding<cpu::Bfloat16>(Dtype::bf16, 1e30);
  cpu::Float16 got[cpu::kLanes<float>];
  cpu::store_real(got, cpu::splat(65519.f));
  EXPECT_EQ(got[0].bits, 0x7bff);
  cpu::store_real(got, cpu::splat(65520.f));
  EXPECT_EQ(got[0].bits, 0x7c00);
}

TEST(CpuConvert, RowsOfAnyLength) {
  for (int n = 1; n <= 40; ++n) {
    std::vector<cpu::Bfloat16> from(n), to(n + 1, {0x1234});
    for (int i = 0; i < n; ++i) from[i].bits = float_to_half(i + 1, Dtype::bf16);
    const int64_t padded = cpu::round_up(n, cpu::kLanes<float>);
    std::vector<float> row(padded + 1, -7);
    cpu::load_row(from.data(), n, row.data(), padded);
    for (int64_t i = 0; i < padded; ++i) EXPECT_EQ(row[i], i < n ? i + 1 : 0);
    EXPECT_EQ(row[padded], -7);
    cpu::store_row(row.data(), n, to.data());
    EXPECT_EQ(std::memcmp(from.data(), to.data(), n * 2), 0);
    EXPECT_EQ(to[n].bits, 0x1234);
    std::vector<float> exact(n + 1, -7);
    cpu::load_row(from.data(), n, exact.data(), n);
    EXPECT_EQ(exact[n - 1], n);
    EXPECT_EQ(exact[n], -7);
  }
}

template <class Real>
void check_transpose() {
  constexpr int n = cpu::kLanes<Real>;
  std::vector<Real> from(n * (n + 3)), to(n * (n + 5));
  std::iota(from.begin(), from.end(), Real(0));
  cpu::transpose(from.data(), n + 3, to.data(), n + 5);
  for (int r = 0; r < n; ++r)
    for (int c = 0; c < n; ++c) EXPECT_EQ(to[c * (n + 5) + r], from[r * (n + 3) + c]);
}

TEST(CpuTranspose, Square) {
  check_transpose<float>();
  check_transpose<double>();
}

template <bool kColumns, cpu::Start kStart>
void check_gemm(int64_t m, int64_t k, int64_t vectors) {
  const int64_t n = vectors * cpu::kLanes<float>, lda = (kColumns ? m : k) + 1, ldb = n + 2, ldc = n + 3;
  std::mt19937 random(5);
  std::uniform_int_distribution<int> small(-4, 4);  // products and sums are exact
  const auto filled = [&](int64_t count) {
    std::vector<float> x(count);
    for (float& v : x) v = float(small(random));
    return x;
  };
  const std::vector<float> a = filled(lda * (kColumns ? k : m)), b = filled(ldb * k), scale = filled(n);
  std::vector<float> c = filled(ldc * m), want = c;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float& w = want[i * ldc + j];
      w = kStart == cpu::Start::zero ? 0 : kStart == cpu::Start::add ? w : w * scale[j];
      for (int64_t x = 0; x < k; ++x) w += a[kColumns ? x * lda + i : i * lda + x] * b[x * ldb + j];
    }
  int steps = 0;
  cpu::gemm_wide<kColumns, kStart>(cpu::Gemm<float>{.m = m,
                                                    .k = k,
                                                    .a = a.data(),
                                                    .lda = lda,
                                                    .b = b.data(),
                                                    .ldb = ldb,
                                                    .c = c.data(),
                                                    .ldc = ldc,
                                                    .scale = scale.data()},
                                   n, [&] { ++steps; });
  EXPECT_EQ(c, want) << m << " " << k << " " << vectors;
  EXPECT_EQ(steps, cpu::gemm_groups(m) * ((vectors + 1) / 2));
}

TEST(CpuGemm, EveryShape) {
  for (int64_t m = 0; m <= 21; ++m)
    for (int64_t k : {0, 1, 7})
      for (int64_t vectors : {1, 2, 3, 4}) {
        check_gemm<false, cpu::Start::zero>(m, k, vectors);
        check_gemm<false, cpu::Start::add>(m, k, vectors);
        check_gemm<true, cpu::Start::add>(m, k, vectors);
        check_gemm<true, cpu::Start::scale_add>(m, k, vectors);
      }
}

// Every piece is done exactly once, and is announced to the same worker just before.
TEST(WorkList, EveryPieceOnce) {
  const Executor executor{[](int64_t count, int64_t, Executor::Body body, void* context) {
                            for (int64_t i = count; i > 0; --i) body(context, i - 1, i);
                          },
                          5};
  for (int count : {0, 1, 3, 1000}) {
    constexpr int64_t copies = 3;
    WorkList<int> work;
    for (int i = 0; i < count; ++i) work.add(i, i % 7 ? i : 1e7);
    std::vector<int> done(count * copies);
    std::vector<const int*> announced(5, nullptr);
    const int workers = work.workers(executor, copies);
    ASSERT_GE(workers, 1);
    ASSERT_LE(workers, 5);
    work.run(executor, workers, copies, [&](const auto& piece, const auto& next, int64_t worker) {
      ASSERT_LT(worker, workers);
      if (announced[worker]) {
        EXPECT_EQ(announced[worker], piece.item);
      }
      announced[worker] = next.item;
      ++done[*piece.item * copies + piece.copy];
    });
    for (int n : done) EXPECT_EQ(n, 1);
    for (const int* rest : announced) EXPECT_EQ(rest, nullptr);
  }
}

TEST(WorkList, SmallWorkWakesNobody) {
  const Executor executor{[](int64_t, int64_t, Executor::Body, void*) { FAIL(); }, 64};
  WorkList<int> work;
  for (int i = 0; i < 10; ++i) work.add(i, 100);
  int64_t done = 0;
  work.run(executor, work.workers(executor, 2), 2, [&](const auto&, const auto&, int64_t) { ++done; });
  EXPECT_EQ(done, 20);
}

TEST(Isa, HasAName) {
  EXPECT_STREQ(name_of(Isa::avx2), "avx2");
  EXPECT_NE(name_of(cpu_isa()), nullptr);
}

}  // namespace
}  // namespace packseq::testing
