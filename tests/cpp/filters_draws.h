// What the tests of the filters on the GPU share: random tensors, the same in double, and comparisons.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace packseq::testing {

using Float2 = std::complex<float>;
using Double2 = std::complex<double>;

inline std::vector<Float2> random_complex(int64_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<Float2> x;
  for (int64_t i = 0; i < count; ++i) {
    const float re = normal(random), im = normal(random);
    x.push_back(scale * Float2(re, im));
  }
  return x;
}

inline std::vector<float> random_real(int64_t count, unsigned seed) {
  std::vector<float> x;
  for (const Float2 y : random_complex(count, seed)) x.push_back(y.real());
  return x;
}

// Poles in the left half plane, as state space models have them.
inline std::vector<Float2> random_poles(int64_t count, unsigned seed, float scale = 1.0f) {
  std::vector<Float2> w = random_complex(count, seed);
  for (Float2& x : w) x = scale * Float2(-0.2f - std::abs(x.real()), 4.0f * x.imag());
  return w;
}

// Copies of tensors in double, for as long as it lives: the CPU's operators say of them what is right.
class InDouble {
 public:
  const void* operator()(const std::vector<Float2>& x) { return keep(std::vector<Double2>(x.begin(), x.end())); }
  const void* operator()(const std::vector<float>& x) { return keep(std::vector<double>(x.begin(), x.end())); }
  const int32_t* operator()(const std::vector<int32_t>& x) { return keep(x); }

 private:
  template <class X>
  const X* keep(const std::vector<X>& x) {
    const auto kept = std::make_shared<const std::vector<X>>(x);
    kept_.push_back(kept);
    return kept->data();
  }
  std::vector<std::shared_ptr<const void>> kept_;
};

inline double size_of_element(double x) { return std::abs(x); }
inline double size_of_element(Double2 x) { return std::abs(x); }

// Every element, by the largest of the tensor, or by `scale` where that is larger: sums that cancel are as exact as
// what they are sums of.
template <class Got, class Want>
void expect_near(const std::vector<Got>& got, const std::vector<Want>& want, double tolerance, const std::string& what,
                 double scale = 1e-30) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double worst = 0;
  size_t at = 0;
  for (const Want x : want) scale = std::max(scale, size_of_element(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = size_of_element(Want(got[i]) - want[i]);
    ASSERT_FALSE(std::isnan(error)) << what << " at " << i << ": got " << got[i] << ", want " << want[i];
    if (error > worst) worst = error, at = i;
  }
  if (want.empty()) return;
  EXPECT_LE(worst / scale, tolerance) << what << " at " << at << ": got " << got[at] << ", want " << want[at]
                                      << ", scale " << scale;
}

}  // namespace packseq::testing
