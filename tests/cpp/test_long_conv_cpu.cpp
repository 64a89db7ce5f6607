// The CPU implementation of the long convolution, against sums in double.
#include <cmath>
#include <limits>

#include "executors.h"
#include "longconv/longconv.h"
#include "matrix.h"

namespace packseq::testing {
namespace {

struct LongConvCase {
  std::vector<int> lengths = {5, 0, 70, 1, 64, 130, 2, 65};
  int taps = 1 << 20, after = 0;  // no more are made than the longest sequence's length and 3
  int channels = 5;
  Dtype dtype = Dtype::f32;
  bool reverse = false, D = false, pre_gate = false, gate = false;
  int slack = 3;
  int gap = 0;     // elements between the rows of u, dout and the gates
  int offset = 0;  // elements that they, out and the gradients begin after an aligned address

  std::string name() const {
    std::string s = name_of(dtype);
    s += " channels " + std::to_string(channels) + " taps " + std::to_string(taps) + " after " + std::to_string(after) +
         " sequences " + std::to_string(lengths.size());
    if (!lengths.empty()) s += " first " + std::to_string(lengths[0]);
    for (const auto& [on, what] : {std::pair{reverse, " reverse"},
                                   {D, " D"},
                                   {pre_gate, " pre_gate"},
                                   {gate, " gate"},
                                   {gap > 0, " gap"},
                                   {offset > 0, " offset"}}) {
      if (on) s += what;
    }
    return s;
  }
};

// The tensors of one call. Inputs' slack rows and gaps hold NaN, and so do outputs before the call.
struct LongConv {
  LongConvCase c;
  std::vector<int32_t> cu;
  int64_t taps, after;
  Matrix u, pre_gate, gate, dout, k, k_after, D;
  Matrix out, du, dpre_gate, dgate, dk, dk_after, dD;

  explicit LongConv(const LongConvCase& c_)
      : c(c_),
        cu(boundaries(c.lengths)),
        taps(std::min<int64_t>(c.taps, longest() + 3)),
        after(std::min<int64_t>(c.after, longest() + 3)),
        u(c.dtype, cu.back() + c.slack, c.channels, c.gap, c.offset),
        pre_gate(u),
        gate(u),
        dout(u),
        k(parameter(), c.channels, taps),
        k_after(parameter(), c.channels, after),
        D(parameter(), 1, c.channels),
        out(c.dtype, u.rows, c.channels, 0, c.offset),
        du(out),
        dpre_gate(out),
        dgate(out),
        dk(k),
        dk_after(k_after),
        dD(D) {
    std::mt19937 random(1);
    for (Matrix* m : {&u, &pre_gate, &gate, &dout}) m->fill(random, 0, cu.back());
    for (Matrix* m : {&k, &k_after, &D}) m->fill(random, 0, m->rows);
  }

  int64_t longest() const { return c.lengths.empty() ? 0 : *std::max_element(c.lengths.begin(), c.lengths.end()); }
  int64_t sequences() const { return int64_t(cu.size()) - 1; }
  Dtype parameter() const { return c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

  static void* place(const Matrix& m) { return const_cast<char*>(m.memory.data()) + m.first_byte(); }

  LongConvProblem problem() const {
    const auto optional = [](bool on, const Matrix& m) { return Rows{on ? place(m) : nullptr, m.stride}; };
    return {.dtype = c.dtype,
            .total = u.rows,
            .sequences = sequences(),
            .channels = c.channels,
            .cu_seqlens = cu.data(),
            .reverse = c.reverse,
            .u = {place(u), u.stride},
            .pre_gate = optional(c.pre_gate, pre_gate),
            .gate = optional(c.gate, gate),
            .k = place(k),
            .k_after = c.after ? place(k_after) : nullptr,
            .taps = taps,
            .taps_after = after,
            .D = c.D ? place(D) : nullptr};
  }

  void run(const Executor& executor = Executor::serial()) {
    long_conv_forward({.problem = problem(), .out = place(out), .workspace = nullptr}, executor);
    long_conv_backward({.problem = problem(),
                        .dout = {place(dout), dout.stride},
                        .du = place(du),
                        .dpre_gate = c.pre_gate ? place(dpre_gate) : nullptr,
                        .dgate = c.gate ? place(dgate) : nullptr,
                        .dk = place(dk),
                        .dk_after = c.after ? place(dk_after) : nullptr,
                        .dD = c.D ? place(dD) : nullptr,
                        .workspace = nullptr},
                       executor);
  }

  // What belongs to rows, and what sequences share.
  std::vector<const Matrix*> row_outputs() const {
    std::vector<const Matrix*> some = {&out, &du};
    if (c.pre_gate) some.push_back(&dpre_gate);
    if (c.gate) some.push_back(&dgate);
    return some;
  }
  std::vector<const Matrix*> shared_outputs() const {
    std::vector<const Matrix*> some = {&dk};
    if (c.after) some.push_back(&dk_after);
    if (c.D) some.push_back(&dD);
    return some;
  }
};

// y[t] += sum over j of k[j] x[t - j]
void add_convolution(std::vector<double>& y, const std::vector<double>& k, const std::vector<double>& x) {
  for (size_t j = 0; j < std::min(k.size(), y.size()); ++j)
    for (size_t t = j; t < y.size(); ++t) y[t] += k[j] * x[t - j];
}

std::vector<double> backwards(std::vector<double> x) {
  std::reverse(x.begin(), x.end());
  return x;
}

// Straight from the formulas of longconv.h, in double.
struct LongConvReference {
  std::vector<double> out, du, dpre_gate, dgate, dk, dk_after, dD;

