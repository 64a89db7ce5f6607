// Matrices on the host, what is expected of them, and boundaries.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "guarded.h"

namespace packseq::testing {

// A matrix of some dtype on the host, all NaN before it is filled.
struct Matrix {
  Guarded memory;
  Dtype dtype;
  int64_t rows, columns, stride, offset;

  Matrix(Dtype t, int64_t rows_, int64_t columns_, int gap = 0, int offset_ = 0)
      : memory(size_t(rows_ * (columns_ + gap) + offset_) * size_of(t)),
        dtype(t),
        rows(rows_),
        columns(columns_),
        stride(columns_ + gap),
        offset(offset_) {}

  double at(int64_t r, int64_t c) const { return read(memory.data(), offset + r * stride + c, dtype); }
  void set(int64_t r, int64_t c, double x) { write(memory.data(), offset + r * stride + c, dtype, x); }
  size_t first_byte() const { return size_t(offset) * size_of(dtype); }

  void fill(std::mt19937& random, int64_t begin, int64_t end, double scale = 1) {
    std::normal_distribution<double> normal;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < columns; ++c) set(r, c, scale * normal(random));
  }
};

// Every element, by the largest value of its tensor.
inline void expect_close(const Matrix& got, const std::vector<double>& want, double tolerance, const char* what) {
  ASSERT_TRUE(got.memory.intact()) << what << ": written outside";
  double scale = 0.5;
  for (double x : want) scale = std::max(scale, std::abs(x));
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.columns; ++c) {
      const double x = got.at(r, c), y = want[size_t(r * got.columns + c)];
      ASSERT_TRUE(std::abs(x - y) <= tolerance * scale)
          << what << " at " << r << ", " << c << ": got " << x << ", want " << y;
    }
}

inline void expect_same(const Matrix& a, int64_t row_a, const Matrix& b, int64_t row_b, int64_t rows,
                        const char* what) {
  for (int64_t r = 0; r < rows; ++r) {
    const size_t element = size_of(a.dtype);
    const char* const from_a = a.memory.data() + (a.offset + (row_a + r) * a.stride) * element;
    const char* const from_b = b.memory.data() + (b.offset + (row_b + r) * b.stride) * element;
    ASSERT_EQ(std::memcmp(from_a, from_b, a.columns * element), 0) << what << " row " << row_a + r;
  }
}

inline void copy_rows(Matrix& to, int64_t row_to, const Matrix& from, int64_t row_from, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < to.columns; ++c) to.set(row_to + r, c, from.at(row_from + r, c));
}

// cu_seqlens of sequences of these lengths.
inline std::vector<int32_t> boundaries(const std::vector<int>& lengths) {
  std::vector<int32_t> cu = {0};
  for (int n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

inline const std::vector<std::vector<int32_t>>& malformed_boundaries() {
  static const std::vector<std::vector<int32_t>> all = {
      {0, 90, 1000, -7, 40, 12},  {-100, -5, 2000000000, 3, 2, 1},
      {9, 9, 9, 9, 9, 9},         {5, 4, 3, 2, 1, 0},
      {0, 100, 10, 100, 10, 100}, {-2000000000, 2000000000, -2000000000, 2000000000, 0, 1}};
  return all;
}

}  // namespace packseq::testing
