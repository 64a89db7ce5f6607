// One long convolution with its tensors, the sums that say what is right, and what every implementation must give.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "longconv/longconv.h"
#include "matrix.h"

namespace packseq::testing {

inline constexpr int kMoreTaps = 1 << 20;  // three more than the longest sequence has rows

struct LongConvCase {
  std::vector<int> lengths = {5, 0, 70, 1, 300, 64, 130, 2, 65};
  int channels = 5, taps = kMoreTaps, taps_after = 0;
  Dtype dtype = Dtype::f32;
  bool reverse = false, pre_gate = false, gate = false, D = false;
  int slack = 3;
  int gap = 0;     // elements between the rows of u, dout and pre_gate; twice as many between gate's
  int offset = 0;  // elements that they, out and the gradients begin after an aligned address

  std::string name() const {
    std::string s = name_of(dtype);
    s += " channels " + std::to_string(channels) + " taps " + std::to_string(taps) + " and " +
         std::to_string(taps_after) + ", " + std::to_string(lengths.size()) + " lengths";
    for (size_t i = 0; i < std::min<size_t>(lengths.size(), 8); ++i) s.append(" ").append(std::to_string(lengths[i]));
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

  // The same with numbers of taps for kMoreTaps.
  LongConvCase with_taps() const {
    LongConvCase c = *this;
    const int more = 3 + (lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end()));
    for (int* const count : {&c.taps, &c.taps_after}) *count = *count == kMoreTaps ? more : *count;
    return c;
  }
};

// The tensors of one call. Inputs' slack rows and gaps hold NaN, and so do outputs before the call.
struct LongConv {
  LongConvCase c;
  std::vector<int32_t> cu;
  Matrix u, pre_gate, gate, dout, k, k_after, D;
  Matrix out, du, dpre_gate, dgate, dk, dk_after, dD;

  explicit LongConv(const LongConvCase& c_)
      : c(c_.with_taps()),
        cu(boundaries(c.lengths)),
        u(c.dtype, cu.back() + c.slack, c.channels, c.gap, c.offset),
        pre_gate(u),
        gate(c.dtype, u.rows, c.channels, 2 * c.gap, c.offset),
        dout(u),
        k(parameter(), c.channels, c.taps),
        k_after(parameter(), c.channels, c.taps_after),
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
    k.fill(random, 0, k.rows, 0.3), k_after.fill(random, 0, k_after.rows, 0.3), D.fill(random, 0, 1);
  }

  int64_t sequences() const { return int64_t(cu.size()) - 1; }
  Dtype parameter() const { return c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

  // The calls, on whatever memory `place(matrix)` and cu_seqlens say the matrices have.
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
  template <class Place>
  LongConvForward forward(const int32_t* cu_seqlens, const Place& place) const {
    return {.problem = problem(cu_seqlens, place), .out = place(out), .workspace = nullptr};
  }
  template <class Place>
  LongConvBackward backward(const int32_t* cu_seqlens, const Place& place) const {
    return {.problem = problem(cu_seqlens, place),
            .dout = {place(dout), dout.stride},
            .du = place(du),
            .dpre_gate = c.pre_gate ? place(dpre_gate) : nullptr,
            .dgate = c.gate ? place(dgate) : nullptr,
            .dk = place(dk),
            .dk_after = c.taps_after ? place(dk_after) : nullptr,
            .dD = c.D ? place(dD) : nullptr,
            .workspace = nullptr};
  }

  std::vector<Matrix*> all() {
    return {&u, &pre_gate, &gate, &dout, &k, &k_after, &D, &out, &du, &dpre_gate, &dgate, &dk, &dk_after, &dD};
  }
  // What the calls write: of rows, and what sequences share.
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
  std::vector<const Matrix*> outputs() const {
    std::vector<const Matrix*> all = row_outputs();
    for (const Matrix* m : shared_outputs()) all.push_back(m);
    return all;
  }
};

// What is right, and for each element how large the numbers are whose rounding it has: of a convolution by Fourier
// transforms, the product of the two signals' norms.
struct Right {
  std::vector<double> want, size;

  explicit Right(const Matrix& m) : want(size_t(m.rows * m.columns)), size(want.size()) {}
  void add(int64_t at, double x, double s) { want[size_t(at)] += x, size[size_t(at)] += s; }
};

// Straight from the formulas of longconv.h, in double.
struct LongConvReference {
  Right out, du, dpre_gate, dgate, dk, dk_after, dD;

