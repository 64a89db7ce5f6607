// One causal convolution with its tensors, and the loops that say what is right.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "matrix.h"
#include "scan/conv1d.h"

namespace packseq::testing {

struct ConvCase {
  std::vector<int> lengths = {5, 0, 37, 1, 130, 2};
  int channels = 24, width = 4;
  Dtype dtype = Dtype::f32;
  bool reverse = false, silu = true, bias = true, initial = true, final = true;
  int slack = 3;
  int gap = 0;     // elements between the rows of x and dout
  int offset = 0;  // elements that x, dout, out and dx begin after an aligned address

  std::string name() const {
    std::string s = name_of(dtype);
    s += " channels " + std::to_string(channels) + " width " + std::to_string(width) + " sequences " +
         std::to_string(lengths.size()) + (lengths.empty() ? "" : " first " + std::to_string(lengths[0]));
    for (const auto& [on, what] : {std::pair{reverse, " reverse"},
                                   {silu, " silu"},
                                   {bias, " bias"},
                                   {initial, " initial"},
                                   {final, " final"},
                                   {gap > 0, " gap"},
                                   {offset > 0, " offset"}}) {
      if (on) s += what;
    }
    return s;
  }
};

// Every way through the code at least once.
inline std::vector<ConvCase> conv_cases() {
  std::vector<ConvCase> all;
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64}) {
    for (int width = 2; width <= 8; ++width)
      for (const bool reverse : {false, true})
        for (const bool silu : {false, true})
          for (const bool states : {false, true}) {
            ConvCase c{.width = width, .dtype = dtype, .reverse = reverse, .silu = silu};
            c.bias = silu != states, c.initial = states, c.final = states != reverse;
            c.channels = width % 2 ? 40 : 21;
            all.push_back(c);
          }
    for (const int channels : {1, 2, 3, 4, 7, 8, 9, 16, 31, 33, 64, 100, 256, 264, 1031, 2056})
      all.push_back({.lengths = {70, 3, 0, 9}, .channels = channels, .dtype = dtype});
    for (const int offset : {0, 1, 2, 4, 8})
      for (const int gap : {0, 1, 4, 8}) all.push_back({.dtype = dtype, .gap = gap, .offset = offset});
    for (const int length : {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 300, 1000})
      for (const bool reverse : {false, true}) {
        all.push_back({.lengths = {length}, .dtype = dtype, .reverse = reverse});
        all.push_back(
            {.lengths = {1, length, 64, length}, .channels = 8, .width = 8, .dtype = dtype, .reverse = reverse});
      }
    all.push_back({.lengths = {}, .dtype = dtype, .slack = 0});
    all.push_back({.lengths = {}, .dtype = dtype, .slack = 200});
    all.push_back({.lengths = {0, 0, 0}, .dtype = dtype, .slack = 0});
    all.push_back({.lengths = {0, 40, 0, 0, 3, 0}, .dtype = dtype, .slack = 150});
    all.push_back({.lengths = std::vector<int>(500, 1), .channels = 8, .dtype = dtype});
  }
  return all;
}

// The tensors of one call. Inputs' slack rows and gaps hold NaN, and so do outputs before the call. States are
// [sequences * channels, width - 1].
struct Conv {
  ConvCase c;
  std::vector<int32_t> cu;
  Matrix x, dout, weight, bias, initial, dfinal;
  Matrix out, final, dx, dweight, dbias, dinitial;

  explicit Conv(const ConvCase& c_, unsigned seed = 1)
      : c(c_),
        cu(boundaries(c.lengths)),
        x(c.dtype, cu.back() + c.slack, c.channels, c.gap, c.offset),
        dout(c.dtype, x.rows, c.channels, c.gap, c.offset),
        weight(parameter(), c.channels, c.width),
        bias(parameter(), 1, c.channels),
        initial(c.dtype, sequences() * c.channels, c.width - 1),
        dfinal(c.dtype, sequences() * c.channels, c.width - 1),
        out(c.dtype, x.rows, c.channels, 0, c.offset),
        final(c.dtype, initial.rows, c.width - 1),
        dx(c.dtype, x.rows, c.channels, 0, c.offset),
        dweight(parameter(), c.channels, c.width),
        dbias(parameter(), 1, c.channels),
        dinitial(c.dtype, initial.rows, c.width - 1) {
    std::mt19937 random(seed);
    x.fill(random, 0, cu.back());
    dout.fill(random, 0, cu.back());
    weight.fill(random, 0, weight.rows, 0.6);
    bias.fill(random, 0, 1);
    initial.fill(random, 0, initial.rows);
    dfinal.fill(random, 0, dfinal.rows);
  }

