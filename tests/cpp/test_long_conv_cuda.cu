// The long convolution on the GPU, against sums taken one after another in double.
#include <map>
#include <memory>

#include "conv1d_expect.h"
#include "device_array.cuh"
#include "longconv/longconv.h"

namespace packseq::testing {
namespace {

class LongConvCuda : public GpuTest {};

struct LongCase {
  std::vector<int> lengths = {5, 0, 65, 1, 300, 64, 2};
  int channels = 5, taps = 300, taps_after = 0;
  Dtype dtype = Dtype::f32;
  bool reverse = false, pre_gate = false, gate = false, D = false;
  int slack = 3, gap = 0, offset = 0;

  std::string name() const {
    std::string s = name_of(dtype);
    s += " channels " + std::to_string(channels) + " taps " + std::to_string(taps) + " and " +
         std::to_string(taps_after) + " lengths";
    for (size_t i = 0; i < std::min<size_t>(lengths.size(), 8); ++i) s += " " + std::to_string(lengths[i]);
    for (const auto& [on, what] : {std::pair{reverse, " reverse"},
                                   {pre_gate, " pre_gate"},
                                   {gate, " gate"},
                                   {D, " D"},
                                   {gap > 0, " gap"},
                                   {offset > 0, " offset"}}) {
      if (on) s += what;
    }
    return s;
  }
};

// The tensors of one call. Inputs' slack rows and gaps hold NaN, and so do outputs before the call.
struct LongConv {
  LongCase c;
  std::vector<int32_t> cu;
  Matrix u, pre_gate, gate, dout, k, k_after, D;
  Matrix out, du, dpre_gate, dgate, dk, dk_after, dD;

  explicit LongConv(const LongCase& c_, unsigned seed = 1)
      : c(c_),
        cu(Conv::boundaries(c.lengths)),
        u(c.dtype, cu.back() + c.slack, c.channels, c.gap, c.offset),
        pre_gate(c.dtype, u.rows, c.channels, c.gap, c.offset),
        gate(c.dtype, u.rows, c.channels, 0, c.offset),
        dout(c.dtype, u.rows, c.channels, c.gap, c.offset),
        k(Dtype::f32, c.channels, c.taps),
        k_after(Dtype::f32, c.channels, c.taps_after),
        D(Dtype::f32, 1, c.channels),
        out(c.dtype, u.rows, c.channels),
        du(c.dtype, u.rows, c.channels),
        dpre_gate(c.dtype, u.rows, c.channels),
        dgate(c.dtype, u.rows, c.channels),
        dk(Dtype::f32, c.channels, c.taps),
        dk_after(Dtype::f32, c.channels, c.taps_after),
        dD(Dtype::f32, 1, c.channels) {
    std::mt19937 random(seed);
    for (Matrix* m : {&u, &pre_gate, &gate, &dout}) m->fill(random, 0, cu.back());
    k.fill(random, 0, k.rows, 0.3), k_after.fill(random, 0, k_after.rows, 0.3), D.fill(random, 0, 1);
  }

  int64_t sequences() const { return int64_t(cu.size()) - 1; }

  template <class Place>
  LongConvProblem problem(const int32_t* cu_seqlens, const Place& place) const {
    return {.dtype = c.dtype,
            .total = u.rows,
            .sequences = sequences(),
            .channels = c.channels,
            .cu_seqlens = cu_seqlens,
            .reverse = c.reverse,
            .u = {place(u), u.stride},
            .pre_gate = {c.pre_gate ? place(pre_gate) : nullptr, pre_gate.stride},
            .gate = {c.gate ? place(gate) : nullptr, gate.stride},
            .k = place(k),
            .k_after = c.taps_after ? place(k_after) : nullptr,
            .taps = c.taps,
            .taps_after = c.taps_after,
            .D = c.D ? place(D) : nullptr};
  }
  std::vector<Matrix*> all() {
    return {&u, &pre_gate, &gate, &dout, &k, &k_after, &D, &out, &du, &dpre_gate, &dgate, &dk, &dk_after, &dD};
  }
  // Per row; then shared.
  std::vector<const Matrix*> row_outputs() const {
    std::vector<const Matrix*> some = {&out, &du};
    if (c.pre_gate) some.push_back(&dpre_gate);
    if (c.gate) some.push_back(&dgate);
    return some;
  }
  std::vector<const Matrix*> shared_outputs() const {
    std::vector<const Matrix*> some = {&dk};
    if (c.taps_after) some.push_back(&dk_after);
    if (c.D) some.push_back(&dD);
    return some;
  }
};

// A call's matrices on the GPU, at the same offsets.
class OnDevice {
 public:
  explicit OnDevice(LongConv& v) : cu_(v.cu) {
    for (Matrix* m : v.all()) {
      const std::vector<char> bytes(m->memory.data(), m->memory.data() + m->memory.bytes());
      arrays_[m] = std::make_unique<DeviceArray<char>>(bytes);
    }
  }
  void* operator()(const Matrix& m) const { return arrays_.at(&m)->data() + m.first_byte(); }
  const int32_t* cu() const { return cu_.data(); }
  void fetch(const Matrix& m) const {
    const std::vector<char> bytes = arrays_.at(&m)->values();
    std::memcpy(const_cast<Matrix&>(m).memory.data(), bytes.data(), bytes.size());
  }

