// The filters on the CPU, against references in long double and their central differences.
#include <gtest/gtest.h>

#include <cmath>

#include "executors.h"
#include "filters_case.h"

namespace packseq::testing {
namespace {

Arrays arrays_of(const WideArrays& inputs, Dtype t) {
  Arrays arrays;
  for (const WideArray& x : inputs) arrays.emplace_back(t, x);
  return arrays;
}

struct Results {
  Array out;
  Arrays gradients;
};

WideArray dout_of(const Operator& op, Dtype t) {
  std::mt19937 random(9);
  return rounded(normal(random, op.out_size), t);
}

Results run(const Operator& op, Dtype t, const WideArrays& inputs, const Executor& executor = Executor::serial()) {
  Arrays in = arrays_of(inputs, t), gradients;
  for (const Array& x : in) gradients.emplace_back(t, x.size);
  Array out(t, op.out_size), dout(t, dout_of(op, t));
  op.forward(t, in, out, executor);
  op.backward(t, in, dout, gradients, executor);
  for (const Array* a : {&out, &dout}) EXPECT_TRUE(a->memory.intact());
  for (const Array& a : gradients) EXPECT_TRUE(a.memory.intact());
  return {out, gradients};
}

WideArrays rounded_inputs(const Operator& op, Dtype t) {
  WideArrays inputs;
  for (const WideArray& x : op.inputs) inputs.push_back(rounded(x, t));
  return inputs;
}

// Every element, by the array's largest; where all cancel to little, by that of the inputs.
void expect_close(const Array& got, const WideArray& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size, want.size()) << what;
  Wide scale = 0.5;
  for (Wide x : want) scale = std::max(scale, std::abs(x));
  double worst = 0;
  for (size_t i = 0; i < got.size; ++i) {
    const double error = double(std::abs(got[i] - want[i]));
    ASSERT_FALSE(std::isnan(error)) << what << " at " << i << ": got " << got[i] << ", want " << double(want[i]);
    if (error > worst) worst = error;
    ASSERT_LE(error, tolerance * double(scale)) << what << " at " << i << ": got " << got[i] << ", want "
                                                << double(want[i]) << ", the largest is " << double(scale);
  }
}

void expect_same(const Array& a, const Array& b, const std::string& what) {
  EXPECT_EQ(std::memcmp(a.memory.data(), b.memory.data(), a.memory.bytes()), 0) << what;
}

void expect_same(const Results& a, const Results& b) {
  expect_same(a.out, b.out, "out");
  for (size_t i = 0; i < a.gradients.size(); ++i) expect_same(a.gradients[i], b.gradients[i], "gradient");
}

std::vector<Operator> small_operators() {
  std::vector<Operator> all;
  for (const bool conjugate : {false, true}) {
    for (const Sizes& s : {Sizes{1, 1, 1, 1, conjugate}, Sizes{2, 2, 5, 3, conjugate}, Sizes{9, 1, 17, 2, conjugate},
                           Sizes{3, 3, 11, 9, conjugate}}) {
      all.push_back(cauchy_operator(s));
      all.push_back(vandermonde_operator(s));
      all.push_back(transpose_operator(s));
    }
  }
  for (const int rank : {0, 1, 2})
    for (const S4Sizes& s : {S4Sizes{1, 1, 2, 1, rank}, S4Sizes{1, 2, 8, 3, rank}, S4Sizes{5, 1, 9, 2, rank}}) {
      all.push_back(s4_operator(s));
    }
  return all;
}

std::vector<Operator> operators() {
  std::vector<Operator> all = small_operators();
  for (const bool conjugate : {false, true}) {
    for (const Sizes& s :
         {Sizes{1, 3, 489, 32, conjugate}, Sizes{2, 1, 1047, 100, conjugate}, Sizes{1, 2, 3500, 7, conjugate}}) {
      all.push_back(cauchy_operator(s));
      all.push_back(vandermonde_operator(s));
      all.push_back(transpose_operator(s));
    }
  }
  for (const int rank : {0, 1, 2}) all.push_back(s4_operator({2, 2, 1100, 8, rank}));
  return all;
}

double tolerance(const Operator& op, Dtype t) { return op.condition * (t == Dtype::f64 ? 64 * 0x1p-53 : 1e-6); }

TEST(FiltersCpu, ForwardIsRight) {
  for (const Operator& op : operators())
    for (const Dtype t : {Dtype::f64, Dtype::f32}) {
      SCOPED_TRACE(op.name + " " + name_of(t));
      const WideArrays inputs = rounded_inputs(op, t);
      expect_close(run(op, t, inputs).out, op.reference(inputs), tolerance(op, t), "out");
    }
}

// Gradients of the sum of dout times out, each array's first `most`, by central differences of the reference.
void expect_differences(const Operator& op, WideArrays inputs, const Arrays& gradients, size_t most, double tolerance) {
  const WideArray dout = dout_of(op, Dtype::f64);
  for (size_t which = 0; which < inputs.size(); ++which) {
    Wide scale = 0;
    for (size_t i = 0; i < gradients[which].size; ++i) scale = std::max<Wide>(scale, std::abs(gradients[which][i]));
    for (size_t i = 0; i < std::min(most, gradients[which].size); ++i) {
      const Wide at = inputs[which][i], step = 1e-8L;
      const auto value = [&](Wide x) {
        inputs[which][i] = x;
        const WideArray out = op.reference(inputs);
        Wide sum = 0;
        for (size_t j = 0; j < out.size(); ++j) sum += dout[j] * out[j];
        return sum;
      };
      const Wide want = (value(at + step) - value(at - step)) / (2 * step);
      inputs[which][i] = at;
      EXPECT_NEAR(gradients[which][i], double(want), tolerance * double(scale)) << "gradient " << which << " at " << i;
    }
  }
}

TEST(FiltersCpu, GradientsAreTheReferencesDifferences) {
  for (const Operator& op : small_operators()) {
    SCOPED_TRACE(op.name);
    const WideArrays inputs = rounded_inputs(op, Dtype::f64);
    expect_differences(op, inputs, run(op, Dtype::f64, inputs).gradients, 1000, 1e-8);
  }
}

void expect_gradients_as_in_double(const Operator& op) {
  const WideArrays inputs = rounded_inputs(op, Dtype::f32);
  const Results got = run(op, Dtype::f32, inputs);
  Arrays in = arrays_of(inputs, Dtype::f64), want;
  for (const Array& x : in) want.emplace_back(Dtype::f64, x.size);
  Array dout(Dtype::f64, dout_of(op, Dtype::f32));
  op.backward(Dtype::f64, in, dout, want, Executor::serial());
  for (size_t i = 0; i < want.size(); ++i) {
    expect_close(got.gradients[i], want[i].wide(), 2e-6 * op.condition, "gradient " + std::to_string(i));
  }
}

TEST(FiltersCpu, SingleGradientsAreThoseInDouble) {
  for (const Operator& op : operators()) {
    SCOPED_TRACE(op.name);
    expect_gradients_as_in_double(op);
  }
}

TEST(FiltersCpu, SameBitsWithAnyExecutor) {
  for (const Operator& op : operators())
    for (const Dtype t : {Dtype::f64, Dtype::f32}) {
      SCOPED_TRACE(op.name + " " + name_of(t));
      expect_same(run(op, t, op.inputs), run(op, t, op.inputs, threaded()));
    }
}

// Rows longer than a segment, whose sums come in parts.
TEST(FiltersCpu, LongRows) {
  for (const bool conjugate : {false, true}) {
    const Sizes nodes = {1, 2, 17000, 2, conjugate}, steps = {2, 1, 60001, 3, conjugate};
    for (const Operator& op : {cauchy_operator(nodes), vandermonde_operator(steps), transpose_operator(steps),
                               s4_operator({1, 1, 33001, 1, 1})}) {
      SCOPED_TRACE(op.name);
      for (const Dtype t : {Dtype::f64, Dtype::f32}) {
        const WideArrays inputs = rounded_inputs(op, t);
        const Results got = run(op, t, inputs);
        expect_close(got.out, op.reference(inputs), tolerance(op, t), "out");
        expect_same(got, run(op, t, inputs, threaded()));
        if (t == Dtype::f64) expect_differences(op, inputs, got.gradients, 1, 1e-7);
      }
      expect_gradients_as_in_double(op);
    }
  }
}

// A filter of one step has one frequency.
TEST(FiltersCpu, S4OfOneStep) {
  for (const int rank : {0, 1, 2}) {
    const Operator op = s4_operator({2, 3, 1, 4, rank});
    expect_close(run(op, Dtype::f64, op.inputs).out, op.reference(rounded_inputs(op, Dtype::f64)),
                 tolerance(op, Dtype::f64), "out");
  }
}

// One of S4's rows, as long as they come: errors are the float's, not the angle's.
TEST(FiltersCpu, VandermondeIsAccurateAtGreatLengths) {
  for (const auto& [length, poles] : {std::pair<int64_t, int>{16384, 64}, {262144, 16}, {1048576, 4}})
    for (const Dtype t : {Dtype::f32, Dtype::f64}) {
      SCOPED_TRACE(std::to_string(length) + " " + name_of(t));
      std::mt19937 random(12);
      const Sizes s = {1, 1, length, poles, true};
      const double decay = 1.0 / double(length);
      const WideArray v = rounded(normal(random, s.grouped()), t);
      WideArray x = rounded(stable_poles(random, 1, poles, decay, 3.0 / poles), t);
      x[0] = 0, x[1] = Array(t, WideArray{3.14159})[0];  // on the circle's edge, and fast
      Arrays in = arrays_of({v, x}, t);
      Array out(t, s.series());
      vandermonde_forward({problem_of(s, t, in[1]), in[0].data(), out.data()}, threaded());
      Wide scale = 0, error = 0;
      for (int64_t l = 0; l < length; l += l < length - 3000 ? 97 : 1) {
        Wide want = 0;
        for (size_t n = 0; n < size_t(poles); ++n) want += 2 * (number(v, n) * power(x, n, l)).real();
        scale = std::max(scale, std::abs(want)), error = std::max(error, std::abs(want - out[size_t(l)]));
      }
      for (size_t i = 0; i < out.size; ++i) ASSERT_TRUE(std::isfinite(out[i])) << i;
      EXPECT_LE(double(error / scale), t == Dtype::f32 ? 1e-6 : 64 * 0x1p-53);
    }
}

TEST(FiltersCpu, VandermondeOverflowsWhereTheTruthDoes) {
  for (const Dtype t : {Dtype::f32, Dtype::f64}) {
    const Sizes s = {1, 1, 100000, 2, true};
    const Wide x = rounded({0.01}, t)[0], largest = t == Dtype::f32 ? 3.4028234e38L : 1.7976931348623157e308L;
    Arrays in = arrays_of({{1, 0, 0, 0}, {x, 0, -30, 0}}, t);
    Array out(t, s.series());
    vandermonde_forward({problem_of(s, t, in[1]), in[0].data(), out.data()}, Executor::serial());
    for (int64_t l = 0; l < s.length; ++l) {
      const Wide want = 2 * std::exp(x * Wide(l));
      if (want < 0.99L * largest) {
        ASSERT_NEAR(out[size_t(l)] / double(want), 1, 1e-6) << l;
      } else if (want > 1.01L * largest) {
        ASSERT_FALSE(std::isfinite(out[size_t(l)])) << l;
      }
    }
  }
}

// A pole that decays at once, or hardly at all.
TEST(FiltersCpu, VandermondeUnderflowsQuietly) {
  for (const Dtype t : {Dtype::f32, Dtype::f64}) {
    const Sizes s = {1, 1, 5000, 3, false};
    const WideArrays inputs = {{1, 2, 1, -1, 0.5, 0}, {-700, 1, -1e30, 0, -1e-30, 0}};
    Operator op = vandermonde_operator(s);
    const WideArrays in = {rounded(inputs[0], t), rounded(inputs[1], t)};
    expect_close(run(op, t, in).out, op.reference(in), tolerance(op, t), "out");
  }
}

// NaN in one row leaves the others' bits alone.
TEST(FiltersCpu, NanStaysInItsRow) {
  for (const bool conjugate : {false, true}) {
    const Sizes s = {2, 3, 300, 5, conjugate};
    for (const Operator& op :
         {cauchy_operator(s), vandermonde_operator(s), transpose_operator(s), s4_operator({2, 3, 300, 5, 2})}) {
      SCOPED_TRACE(op.name);
      const Results clean = run(op, Dtype::f32, op.inputs);
      WideArrays inputs = op.inputs;
      const bool s4 = inputs.size() == 5;
      const size_t w = s4 ? 0 : inputs.size() - 1, row = inputs[w].size() / 3;
      for (size_t i = row; i < 2 * row; ++i) inputs[w][i] = std::nan("");
      const Results bad = run(op, Dtype::f32, inputs, threaded());
      const size_t width = op.out_size / 6;  // of a group's row
      for (size_t i = 0; i < op.out_size; ++i) {
        if (i / width % 3 == 1) {
          ASSERT_TRUE(std::isnan(bad.out[i])) << i;
        } else {
          ASSERT_EQ(bad.out[i], clean.out[i]) << i;
        }
      }
      for (size_t i = 0; i < 3 * row; ++i) {
        if (i / row == 1) continue;
        ASSERT_EQ(bad.gradients[w][i], clean.gradients[w][i]) << i;
      }
    }
  }
}

TEST(FiltersCpu, NothingIsNothing) {
  for (const bool conjugate : {false, true}) {
    for (const Sizes& s : {Sizes{1, 2, 0, 3, conjugate}, Sizes{1, 0, 5, 3, conjugate}, Sizes{0, 2, 5, 3, conjugate}}) {
      for (const Operator& op : {cauchy_operator(s), vandermonde_operator(s), transpose_operator(s)}) {
        SCOPED_TRACE(op.name);
        const Results got = run(op, Dtype::f32, op.inputs, threaded());
        for (const Array& d : got.gradients)
          for (size_t i = 0; i < d.size; ++i) ASSERT_EQ(d[i], 0);
        for (size_t i = 0; i < got.out.size; ++i) ASSERT_EQ(got.out[i], 0);
      }
    }
  }
  run(s4_operator({1, 0, 8, 3, 1}), Dtype::f32, s4_operator({1, 0, 8, 3, 1}).inputs);
}

// Gradients that nobody wants are left out and change none of the others.
TEST(FiltersCpu, SomeGradients) {
  const Sizes s = {2, 3, 700, 5, true};
  const Operator cauchy = cauchy_operator(s), vandermonde = vandermonde_operator(s);
  const Results all = run(cauchy, Dtype::f32, cauchy.inputs), both = run(vandermonde, Dtype::f32, vandermonde.inputs);
  Arrays in = arrays_of(cauchy.inputs, Dtype::f32), x = arrays_of(vandermonde.inputs, Dtype::f32);
  Array dout(Dtype::f32, dout_of(cauchy, Dtype::f32)), douts(Dtype::f32, dout_of(vandermonde, Dtype::f32));
  Arrays d = all.gradients, dx = both.gradients;
  for (int which = 0; which < 3; ++which) {
    Array one(Dtype::f32, d[size_t(which)].size);
    CauchyBackward b = {
        {Dtype::f32, true, s.groups, s.rows, s.length, s.poles, in[0].data(), in[1].data(), in[2].data()},
        dout.data(),
        nullptr,
        nullptr,
        nullptr,
        nullptr};
    (which == 0 ? b.dv : which == 1 ? b.dz : b.dw) = one.data();
    cauchy_backward(b, threaded());
    expect_same(one, d[size_t(which)], "cauchy");
  }
  for (int which = 0; which < 2; ++which) {
    Array one(Dtype::f32, dx[size_t(which)].size);
    VandermondeBackward b = {problem_of(s, Dtype::f32, x[1]), x[0].data(), douts.data(), nullptr, nullptr, nullptr};
    (which == 0 ? b.dv : b.dx) = one.data();
    vandermonde_backward(b, threaded());
    expect_same(one, dx[size_t(which)], "vandermonde");
  }
}

}  // namespace
}  // namespace packseq::testing