  explicit LongConvReference(const LongConv& v)
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
    const LongConvCase& o = v_.c;
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

inline void expect_near(const Matrix& got, const Right& right, const char* what) {
  ASSERT_TRUE(got.memory.intact()) << what << ": written outside";
  const double exact = got.dtype == Dtype::f64 ? 5e-7 * 0x1p-29 : 5e-7;
  const double rounding = got.dtype == Dtype::bf16  ? 1 / 256.
                          : got.dtype == Dtype::f16 ? 1 / 2048.
                          : got.dtype == Dtype::f32 ? 0x1p-24
                                                    : 0x1p-53;
  const double least = got.dtype == Dtype::f16 ? 6e-8 : 1e-30;
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.columns; ++c) {
      const size_t at = size_t(r * got.columns + c);
      const double x = got.at(r, c), error = std::abs(x - right.want[at]);
      ASSERT_TRUE(error <= exact * right.size[at] + rounding * std::abs(right.want[at]) + least)
          << what << " at " << r << ", " << c << ": got " << x << ", want " << right.want[at] << ", of size "
          << right.size[at];
    }
}

inline void expect_right(const LongConv& v) {
  SCOPED_TRACE(v.c.name());
  const LongConvReference right(v);
  expect_near(v.out, right.out, "out");
  expect_near(v.du, right.du, "du");
  if (v.c.pre_gate) expect_near(v.dpre_gate, right.dpre_gate, "dpre_gate");
  if (v.c.gate) expect_near(v.dgate, right.dgate, "dgate");
  expect_near(v.dk, right.dk, "dk");
  if (v.c.taps_after) expect_near(v.dk_after, right.dk_after, "dk_after");
  if (v.c.D) expect_near(v.dD, right.dD, "dD");
}

inline void expect_same_rows(const LongConv& a, int64_t row_a, const LongConv& b, int64_t row_b, int64_t rows) {
  for (size_t m = 0; m < a.row_outputs().size(); ++m) {
    expect_same(*a.row_outputs()[m], row_a, *b.row_outputs()[m], row_b, rows, "rows");
  }
}

inline void expect_same(const LongConv& a, const LongConv& b) {
  SCOPED_TRACE(a.c.name());
  for (size_t m = 0; m < a.outputs().size(); ++m) {
    expect_same(*a.outputs()[m], 0, *b.outputs()[m], 0, a.outputs()[m]->rows, "output");
  }
}

// The rows of the sequences other than `except`.
inline void expect_same_but(const LongConv& a, const LongConv& b, int64_t except) {
  const int64_t begin = a.cu[size_t(except)], end = a.cu[size_t(except) + 1];
  expect_same_rows(a, 0, b, 0, begin), expect_same_rows(a, end, b, end, a.u.rows - end);
}

// Sequence i alone, with the packed one's inputs.
inline LongConv alone(const LongConv& packed, int64_t i) {
  LongConvCase c = packed.c;
  c.lengths = {c.lengths[size_t(i)]}, c.slack = 0;
  LongConv one(c);
  for (const auto& [to, from] : {std::pair{&one.u, &packed.u},
                                 {&one.pre_gate, &packed.pre_gate},
                                 {&one.gate, &packed.gate},
                                 {&one.dout, &packed.dout}}) {
    copy_rows(*to, 0, *from, packed.cu[size_t(i)], one.u.rows);
  }
  one.k = packed.k, one.k_after = packed.k_after, one.D = packed.D;
  return one;
}

// Rows of u, dout and the gates become `poison`, in one channel or in all.
inline void poison_rows(LongConv& v, int64_t begin, int64_t end, double poison, int64_t only_channel = -1) {
  for (Matrix* m : {&v.u, &v.dout, &v.pre_gate, &v.gate})
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < m->columns; ++c)
        if (only_channel < 0 || c == only_channel) m->set(r, c, poison);
}

// Everything but what belongs to one channel: of rows a column, of filters' gradients a row.
inline void expect_same_but_channel(const LongConv& a, const LongConv& b, int64_t except) {
  const auto outputs_a = a.outputs(), outputs_b = b.outputs();
  for (size_t m = 0; m < outputs_a.size(); ++m) {
    const Matrix &x = *outputs_a[m], &y = *outputs_b[m];
    const bool filter = outputs_a[m] == &a.dk || outputs_a[m] == &a.dk_after;
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.columns; ++c)
        if ((filter ? r : c) != except) {
          ASSERT_EQ(x.at(r, c), y.at(r, c)) << r << ", " << c;
        }
  }
}

}  // namespace packseq::testing
