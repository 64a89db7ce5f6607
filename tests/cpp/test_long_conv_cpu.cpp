// The CPU implementation of the long convolution, against sums in double.
#include <cmath>
#include <limits>

#include "executors.h"
#include "long_conv_case.h"

namespace packseq::testing {
namespace {

// The guarded host memory itself.
void* place(const Matrix& m) { return const_cast<char*>(m.memory.data()) + m.first_byte(); }

void run(LongConv& v, const Executor& executor = Executor::serial()) {
  long_conv_forward(v.forward(v.cu.data(), place), executor);
  long_conv_backward(v.backward(v.cu.data(), place), executor);
}

const Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64};

std::vector<LongConvCase> cases() {
  std::vector<LongConvCase> all;
  for (const Dtype dtype : kDtypes) {
    for (int options = 0; options < 16; ++options) {
      const bool D = options & 1, pre_gate = options & 2, gate = options & 4, reverse = options & 8;
      for (const int after : {0, kMoreTaps}) {
        all.push_back({.channels = 3 + options,
                       .taps_after = after,
                       .dtype = dtype,
                       .reverse = reverse,
                       .pre_gate = pre_gate,
                       .gate = gate,
                       .D = D});
      }
    }
    for (const int length : {0, 1, 2, 3, 4, 5, 17, 63, 64, 65, 66, 100, 127, 128, 129, 200, 257, 300, 489, 1024, 1047})
      for (const auto& [taps, after] : {std::pair{1, 0},
                                        {5, 0},
                                        {64, 3},
                                        {kMoreTaps, 0},
                                        {7, kMoreTaps},
                                        {kMoreTaps, kMoreTaps},
                                        {length, length}}) {
        all.push_back({.lengths = {length},
                       .channels = 2,
                       .taps = std::max(1, taps),
                       .taps_after = after,
                       .dtype = dtype,
                       .reverse = length % 2 == 1,
                       .gate = length % 3 == 0,
                       .D = true});
      }
    for (const int channels : {1, 2, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70})
      all.push_back({.lengths = {70, 3, 0, 9, 200}, .channels = channels, .dtype = dtype, .gate = true, .D = true});
    for (const int offset : {0, 1, 2})
      for (const int gap : {0, 1, 4})
        all.push_back({.dtype = dtype, .pre_gate = true, .gate = true, .D = true, .gap = gap, .offset = offset});
    all.push_back({.lengths = {}, .dtype = dtype, .slack = 0});
    all.push_back({.lengths = {}, .taps_after = 3, .dtype = dtype, .D = true, .slack = 200});
    all.push_back({.lengths = {0, 0, 0}, .taps_after = 3, .dtype = dtype, .gate = true, .slack = 0});
    all.push_back({.lengths = {0, 40, 0, 0, 93, 0}, .dtype = dtype, .slack = 150});
    all.push_back({.lengths = std::vector<int>(300, 1), .taps_after = 2, .dtype = dtype});
    all.push_back({.lengths = std::vector<int>(70, 90), .taps_after = 9, .dtype = dtype, .D = true});
  }
  return all;
}

std::vector<LongConvCase> packed_cases() {
  std::vector<LongConvCase> all;
  for (const Dtype dtype : kDtypes)
    for (const bool reverse : {false, true})
      for (const int taps : {40, 150, kMoreTaps})
        all.push_back({.lengths = {64, 5, 300, 1, 0, 131, 2, 301, 65, 299},
                       .channels = 19,
                       .taps = taps,
                       .taps_after = reverse == (taps == 150) ? 50 : 0,
                       .dtype = dtype,
                       .reverse = reverse,
                       .pre_gate = taps == 40,
                       .gate = taps == 150,
                       .D = true});
  return all;
}

TEST(LongConvCpu, EveryCase) {
  for (const LongConvCase& c : cases()) {
    LongConv v(c);
    run(v);
    expect_right(v);
  }
}

TEST(LongConvCpu, LongSequences) {
  for (const auto& [length, dtype] : {std::pair{4097, Dtype::f32}, {4097, Dtype::f64}, {14113, Dtype::f32}}) {
    for (const int after : {0, 100}) {
      LongConv v(
          {.lengths = {length, 30, length - 1}, .channels = 1, .taps_after = after, .dtype = dtype, .gate = true});
      run(v, threaded());
      expect_right(v);
    }
  }
  LongConv short_filter({.lengths = {14113}, .channels = 9, .taps = 100});
  run(short_filter);
  expect_right(short_filter);
}

// Some of the values, as all would take too long.
TEST(LongConvCpu, VeryLongSequence) {
  LongConv v({.lengths = {65536}, .channels = 1, .taps = 65536});
  run(v);
  const int64_t length = 65536;
  double worst = 0;
  for (int64_t t = 0; t < length; t += 331) {
    double y = 0, dx = 0, dk = 0;
    for (int64_t j = 0; j <= t; ++j) y += v.k.at(0, j) * v.u.at(t - j, 0);
    for (int64_t j = 0; t + j < length; ++j) dx += v.k.at(0, j) * v.dout.at(t + j, 0);
    for (int64_t s = t; s < length; ++s) dk += v.dout.at(s, 0) * v.u.at(s - t, 0);
    worst = std::max({worst, std::abs(v.out.at(t, 0) - y), std::abs(v.du.at(t, 0) - dx), std::abs(v.dk.at(0, t) - dk)});
  }
  EXPECT_LE(worst, 4e-6 * std::sqrt(double(length)));
}

TEST(LongConvCpu, SameBitsWithAnyExecutor) {
  auto all = packed_cases();
  for (const Dtype dtype : kDtypes) {  // enough work to be cut into pieces
    all.push_back({.lengths = std::vector<int>(60, 190), .channels = 20, .dtype = dtype, .gate = true, .D = true});
    all.push_back({.lengths = std::vector<int>(300, 60), .channels = 37, .taps_after = 80, .dtype = dtype, .D = true});
    all.push_back({.lengths = {3000, 2000, 500, 250, 3000, 900}, .channels = 20, .dtype = dtype});
  }
  for (const LongConvCase& c : all) {
    LongConv a(c), b(c), d(c);
    run(a), run(b, threaded()), run(d, threaded<16>());
    expect_same(a, b), expect_same(a, d);
  }
}

TEST(LongConvCpu, ManySequencesAreRight) {
  for (const Dtype dtype : kDtypes) {
    std::vector<int> lengths;
    for (int i = 0; i < 400; ++i) lengths.push_back(i * 7 % 190);
    LongConv v({.lengths = lengths, .channels = 20, .taps_after = 30, .dtype = dtype, .gate = true, .D = true});
    run(v, threaded());
    expect_right(v);
  }
}

TEST(LongConvCpu, SameBitsAloneAndPacked) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv packed(c);
    run(packed, threaded());
    for (int64_t i = 0; i < packed.sequences(); ++i) {
      LongConv one = alone(packed, i);
      run(one);
      expect_same_rows(packed, packed.cu[size_t(i)], one, 0, one.u.rows);
    }
  }
}

