// The CPU implementation of the causal convolution, against loops in double.
#include <limits>

#include "conv1d_expect.h"
#include "executors.h"

namespace packseq::testing {
namespace {

// The guarded host memory itself.
void* place(const Matrix& m) { return const_cast<char*>(m.memory.data()) + m.first_byte(); }

void run(Conv& v, const Executor& executor = Executor::serial()) {
  conv1d_forward(v.forward(v.cu.data(), place), executor);
  conv1d_backward(v.backward(v.cu.data(), place), executor);
}

TEST(Conv1dCpu, EveryCase) {
  for (const ConvCase& c : conv_cases()) {
    Conv v(c);
    run(v);
    expect_right(v);
  }
}

TEST(Conv1dCpu, SameBitsWithAnyExecutor) {
  for (const ConvCase& c : conv_cases()) {
    Conv a(c), b(c);
    run(a), run(b, threaded());
    expect_same(a, b);
  }
}

TEST(Conv1dCpu, SameBitsAloneAndPacked) {
  for (const ConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    Conv packed(c);
    run(packed, threaded());
    for (int64_t i = 0; i < packed.sequences(); ++i) {
      Conv one = alone(packed, i);
      run(one);
      expect_same_alone(packed, one, i);
    }
  }
}

TEST(Conv1dCpu, NanStaysInItsSequence) {
  for (const ConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    Conv clean(c);
    run(clean);
    for (int64_t i = 0; i < clean.sequences(); ++i) {
      Conv bad(c);
      poison_sequence(bad, i, std::nan(""));
      run(bad, threaded());
      expect_same_but(clean, bad, i);
      EXPECT_EQ(std::isnan(bad.dweight.at(0, 0)), c.lengths[size_t(i)] > 0);
    }
  }
}

TEST(Conv1dCpu, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : malformed_boundaries()) {
    for (const bool reverse : {false, true}) {
      Conv v({.lengths = {20, 20, 20, 20, 20}, .reverse = reverse});
      v.cu = cu;
      run(v, threaded());
      for (const Matrix* m : v.outputs()) EXPECT_TRUE(m->memory.intact());
    }
  }
}

// Large arguments of the SiLU: no infinity turns up on the way to a finite result.
TEST(Conv1dCpu, LargeValues) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f64}) {
    Conv v({.lengths = {300}, .dtype = dtype});
    std::mt19937 random(3);
    v.x.fill(random, 0, 300, 200);
    run(v);
    expect_right(v, 200);
  }
}

// Sums over many rows keep their accuracy.
TEST(Conv1dCpu, ManyRows) {
  for (const std::vector<int>& lengths : {std::vector<int>{100003}, std::vector<int>(50001, 2)}) {
    Conv v({.lengths = lengths, .channels = 9});
    std::mt19937 random(3);
    for (int64_t r = 0; r < v.x.rows - v.c.slack; ++r)
      for (int64_t c = 0; c < 9; ++c) v.x.set(r, c, 1 + v.x.at(r, c)), v.dout.set(r, c, 1 + v.dout.at(r, c));
    run(v, threaded());
    expect_right(v);
  }
}

// ---- Step ----------------------------------------------------------------------------------------------------------

void step(const Conv& v, Matrix& pool, const std::vector<int32_t>* indices, const Executor& executor) {
  Conv1dProblem p = v.problem(v.cu.data(), place);
  p.initial_states = nullptr;
  conv1d_step({.problem = p,
               .pool = place(pool),
               .slots = pool.rows / v.c.channels,
               .indices = indices ? indices->data() : nullptr,
               .out = place(v.out)},
              executor);
}

TEST(Conv1dCpu, StepIsTheForwardWithStatesInAPool) {
  for (ConvCase c : conv_cases()) {
    SCOPED_TRACE(c.name());
    c.initial = c.final = true;
    Conv want(c), got(c);
    run(want);
    const StepPool pool(got);
    Matrix states = pool.states;
    step(got, states, &pool.indices, threaded());
    pool.expect_right(want, got, states);

    Matrix own = got.initial;
    step(got, own, nullptr, Executor::serial());
    expect_same(want.out, 0, got.out, 0, want.out.rows, "out");
    expect_same(want.final, 0, own, 0, own.rows, "states");
  }
}

TEST(Conv1dCpu, StepWithoutASlotGivesZeros) {
  Conv v({.lengths = {2, 3, 1, 4}});
  Matrix pool = v.initial;
  const std::vector<int32_t> indices = {-1, 4, std::numeric_limits<int32_t>::max(),
                                        std::numeric_limits<int32_t>::min()};
  step(v, pool, &indices, Executor::serial());
  for (int64_t r = 0; r < v.out.rows; ++r)
    for (int64_t c = 0; c < v.out.columns; ++c) ASSERT_EQ(v.out.at(r, c), 0);
  expect_same(pool, 0, v.initial, 0, pool.rows, "pool");
  EXPECT_TRUE(v.out.memory.intact());
}

}  // namespace
}  // namespace packseq::testing