 private:
  DeviceArray<int32_t> cu_;
  std::map<const Matrix*, std::unique_ptr<DeviceArray<char>>> arrays_;
};

void run(LongConv& v) {
  const OnDevice device(v);
  const LongConvProblem problem = v.problem(device.cu(), device);
  {
    const DeviceArray<char> workspace(int64_t(long_conv_forward_workspace(problem)));
    long_conv_forward({problem, device(v.out), workspace.data()}, nullptr);
    workspace.values();
  }
  const DeviceArray<char> workspace(int64_t(long_conv_backward_workspace(problem)));
  long_conv_backward({.problem = problem,
                      .dout = {device(v.dout), v.dout.stride},
                      .du = device(v.du),
                      .dpre_gate = v.c.pre_gate ? device(v.dpre_gate) : nullptr,
                      .dgate = v.c.gate ? device(v.dgate) : nullptr,
                      .dk = device(v.dk),
                      .dk_after = v.c.taps_after ? device(v.dk_after) : nullptr,
                      .dD = v.c.D ? device(v.dD) : nullptr,
                      .workspace = workspace.data()},
                     nullptr);
  workspace.values();
  for (const Matrix* m : v.row_outputs()) device.fetch(*m);
  for (const Matrix* m : v.shared_outputs()) device.fetch(*m);
}

// What is right, and for each element how large the numbers are whose rounding it has: of a convolution by Fourier
// transforms, the product of the two signals' norms.
struct Right {
  std::vector<double> want, size;

  explicit Right(const Matrix& m) : want(size_t(m.rows * m.columns)), size(want.size()) {}
  void add(int64_t at, double x, double s) { want[size_t(at)] += x, size[size_t(at)] += s; }
};

struct LongReference {
  Right out, du, dpre_gate, dgate, dk, dk_after, dD;

  explicit LongReference(const LongConv& v)
      : out(v.out), du(v.du), dpre_gate(v.dpre_gate), dgate(v.dgate), dk(v.dk), dk_after(v.dk_after), dD(v.dD), v_(v) {
    for (int64_t i = 0; i < v.sequences(); ++i)
      for (int64_t c = 0; c < v.c.channels; ++c) channel(i, c);
  }

 private:
  static double norm(const std::vector<double>& x) {
    double sum = 0;
    for (double value : x) sum += value * value;
    return std::sqrt(sum);
  }