TEST(LongConvCpu, NanStaysInItsSequence) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv clean(c);
    run(clean);
    for (int64_t i = 0; i < clean.sequences(); ++i) {
      LongConv bad(c);
      poison_rows(bad, bad.cu[size_t(i)], bad.cu[size_t(i) + 1], std::nan(""));
      run(bad, threaded());
      expect_same_but(clean, bad, i);
      EXPECT_EQ(std::isnan(bad.dk.at(0, 0)), c.lengths[size_t(i)] > 0);
    }
  }
}

TEST(LongConvCpu, NanStaysInItsChannel) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv clean(c);
    run(clean);
    for (const int channel : {0, 7, 18}) {
      LongConv bad(c);
      const bool half = c.dtype == Dtype::f16 || c.dtype == Dtype::bf16;
      const double poison = channel == 7 && !half ? std::numeric_limits<double>::infinity() : std::nan("");
      poison_rows(bad, 0, bad.cu.back(), poison, channel);
      bad.k.set(channel, 1, poison), bad.D.set(0, channel, poison);
      run(bad);
      expect_same_but_channel(clean, bad, channel);
    }
  }
}

// In a short sequence a token leaves alone, bit for bit, what comes before it, whatever it is.
TEST(LongConvCpu, ShortSequencesAreExactlyCausal) {
  for (const Dtype dtype : kDtypes)
    for (const bool reverse : {false, true}) {
      const LongConvCase c{.lengths = {kDirectRows}, .dtype = dtype, .reverse = reverse, .D = true};
      LongConv clean(c);
      run(clean);
      for (const int t : {0, 1, 30, 62, 63}) {
        LongConv late(c);
        const int64_t row = reverse ? kDirectRows - 1 - t : t;
        for (int64_t x = 0; x < late.u.columns; ++x) late.u.set(row, x, std::nan("")), late.k.set(x, t + 1, INFINITY);
        run(late);
        const int64_t begin = reverse ? row + 1 : 0, rows = reverse ? kDirectRows - begin : row;
        expect_same(clean.out, begin, late.out, begin, rows, "out");
        EXPECT_TRUE(std::isnan(late.out.at(row, 0)));
      }
    }
}

// Values after a sequence's end count for nothing: a long filter gives what its first taps give.
TEST(LongConvCpu, TapsBeyondTheSequenceDoNotMatter) {
  LongConv whole({.lengths = {300, 40}});
  run(whole);
  for (int64_t j = 300; j < whole.c.taps; ++j)
    for (int64_t x = 0; x < whole.k.rows; ++x) EXPECT_EQ(whole.dk.at(x, j), 0);
  expect_right(whole);
}

TEST(LongConvCpu, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : malformed_boundaries())
    for (const bool reverse : {false, true}) {
      LongConv v({.lengths = {80, 80, 80, 80, 80}, .taps_after = 9, .reverse = reverse, .gate = true, .D = true});
      v.cu = cu;
      run(v, threaded());
      for (const Matrix* m : v.outputs()) EXPECT_TRUE(m->memory.intact());
    }
}

}  // namespace
}  // namespace packseq::testing