  explicit LongConvReference(const LongConv& v) : v_(v), channels_(v.c.channels) {
    for (auto* rows : {&out, &du, &dpre_gate, &dgate}) rows->resize(size_t(v.u.rows * channels_));
    dk.resize(size_t(v.taps * channels_)), dk_after.resize(size_t(v.after * channels_)), dD.resize(size_t(channels_));
    for (int64_t i = 0; i < v.sequences(); ++i)
      for (int64_t c = 0; c < channels_; ++c) channel(i, c);
  }

 private:
  void channel(int64_t i, int64_t c) {
    const int64_t begin = v_.cu[i], length = v_.cu[i + 1] - begin;
    if (length == 0) return;
    const auto row = [&](int64_t t) { return v_.c.reverse ? begin + length - 1 - t : begin + t; };
    const auto column = [&](const Matrix& m) {
      std::vector<double> x(static_cast<size_t>(length));
      for (int64_t t = 0; t < length; ++t) x[size_t(t)] = m.at(row(t), c);
      return x;
    };
    const auto filter = [&](const Matrix& m) {
      std::vector<double> x(static_cast<size_t>(m.columns));
      for (int64_t j = 0; j < m.columns; ++j) x[size_t(j)] = m.at(c, j);
      return x;
    };
    const std::vector<double> ones(size_t(length), 1.0), none(size_t(length), 0.0);
    const auto u = column(v_.u), dout = column(v_.dout), k = filter(v_.k), k_after = filter(v_.k_after);
    const auto pre_gate = v_.c.pre_gate ? column(v_.pre_gate) : ones, gate = v_.c.gate ? column(v_.gate) : ones;
    auto x = u, dy = dout;
    for (size_t t = 0; t < x.size(); ++t) x[t] *= pre_gate[t], dy[t] *= gate[t];
    const double D = v_.c.D ? v_.D.at(0, c) : 0;

    // The taps of times to come are taps one row late, with time running backwards.
    const auto both = [&](const std::vector<double>& from, const std::vector<double>& now,
                          const std::vector<double>& later) {
      auto sum = none, late = none, turned = backwards(from);
      add_convolution(sum, now, from);
      turned.insert(turned.begin(), 0.0), turned.pop_back();
      add_convolution(late, later, turned);
      late = backwards(late);
      for (size_t t = 0; t < sum.size(); ++t) sum[t] += late[t] + D * from[t];
      return sum;
    };
    const auto y = both(x, k, k_after), dx = backwards(both(backwards(dy), k, k_after));
    for (int64_t t = 0; t < length; ++t) {
      const size_t at = size_t(row(t) * channels_ + c), s = size_t(t);
      out[at] = gate[s] * y[s], dgate[at] = dout[s] * y[s];
      du[at] = dx[s] * pre_gate[s], dpre_gate[at] = dx[s] * u[s];
      dD[size_t(c)] += dy[s] * x[s];
    }
    // dk[j] is the sum of dy[t] x[t - j]; dk_after[j] that of dy[t] x[t + 1 + j].
    auto lags = none, leads = none;
    add_convolution(lags, backwards(dy), x);
    add_convolution(leads, dy, backwards(x));
    for (int64_t j = 0; j < std::min(length, v_.taps); ++j) dk[size_t(c * v_.taps + j)] += lags[size_t(length - 1 - j)];
    for (int64_t j = 0; j < std::min(length - 1, v_.after); ++j) {
      dk_after[size_t(c * v_.after + j)] += leads[size_t(length - 2 - j)];
    }
  }

