// Comparisons of tensors with what they should be.
#pragma once
#include <gtest/gtest.h>

#include <cstring>

#include "attention_case.h"

namespace packseq::testing {

inline double tolerance(Dtype t) {
  switch (t) {
    case Dtype::f64:
      return 1e-13;
    case Dtype::f32:
      return 4e-6;
    case Dtype::f16:
      return 2e-3;
    default:
      return 1.6e-2;
  }
}

// Every element, by the largest value of its tensor (gradients that cancel to nothing: by that of the inputs);
// infinities exactly.
inline void expect_close(const Tensor& got, const std::vector<double>& want, double tolerance,
                         const std::string& what) {
  ASSERT_TRUE(got.memory.intact()) << what << ": written outside";
  double scale = 0;
  for (double x : want) scale = std::isinf(x) ? scale : std::max(scale, std::abs(x));
  int64_t i = 0, worst = 0;
  double error = -1;
  for (int64_t t = 0; t < got.total; ++t)
    for (int64_t h = 0; h < got.heads; ++h)
      for (int64_t d = 0; d < got.dim; ++d, ++i) {
        const double x = got.at(t, h, d), e = x == want[i] ? 0 : std::abs(x - want[i]);
        ASSERT_FALSE(std::isnan(e)) << what << " at token " << t << ", head " << h << ", " << d << ": got " << x
                                    << ", want " << want[i];
        if (e > error) error = e, worst = i;
      }
  if (want.empty()) return;
  EXPECT_LE(error, tolerance * std::max(scale, 0.5))
      << what << " at token " << worst / (got.heads * got.dim) << ", head " << worst / got.dim % got.heads << ", "
      << worst % got.dim << ": got "
      << got.at(worst / (got.heads * got.dim), worst / got.dim % got.heads, worst % got.dim) << ", want "
      << want[worst];
}

inline void expect_same_rows(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b, int64_t rows,
                             const std::string& what) {
  const size_t width = a.token * size_of(a.dtype);
  EXPECT_EQ(std::memcmp(a.memory.data() + row_a * width, b.memory.data() + row_b * width, rows * width), 0) << what;
}

}  // namespace packseq::testing