  void channel(int64_t i, int64_t c) {
    const LongCase& o = v_.c;
    const int64_t begin = v_.cu[size_t(i)], length = v_.cu[size_t(i) + 1] - begin, channels = o.channels;
    const auto row = [&](int64_t t) { return o.reverse ? begin + length - 1 - t : begin + t; };
    const int64_t before = std::min<int64_t>(o.taps_after, length - 1), after = std::min<int64_t>(o.taps, length);
    std::vector<double> x, dy, filter;  // filter from lag -before on
    for (int64_t t = 0; t < length; ++t) {
      x.push_back(v_.u.at(row(t), c) * (o.pre_gate ? v_.pre_gate.at(row(t), c) : 1));
      dy.push_back(v_.dout.at(row(t), c) * (o.gate ? v_.gate.at(row(t), c) : 1));
    }
    for (int64_t lag = -before; lag < after; ++lag) {
      filter.push_back(lag >= 0 ? v_.k.at(c, lag) : v_.k_after.at(c, -1 - lag));
    }
    std::vector<double> y(x.size()), dx(x.size()), dfilter(filter.size());
    for (int64_t at = 0; at < int64_t(filter.size()); ++at) {
      const int64_t lag = at - before, from = std::max<int64_t>(0, -lag), to = std::min(length, length - lag);
      double sum = 0;
      for (int64_t s = from; s < to; ++s) {  // t = s + lag
        y[s + lag] += filter[at] * x[s];
        dx[s] += filter[at] * dy[s + lag];
        sum += dy[s + lag] * x[s];
      }
      dfilter[at] = sum;
    }
    const double D = o.D ? v_.D.at(0, c) : 0, size_x = norm(x), size_dy = norm(dy), size_filter = norm(filter);
    double skip = 0;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t at = row(t) * channels + c;
      const double size_y = size_x * size_filter + std::abs(D * x[t]),
                   of_dx = size_dy * size_filter + std::abs(D * dy[t]);
      const double gate = o.gate ? v_.gate.at(row(t), c) : 1, pre = o.pre_gate ? v_.pre_gate.at(row(t), c) : 1;
      const double u = v_.u.at(row(t), c), dout = v_.dout.at(row(t), c);
      y[t] += D * x[t], dx[t] += D * dy[t], skip += dy[t] * x[t];
      out.add(at, gate * y[t], std::abs(gate) * size_y);
      dgate.add(at, dout * y[t], std::abs(dout) * size_y);
      du.add(at, pre * dx[t], std::abs(pre) * of_dx);
      dpre_gate.add(at, u * dx[t], std::abs(u) * of_dx);
    }
    dD.add(c, skip, size_x * size_dy);
    for (int64_t at = 0; at < int64_t(filter.size()); ++at) {
      const int64_t lag = at - before;
      if (lag >= 0) {
        dk.add(c * o.taps + lag, dfilter[at], 0);
      } else {
        dk_after.add(c * o.taps_after - 1 - lag, dfilter[at], 0);
      }
    }
    for (int64_t j = 0; j < o.taps; ++j) dk.add(c * o.taps + j, 0, size_x * size_dy);
    for (int64_t j = 0; j < o.taps_after; ++j) dk_after.add(c * o.taps_after + j, 0, size_x * size_dy);
  }

  const LongConv& v_;
};

double worst = 0;  // error over size, of float32

void expect_near(const Matrix& got, const Right& right, const char* what) {
  ASSERT_TRUE(got.memory.intact()) << what << ": written outside";
  const double rounding = got.dtype == Dtype::bf16 ? 1 / 256. : got.dtype == Dtype::f16 ? 1 / 2048. : 6e-8;
  const double least = got.dtype == Dtype::f16 ? 6e-8 : 1e-30;
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.columns; ++c) {
      const size_t at = size_t(r * got.columns + c);
      const double x = got.at(r, c), error = std::abs(x - right.want[at]);
      if (got.dtype == Dtype::f32 && right.size[at] > 0) worst = std::max(worst, error / right.size[at]);
      ASSERT_TRUE(error <= 5e-7 * right.size[at] + rounding * std::abs(right.want[at]) + least)
          << what << " at " << r << ", " << c << ": got " << x << ", want " << right.want[at] << ", of size "
          << right.size[at];
    }
}

void expect_right(const LongConv& v) {
  SCOPED_TRACE(v.c.name());
  const LongReference right(v);
  expect_near(v.out, right.out, "out");
  expect_near(v.du, right.du, "du");
  if (v.c.pre_gate) expect_near(v.dpre_gate, right.dpre_gate, "dpre_gate");
  if (v.c.gate) expect_near(v.dgate, right.dgate, "dgate");
  expect_near(v.dk, right.dk, "dk");
  if (v.c.taps_after) expect_near(v.dk_after, right.dk_after, "dk_after");
  if (v.c.D) expect_near(v.dD, right.dD, "dD");
}