  const LongConv& v_;
  int64_t channels_;
};

void expect_right(const LongConv& v) {
  SCOPED_TRACE(v.c.name());
  const LongConvReference want(v);
  const Dtype t = v.c.dtype;
  const double exact = t == Dtype::f64 ? 1e-14 : 1e-6;
  const double rounded = t == Dtype::f16 ? 6e-4 : t == Dtype::bf16 ? 4.5e-3 : exact;
  expect_close(v.out, want.out, rounded, "out");
  expect_close(v.du, want.du, rounded, "du");
  expect_close(v.dk, want.dk, exact, "dk");
  if (v.c.pre_gate) expect_close(v.dpre_gate, want.dpre_gate, rounded, "dpre_gate");
  if (v.c.gate) expect_close(v.dgate, want.dgate, rounded, "dgate");
  if (v.c.after) expect_close(v.dk_after, want.dk_after, exact, "dk_after");
  if (v.c.D) expect_close(v.dD, want.dD, exact, "dD");
}

void expect_same(const LongConv& a, const LongConv& b) {
  SCOPED_TRACE(a.c.name());
  for (size_t i = 0; i < a.row_outputs().size(); ++i)
    expect_same(*a.row_outputs()[i], 0, *b.row_outputs()[i], 0, a.u.rows, "rows");
  for (size_t i = 0; i < a.shared_outputs().size(); ++i)
    expect_same(*a.shared_outputs()[i], 0, *b.shared_outputs()[i], 0, a.shared_outputs()[i]->rows, "shared gradient");
}

const Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64};

std::vector<LongConvCase> cases() {
  std::vector<LongConvCase> all;
  for (const Dtype dtype : kDtypes) {
    for (int options = 0; options < 16; ++options) {
      const bool D = options & 1, pre_gate = options & 2, gate = options & 4, reverse = options & 8;
      for (const int after : {0, 1 << 20}) {
        all.push_back({.after = after,
                       .channels = 3 + options,
                       .dtype = dtype,
                       .reverse = reverse,
                       .D = D,
                       .pre_gate = pre_gate,
                       .gate = gate});
      }
    }
    for (const int length : {0, 1, 2, 3, 4, 5, 17, 63, 64, 65, 66, 100, 127, 128, 129, 200, 257, 300, 489, 1024, 1047})
      for (const auto& [taps, after] :
           {std::pair{1, 0}, {5, 0}, {64, 3}, {1 << 20, 0}, {7, 1 << 20}, {1 << 20, 1 << 20}, {length, length}}) {
        all.push_back({.lengths = {length},
                       .taps = std::max(1, taps),
                       .after = after,
                       .channels = 2,
                       .dtype = dtype,
                       .reverse = length % 2 == 1,
                       .D = true,
                       .gate = length % 3 == 0});
      }
    for (const int channels : {1, 2, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70})
      all.push_back({.lengths = {70, 3, 0, 9, 200}, .channels = channels, .dtype = dtype, .D = true, .gate = true});
    for (const int offset : {0, 1, 2})
      for (const int gap : {0, 1, 4})
        all.push_back({.dtype = dtype, .D = true, .pre_gate = true, .gate = true, .gap = gap, .offset = offset});
    all.push_back({.lengths = {}, .dtype = dtype, .slack = 0});
    all.push_back({.lengths = {}, .after = 3, .dtype = dtype, .D = true, .slack = 200});
    all.push_back({.lengths = {0, 0, 0}, .after = 3, .dtype = dtype, .gate = true, .slack = 0});
    all.push_back({.lengths = {0, 40, 0, 0, 93, 0}, .dtype = dtype, .slack = 150});
    all.push_back({.lengths = std::vector<int>(300, 1), .after = 2, .dtype = dtype});
    all.push_back({.lengths = std::vector<int>(70, 90), .after = 9, .dtype = dtype, .D = true});
  }
  return all;
}

std::vector<LongConvCase> packed_cases() {
  std::vector<LongConvCase> all;
  for (const Dtype dtype : kDtypes)
    for (const bool reverse : {false, true})
      for (const int taps : {40, 150, 1 << 20})
        all.push_back({.lengths = {64, 5, 300, 1, 0, 131, 2, 301, 65, 299},
                       .taps = taps,
                       .after = reverse == (taps == 150) ? 50 : 0,
                       .channels = 19,
                       .dtype = dtype,
                       .reverse = reverse,
                       .D = true,
                       .pre_gate = taps == 40,
                       .gate = taps == 150});
  return all;
}

TEST(LongConvCpu, EveryCase) {
  for (const LongConvCase& c : cases()) {
    LongConv v(c);
    v.run();
    expect_right(v);
  }
}

TEST(LongConvCpu, LongSequences) {
  for (const auto& [length, dtype] : {std::pair{4097, Dtype::f32}, {4097, Dtype::f64}, {14113, Dtype::f32}}) {
    for (const int after : {0, 100}) {
      LongConv v({.lengths = {length, 30, length - 1}, .after = after, .channels = 1, .dtype = dtype, .gate = true});
      v.run(threaded());
      expect_right(v);
    }
  }
  LongConv short_filter({.lengths = {14113}, .taps = 100, .channels = 9});
  short_filter.run();
  expect_right(short_filter);
}

// Some of the values, as all would take too long.
TEST(LongConvCpu, VeryLongSequence) {
  LongConv v({.lengths = {65536}, .taps = 65536, .channels = 1});
  v.run();
  const int64_t length = 65536;
  double worst = 0;
  for (int64_t t = 0; t < length; t += 331) {
    double y = 0, dx = 0, dk = 0;
    for (int64_t j = 0; j <= t; ++j) y += v.k.at(0, j) * v.u.at(t - j, 0);
    for (int64_t j = 0; t + j < length; ++j) dx += v.k.at(0, j) * v.dout.at(t + j, 0);
    for (int64_t s = t; s < length; ++s) dk += v.dout.at(s, 0) * v.u.at(s - t, 0);
    worst = std::max({worst, std::abs(v.out.at(t, 0) - y), std::abs(v.du.at(t, 0) - dx), std::abs(v.dk.at(0, t) - dk)});
  }
  EXPECT_LE(worst, 1e-6 * 4 * std::sqrt(double(length)));
}

TEST(LongConvCpu, SameBitsWithAnyExecutor) {
  auto all = packed_cases();
  for (const Dtype dtype : kDtypes) {  // enough work to be cut into pieces
    all.push_back({.lengths = std::vector<int>(60, 190), .channels = 20, .dtype = dtype, .D = true, .gate = true});
    all.push_back({.lengths = std::vector<int>(300, 60), .after = 80, .channels = 37, .dtype = dtype, .D = true});
    all.push_back({.lengths = {3000, 2000, 500, 250, 3000, 900}, .channels = 20, .dtype = dtype});
  }
  for (const LongConvCase& c : all) {
    LongConv a(c), b(c), d(c);
    a.run(), b.run(threaded()), d.run(threaded<16>());
    expect_same(a, b), expect_same(a, d);
  }
}

TEST(LongConvCpu, ManySequencesAreRight) {
  for (const Dtype dtype : kDtypes) {
    std::vector<int> lengths;
    for (int i = 0; i < 400; ++i) lengths.push_back(i * 7 % 190);
    LongConv v({.lengths = lengths, .after = 30, .channels = 20, .dtype = dtype, .D = true, .gate = true});
    v.run(threaded());
    expect_right(v);
  }
}

TEST(LongConvCpu, SameBitsAloneAndPacked) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv packed(c);
    packed.run(threaded());
    for (int64_t i = 0; i < packed.sequences(); ++i) {
      LongConvCase single = c;
      single.lengths = {c.lengths[size_t(i)]};
      single.slack = 0;
      LongConv one(single);
      one.taps = packed.taps, one.after = packed.after;
      one.k = packed.k, one.k_after = packed.k_after, one.D = packed.D, one.dk = packed.k,
      one.dk_after = packed.k_after;
      const int64_t begin = packed.cu[i], rows = single.lengths[0];
      copy_rows(one.u, 0, packed.u, begin, rows), copy_rows(one.dout, 0, packed.dout, begin, rows);
      copy_rows(one.pre_gate, 0, packed.pre_gate, begin, rows), copy_rows(one.gate, 0, packed.gate, begin, rows);
      one.run();
      for (size_t m = 0; m < one.row_outputs().size(); ++m)
        expect_same(*packed.row_outputs()[m], begin, *one.row_outputs()[m], 0, rows, "rows");
    }
  }
}

