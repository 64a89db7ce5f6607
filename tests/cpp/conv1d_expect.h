// What every implementation of the causal convolution must give: the right numbers, the same bits.
#pragma once
#include "conv1d_case.h"

namespace packseq::testing {

// sums: how much larger the terms of pre are than what they may cancel to.
inline void expect_right(const Conv& v, double sums = 1) {
  SCOPED_TRACE(v.c.name());
  const ConvReference want(v);
  const Dtype t = v.c.dtype;
  const double exact = sums * (t == Dtype::f64 ? 1e-14 : 1e-6);
  const double rounded = t == Dtype::f16 ? 6e-4 : t == Dtype::bf16 ? 4.5e-3 : exact;
  expect_close(v.out, want.out, rounded, "out");
  expect_close(v.dx, want.dx, rounded, "dx");
  expect_close(v.dweight, want.dweight, exact, "dweight");
  if (v.c.bias) expect_close(v.dbias, want.dbias, exact, "dbias");
  if (v.c.final) expect_close(v.final, want.final, 0, "final states");
  if (v.c.initial) expect_close(v.dinitial, want.dinitial, rounded, "dinitial states");
}

inline void expect_same(const Conv& a, const Conv& b) {
  for (size_t i = 0; i < a.outputs().size(); ++i)
    expect_same(*a.outputs()[i], 0, *b.outputs()[i], 0, a.outputs()[i]->rows, "output");
}

// What the sequences other than `except` give, but for the gradients that all share.
inline void expect_same_but(const Conv& a, const Conv& b, int64_t except) {
  const int64_t begin = a.cu[except], end = a.cu[except + 1], states = a.c.channels;
  for (const auto& [x, y, from, to] : {std::tuple{&a.out, &b.out, begin, end},
                                       {&a.dx, &b.dx, begin, end},
                                       {&a.final, &b.final, except * states, (except + 1) * states},
                                       {&a.dinitial, &b.dinitial, except * states, (except + 1) * states}}) {
    expect_same(*x, 0, *y, 0, from, "before");
    expect_same(*x, to, *y, to, x->rows - to, "after");
  }
}

// Sequence i alone, with the packed one's inputs.
inline Conv alone(const Conv& packed, int64_t i) {
  ConvCase c = packed.c;
  c.lengths = {c.lengths[size_t(i)]};
  c.slack = 0;
  Conv one(c);
  const int64_t begin = packed.cu[i], rows = c.lengths[0], states = i * c.channels;
  copy_rows(one.x, 0, packed.x, begin, rows), copy_rows(one.dout, 0, packed.dout, begin, rows);
  copy_rows(one.initial, 0, packed.initial, states, c.channels);
  copy_rows(one.dfinal, 0, packed.dfinal, states, c.channels);
  copy_rows(one.weight, 0, packed.weight, 0, c.channels), copy_rows(one.bias, 0, packed.bias, 0, 1);
  return one;
}

inline void expect_same_alone(const Conv& packed, const Conv& one, int64_t i) {
  const int64_t begin = packed.cu[i], rows = one.x.rows, states = i * one.c.channels;
  expect_same(packed.out, begin, one.out, 0, rows, "out");
  expect_same(packed.dx, begin, one.dx, 0, rows, "dx");
  if (one.c.final) expect_same(packed.final, states, one.final, 0, one.c.channels, "final states");
  if (one.c.initial) expect_same(packed.dinitial, states, one.dinitial, 0, one.c.channels, "dinitial states");
}

// Sequence i's inputs become `poison`.
inline void poison_sequence(Conv& v, int64_t i, double poison) {
  for (Matrix* m : {&v.x, &v.dout, &v.initial, &v.dfinal}) {
    const bool states = m == &v.initial || m == &v.dfinal;
    const int64_t begin = states ? i * v.c.channels : v.cu[i], end = states ? (i + 1) * v.c.channels : v.cu[i + 1];
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < m->columns; ++c) m->set(r, c, poison);
  }
}

// Sequences long and short, that begin anywhere in a tile.
inline std::vector<ConvCase> packed_cases() {
  std::vector<ConvCase> all;
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64})
    for (const bool reverse : {false, true})
      for (const int channels : {40, 13})
        all.push_back({.lengths = {64, 5, 300, 1, 0, 131, 17, 2, 3, 700},
                       .channels = channels,
                       .dtype = dtype,
                       .reverse = reverse});
  return all;
}

// A pool of more slots than there are sequences, which have theirs in no order; some have none.
struct StepPool {
  Matrix states;
  std::vector<int32_t> indices;

  explicit StepPool(const Conv& v)
      : states(v.c.dtype, (v.sequences() + 3) * v.c.channels, v.c.width - 1), indices(size_t(v.sequences())) {
    std::mt19937 random(11);
    states.fill(random, 0, states.rows);
    for (int64_t i = 0; i < v.sequences(); ++i) {
      const int64_t slot = v.sequences() + 2 - i;
      indices[size_t(i)] = i % 4 == 3 ? (i % 8 == 3 ? -1 : int32_t(slot + 1000)) : int32_t(slot);
      if (i % 4 != 3) copy_rows(states, slot * v.c.channels, v.initial, i * v.c.channels, v.c.channels);
    }
  }

  // want: the forward's results; got: the step's; after: the pool's states after it.
  void expect_right(const Conv& want, const Conv& got, const Matrix& after) const {
    ASSERT_TRUE(got.out.memory.intact() && after.memory.intact());
    const int64_t channels = want.c.channels;
    std::vector<bool> touched(size_t(states.rows / channels), false);
    for (int64_t i = 0; i < want.sequences(); ++i) {
      const int64_t slot = indices[size_t(i)], begin = want.cu[i], rows = want.cu[i + 1] - begin;
      if (i % 4 != 3) {
        expect_same(want.out, begin, got.out, begin, rows, "out");
        expect_same(want.final, i * channels, after, slot * channels, channels, "state");
        touched[size_t(slot)] = true;
        continue;
      }
      for (int64_t r = begin; r < begin + rows; ++r)
        for (int64_t c = 0; c < channels; ++c) ASSERT_EQ(got.out.at(r, c), 0) << "no slot, row " << r;
    }
    for (size_t slot = 0; slot < touched.size(); ++slot) {
      const int64_t row = int64_t(slot) * channels;
      if (!touched[slot]) expect_same(states, row, after, row, channels, "untouched slot");
    }
    const int64_t end = want.cu.back();
    expect_same(want.out, end, got.out, end, want.out.rows - end, "slack");
  }
};

}  // namespace packseq::testing