  static std::vector<int32_t> boundaries(const std::vector<int>& lengths) { return testing::boundaries(lengths); }
  Dtype parameter() const { return c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
  int64_t sequences() const { return int64_t(cu.size()) - 1; }

  // The calls, on whatever memory `place(matrix)` and cu_seqlens say the matrices have.
  template <class Place>
  Conv1dProblem problem(const int32_t* cu_seqlens, const Place& place) const {
    return {.dtype = c.dtype,
            .total = x.rows,
            .sequences = sequences(),
            .channels = c.channels,
            .width = c.width,
            .cu_seqlens = cu_seqlens,
            .reverse = c.reverse,
            .silu = c.silu,
            .x = {place(x), x.stride},
            .weight = place(weight),
            .bias = c.bias ? place(bias) : nullptr,
            .initial_states = c.initial ? place(initial) : nullptr};
  }
  template <class Place>
  Conv1dForward forward(const int32_t* cu_seqlens, const Place& place) const {
    return {problem(cu_seqlens, place), place(out), c.final ? place(final) : nullptr};
  }
  template <class Place>
  Conv1dBackward backward(const int32_t* cu_seqlens, const Place& place) const {
    return {.problem = problem(cu_seqlens, place),
            .dout = {place(dout), dout.stride},
            .dfinal_states = c.final ? place(dfinal) : nullptr,
            .dx = place(dx),
            .dweight = place(dweight),
            .dbias = c.bias ? place(dbias) : nullptr,
            .dinitial_states = c.initial ? place(dinitial) : nullptr,
            .workspace = nullptr};
  }

  std::vector<Matrix*> all() {
    return {&x, &dout, &weight, &bias, &initial, &dfinal, &out, &final, &dx, &dweight, &dbias, &dinitial};
  }
  // What the calls write.
  std::vector<const Matrix*> outputs() const {
    std::vector<const Matrix*> some = {&out, &dx, &dweight};
    if (c.bias) some.push_back(&dbias);
    if (c.final) some.push_back(&final);
    if (c.initial) some.push_back(&dinitial);
    return some;
  }
};

// Straight from the formulas of conv1d.h, in double.
struct ConvReference {
  std::vector<double> out, final, dx, dweight, dbias, dinitial;

  explicit ConvReference(const Conv& v) : v_(v), channels_(v.c.channels), state_(v.c.width - 1) {
    out.resize(size_t(v.x.rows * channels_)), dx = out;
    final.resize(size_t(v.initial.rows * state_)), dinitial = final;
    dweight.resize(size_t(channels_ * v.c.width)), dbias.resize(size_t(channels_));
    for (int64_t i = 0; i < v.sequences(); ++i)
      for (int64_t c = 0; c < channels_; ++c) channel(i, c);
  }

 private:
  // Values and gradients at the times -(width - 1) ... of one channel of one sequence: element j is time
  // j - (width - 1).
  void channel(int64_t i, int64_t c) {
    const int64_t begin = v_.cu[i], length = v_.cu[i + 1] - begin, states = i * channels_ + c;
    const auto row = [&](int64_t t) { return v_.c.reverse ? begin + length - 1 - t : begin + t; };
    std::vector<double> value(size_t(state_ + length)), gradient(value.size());
    for (int64_t j = 0; j < state_; ++j) value[j] = v_.c.initial ? v_.initial.at(states, j) : 0;
    for (int64_t t = 0; t < length; ++t) value[state_ + t] = v_.x.at(row(t), c);
    for (int64_t j = 0; j < state_; ++j) {
      final[states * state_ + j] = value[length + j];
      if (v_.c.final) gradient[length + j] = v_.dfinal.at(states, j);
    }
    for (int64_t t = 0; t < length; ++t) {
      double pre = v_.c.bias ? v_.bias.at(0, c) : 0;
      for (int64_t k = 0; k <= state_; ++k) pre += v_.weight.at(c, k) * value[t + k];
      const double sigmoid = 1 / (1 + std::exp(-pre));
      out[row(t) * channels_ + c] = v_.c.silu ? pre * sigmoid : pre;
      const double dpre = v_.dout.at(row(t), c) * (v_.c.silu ? sigmoid * (1 + pre * (1 - sigmoid)) : 1);
      for (int64_t k = 0; k <= state_; ++k) {
        gradient[t + k] += v_.weight.at(c, k) * dpre;
        dweight[c * (state_ + 1) + k] += dpre * value[t + k];
      }
      dbias[c] += dpre;
    }
    for (int64_t j = 0; j < state_; ++j) dinitial[states * state_ + j] = gradient[j];
    for (int64_t t = 0; t < length; ++t) dx[row(t) * channels_ + c] = gradient[state_ + t];
  }

  const Conv& v_;
  int64_t channels_, state_;
};

}  // namespace packseq::testing