TEST(LongConvCpu, NanStaysInItsSequence) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv clean(c);
    clean.run();
    for (int64_t i = 0; i < clean.sequences(); ++i) {
      LongConv bad(c);
      const int64_t begin = bad.cu[i], end = bad.cu[i + 1];
      for (Matrix* m : {&bad.u, &bad.dout, &bad.pre_gate, &bad.gate})
        for (int64_t r = begin; r < end; ++r)
          for (int64_t x = 0; x < m->columns; ++x) m->set(r, x, std::nan(""));
      bad.run(threaded());
      for (size_t m = 0; m < clean.row_outputs().size(); ++m) {
        const Matrix &a = *clean.row_outputs()[m], &b = *bad.row_outputs()[m];
        expect_same(a, 0, b, 0, begin, "before");
        expect_same(a, end, b, end, a.rows - end, "after");
      }
      EXPECT_EQ(std::isnan(bad.dk.at(0, 0)), end > begin);
    }
  }
}

TEST(LongConvCpu, NanStaysInItsChannel) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv clean(c);
    clean.run();
    for (const int channel : {0, 7, 18}) {
      LongConv bad(c);
      const double poison = channel == 7 ? std::numeric_limits<double>::infinity() : std::nan("");
      for (Matrix* m : {&bad.u, &bad.dout})
        for (int64_t r = 0; r < bad.cu.back(); ++r)
          m->dtype == Dtype::f16 || m->dtype == Dtype::bf16 ? m->set(r, channel, std::nan(""))
                                                            : m->set(r, channel, poison);
      bad.k.set(channel, 1, poison), bad.D.set(0, channel, poison);
      bad.run();
      const auto expect_others = [&](const Matrix& a, const Matrix& b, bool channels_are_rows) {
        for (int64_t r = 0; r < a.rows; ++r)
          for (int64_t x = 0; x < a.columns; ++x)
            if ((channels_are_rows ? r : x) != channel) {
              ASSERT_EQ(a.at(r, x), b.at(r, x)) << r << ", " << x;
            }
      };
      for (size_t m = 0; m < clean.row_outputs().size(); ++m)
        expect_others(*clean.row_outputs()[m], *bad.row_outputs()[m], false);
      for (size_t m = 0; m < clean.shared_outputs().size(); ++m)
        expect_others(*clean.shared_outputs()[m], *bad.shared_outputs()[m], clean.shared_outputs()[m] != &clean.dD);
    }
  }
}