void expect_all_right(const std::vector<LongCase>& cases) {
  for (const LongCase& c : cases) {
    LongConv v(c);
    run(v);
    expect_right(v);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST_F(LongConvCuda, EveryLength) {
  for (const int length : {0,   1,   2,    16,   17,   63,   64,   65,   127,  128,  129,  256,   257,
                           489, 512, 1000, 1024, 1047, 2048, 2049, 4095, 4096, 4097, 5000, 14113, 20000}) {
    const int channels = length > 10000 ? 2 : length > 2000 ? 3 : 9;
    expect_all_right({{.lengths = {length}, .channels = channels, .taps = std::max(length, 1)},
                      {.lengths = {length}, .channels = channels, .taps = length + 70, .taps_after = length + 3}});
    if (HasFatalFailure()) return;
  }
  RecordProperty("worst error over size, in 1e-9", int(worst * 1e9));
}

std::vector<LongCase> option_cases() {
  std::vector<LongCase> all;
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
    for (int bits = 0; bits < 32; ++bits) {
      all.push_back({.lengths = {70, 3, 0, 500, 64, 1100},
                     .channels = bits % 2 ? 5 : 16,
                     .taps = bits % 3 ? 1100 : 40,
                     .taps_after = bits & 1 ? 200 : 0,
                     .dtype = dtype,
                     .reverse = (bits & 2) != 0,
                     .pre_gate = (bits & 4) != 0,
                     .gate = (bits & 8) != 0,
                     .D = (bits & 16) != 0,
                     .gap = bits % 3,
                     .offset = bits % 5});
    }
  return all;
}

TEST_F(LongConvCuda, EveryOption) { expect_all_right(option_cases()); }

TEST_F(LongConvCuda, EveryOptionInBlocks) {
  for (LongCase c : option_cases()) {
    if (c.dtype != Dtype::f32 && (!c.pre_gate || !c.gate)) continue;
    c.lengths = {4200, 30, 9000}, c.channels = 2, c.taps = c.taps_after ? 5000 : 9000;
    c.taps_after = c.taps_after ? 6000 : 0;
    expect_all_right({c});
    if (HasFatalFailure()) return;
  }
}

TEST_F(LongConvCuda, AnyChannels) {
  for (const int channels : {1, 2, 3, 4, 7, 8, 9, 31, 33, 64, 100, 257}) {
    expect_all_right({{.lengths = {20, 90, 0, 600}, .channels = channels, .taps = 100, .taps_after = 7, .D = true}});
    if (HasFatalFailure()) return;
  }
}

TEST_F(LongConvCuda, FewTaps) {
  for (const int taps : {1, 2, 15, 64, 65, 4096, 4097})
    expect_all_right({{.lengths = {40, 100, 5000, 1500}, .channels = 2, .taps = taps, .taps_after = taps}});
}

TEST_F(LongConvCuda, NothingToDo) {
  expect_all_right({{.lengths = {}, .slack = 0},
                    {.lengths = {}, .slack = 200},
                    {.lengths = {0, 0, 0}, .slack = 0},
                    {.lengths = {0, 0, 0}, .D = true, .slack = 5000},
                    {.lengths = {0, 40, 0, 0, 3, 0}, .slack = 9000},
                    {.lengths = {7, 900}, .channels = 0}});
}

TEST_F(LongConvCuda, ManySequences) {
  std::vector<int> ragged;
  for (int i = 0; i < 3000; ++i) ragged.push_back(i * 37 % 90);
  expect_all_right({{.lengths = std::vector<int>(20001, 2), .channels = 3, .taps = 3, .D = true},
                    {.lengths = ragged, .channels = 3, .taps = 100},
                    {.lengths = std::vector<int>(300, 70), .channels = 5, .taps = 100, .taps_after = 2}});
}

TEST_F(LongConvCuda, LargeValues) {
  LongConv v({.lengths = {900, 50}});
  std::mt19937 random(3);
  v.u.fill(random, 0, 950, 1e6), v.dout.fill(random, 0, 950, 1e-6);
  run(v);
  expect_right(v);
}

// Sequences of every class, that begin anywhere.
std::vector<LongCase> packed_long_cases() {
  std::vector<LongCase> all;
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
    for (const bool two_sided : {false, true})
      all.push_back({.lengths = {64, 5, 300, 1, 0, 131, 1700, 17, 4100, 1000, 65, 8500, 2600},
                     .channels = 3,
                     .taps = 5000,
                     .taps_after = two_sided ? 4500 : 0,
                     .dtype = dtype,
                     .reverse = two_sided,
                     .pre_gate = true,
                     .gate = dtype != Dtype::bf16,
                     .D = true});
  return all;
}

void expect_same_rows(const LongConv& a, int64_t row_a, const LongConv& b, int64_t row_b, int64_t rows) {
  for (size_t m = 0; m < a.row_outputs().size(); ++m) {
    expect_same(*a.row_outputs()[m], row_a, *b.row_outputs()[m], row_b, rows, "output");
  }
}

TEST_F(LongConvCuda, SameBitsEveryTime) {
  for (const LongCase& c : packed_long_cases()) {
    SCOPED_TRACE(c.name());
    LongConv a(c), b(c);
    run(a), run(b);
    expect_same_rows(a, 0, b, 0, a.u.rows);
    for (size_t m = 0; m < a.shared_outputs().size(); ++m) {
      const Matrix& x = *a.shared_outputs()[m];
      expect_same(x, 0, *b.shared_outputs()[m], 0, x.rows, "shared");
    }
  }
}

TEST_F(LongConvCuda, SameBitsAloneAndPacked) {
  for (const LongCase& c : packed_long_cases()) {
    SCOPED_TRACE(c.name());
    LongConv packed(c);
    run(packed);
    for (int64_t i = 0; i < packed.sequences(); ++i) {
      LongCase alone = c;
      alone.lengths = {c.lengths[size_t(i)]}, alone.slack = 0;
      LongConv one(alone);
      for (const auto& [to, from] : {std::pair{&one.u, &packed.u},
                                     {&one.pre_gate, &packed.pre_gate},
                                     {&one.gate, &packed.gate},
                                     {&one.dout, &packed.dout}}) {
        copy_rows(*to, 0, *from, packed.cu[size_t(i)], one.u.rows);
      }
      for (const auto& [to, from] :
           {std::pair{&one.k, &packed.k}, {&one.k_after, &packed.k_after}, {&one.D, &packed.D}}) {
        copy_rows(*to, 0, *from, 0, from->rows);
      }
      run(one);
      expect_same_rows(packed, packed.cu[size_t(i)], one, 0, one.u.rows);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(LongConvCuda, NanStaysInItsSequence) {
  for (const LongCase& c : packed_long_cases()) {
    SCOPED_TRACE(c.name());
    LongConv clean(c);
    run(clean);
    for (int64_t i = 0; i < clean.sequences(); ++i) {
      const int64_t begin = clean.cu[size_t(i)], end = clean.cu[size_t(i) + 1];
      for (const double poison : {std::nan(""), double(INFINITY)}) {
        LongConv bad(c);
        for (Matrix* m : {&bad.u, &bad.dout, &bad.gate, &bad.pre_gate})
          for (int64_t r = begin; r < end; ++r)
            for (int64_t channel = 0; channel < c.channels; ++channel) m->set(r, channel, poison);
        run(bad);
        expect_same_rows(clean, 0, bad, 0, begin);
        expect_same_rows(clean, end, bad, end, clean.u.rows - end);
        if (HasFatalFailure()) return;
        if (i % 3) break;
      }
    }
  }
}

TEST_F(LongConvCuda, NanStaysInItsChannel) {
  for (LongCase c : packed_long_cases()) {
    SCOPED_TRACE(c.name());
    c.channels = 10;
    LongConv clean(c), bad(c);
    for (Matrix* m : {&bad.u, &bad.dout, &bad.gate, &bad.pre_gate})
      for (int64_t r = 0; r < bad.cu.back(); ++r) m->set(r, 4, std::nan(""));
    run(clean), run(bad);
    for (size_t m = 0; m < clean.row_outputs().size(); ++m) {
      const Matrix &a = *clean.row_outputs()[m], &b = *bad.row_outputs()[m];
      for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t channel = 0; channel < c.channels; ++channel)
          if (channel != 4) ASSERT_EQ(a.at(r, channel), b.at(r, channel)) << "row " << r << ", channel " << channel;
    }
    for (int64_t channel = 0; channel < c.channels; ++channel)
      for (int64_t j = 0; j < c.taps; ++j)
        if (channel != 4) ASSERT_EQ(clean.dk.at(channel, j), bad.dk.at(channel, j)) << "tap " << j;
  }
}

// In sequences that are summed directly, tokens leave alone what comes before them.
TEST_F(LongConvCuda, ShortSequencesAreCausalExactly) {
  for (const bool reverse : {false, true}) {
    LongConv clean({.lengths = {64}, .reverse = reverse, .D = true}), bad(clean.c);
    const int64_t changed = 33;
    for (int64_t t = changed; t < 64; ++t) bad.u.set(reverse ? 63 - t : t, 1, std::nan(""));
    run(clean), run(bad);
    for (int64_t t = 0; t < 64; ++t) {
      const int64_t row = reverse ? 63 - t : t;
      if (t < changed) {
        EXPECT_EQ(clean.out.at(row, 1), bad.out.at(row, 1)) << t;
      } else {
        EXPECT_TRUE(std::isnan(bad.out.at(row, 1))) << t;
      }
    }
  }
}

// No kernel leaves the tensors or fails to end.
TEST_F(LongConvCuda, MalformedBoundariesStayInside) {
  std::vector<std::vector<int32_t>> all = malformed_boundaries();
  all.push_back({0, 9000, 0, 9000, 0, 9000}), all.push_back({0, 9000, 1, 8999, 2, 70});
  for (const std::vector<int32_t>& cu : all) {
    for (const bool reverse : {false, true}) {
      for (const int length : {20, 1800}) {
        LongConv v({.lengths = {length, length, length, length, length},
                    .channels = 9,
                    .taps = 9000,
                    .taps_after = reverse ? 100 : 0,
                    .dtype = Dtype::bf16,
                    .reverse = reverse,
                    .gate = true});
        v.cu = cu;
        run(v);
      }
    }
  }
}

// More sequences than rows, every other one claiming all of them.
TEST_F(LongConvCuda, OverlappingSequencesStayInside) {
  std::vector<int> lengths(128, 0);
  lengths[0] = 10;
  LongConv v({.lengths = lengths, .channels = 33, .taps = 12, .slack = 0});
  for (size_t i = 0; i < v.cu.size(); ++i) v.cu[i] = i % 2 ? 10 : 0;
  run(v);
}

// The blocks that chips with little shared memory get.
TEST_F(LongConvCuda, LengthsInSmallBlocks) {
  setenv("PACKSEQ_SMALL_TILES", "1", 1);
  expect_all_right(option_cases());
  expect_all_right({{.lengths = {900, 2500, 64, 5000}, .channels = 5, .taps = 5000}});
  LongConv v({.lengths = std::vector<int>(128, 0), .channels = 33, .taps = 12, .slack = 10});
  for (size_t i = 0; i < v.cu.size(); ++i) v.cu[i] = i % 2 ? 10 : 0;
  run(v);
  unsetenv("PACKSEQ_SMALL_TILES");
}

// A recorded call follows the boundaries that it finds.
TEST_F(LongConvCuda, RecordedCallsFollowTheBoundaries) {
  LongConv v({.lengths = {5000, 64, 300}, .channels = 3, .taps = 5000, .slack = 0});
  const OnDevice device(v);
  const LongConvProblem problem = v.problem(device.cu(), device);
  const DeviceArray<char> workspace(int64_t(long_conv_forward_workspace(problem)));
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t recorded;
  check_cuda(cudaStreamCreate(&stream), "stream");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  long_conv_forward({problem, device(v.out), workspace.data()}, stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&recorded, graph, 0), "graph");
  for (const std::vector<int>& lengths : {std::vector<int>{5000, 64, 300}, {1, 5000, 363}, {2000, 2000, 1364}}) {
    LongCase c = v.c;
    c.lengths = lengths;
    LongConv want(c);
    run(want);
    check_cuda(cudaMemcpy(const_cast<int32_t*>(device.cu()), want.cu.data(), want.cu.size() * sizeof(int32_t),
                          cudaMemcpyHostToDevice),
               "copy");
    check_cuda(cudaGraphLaunch(recorded, stream), "graph");
    check_cuda(cudaStreamSynchronize(stream), "graph");
    device.fetch(v.out);
    expect_same(want.out, 0, v.out, 0, v.out.rows, "out");
  }
  check_cuda(cudaGraphExecDestroy(recorded), "graph");
  check_cuda(cudaGraphDestroy(graph), "graph");
  check_cuda(cudaStreamDestroy(stream), "stream");
}

}  // namespace
}  // namespace packseq::testing