// In a short sequence a token leaves alone, bit for bit, what comes before it, whatever it is.
TEST(LongConvCpu, ShortSequencesAreExactlyCausal) {
  for (const Dtype dtype : kDtypes)
    for (const bool reverse : {false, true}) {
      const LongConvCase c{.lengths = {kDirectRows}, .dtype = dtype, .reverse = reverse, .D = true};
      LongConv clean(c);
      clean.run();
      for (const int t : {0, 1, 30, 62, 63}) {
        LongConv late(c);
        const int64_t row = reverse ? kDirectRows - 1 - t : t;
        for (int64_t x = 0; x < late.u.columns; ++x) late.u.set(row, x, std::nan("")), late.k.set(x, t + 1, INFINITY);
        late.run();
        const int64_t begin = reverse ? row + 1 : 0, rows = reverse ? kDirectRows - begin : row;
        expect_same(clean.out, begin, late.out, begin, rows, "out");
        EXPECT_TRUE(std::isnan(late.out.at(row, 0)));
      }
    }
}

// Values after a sequence's end count for nothing: a long filter gives what its first taps give.
TEST(LongConvCpu, TapsBeyondTheSequenceDoNotMatter) {
  LongConv whole({.lengths = {300, 40}, .taps = 1 << 20});
  whole.run();
  for (int64_t j = 300; j < whole.taps; ++j)
    for (int64_t x = 0; x < whole.k.rows; ++x) EXPECT_EQ(whole.dk.at(x, j), 0);
  expect_right(whole);
}

TEST(LongConvCpu, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : malformed_boundaries())
    for (const bool reverse : {false, true}) {
      LongConv v({.lengths = {80, 80, 80, 80, 80}, .after = 9, .reverse = reverse, .D = true, .gate = true});
      v.cu = cu;
      v.run(threaded());
      for (const Matrix* m : v.row_outputs()) EXPECT_TRUE(m->memory.intact());
      for (const Matrix* m : v.shared_outputs()) EXPECT_TRUE(m->memory.intact());
    }
}

}  // namespace
}  // namespace packseq::testing
