// The causal convolution on the GPU, against loops in double.
#include "conv1d_expect.h"
#include "device_matrices.cuh"

namespace packseq::testing {
namespace {

class Conv1dCuda : public GpuTest {};

void run(Conv& v) {
  const OnDevice device(v);
  conv1d_forward(v.forward(device.cu(), device), nullptr);
  Conv1dBackward b = v.backward(device.cu(), device);
  const DeviceArray<char> workspace(int64_t(conv1d_backward_workspace(b.problem)));
  b.workspace = workspace.data();
  conv1d_backward(b, nullptr);
  workspace.values();
  device.fetch(v.outputs());
}

std::vector<ConvCase> gpu_cases() {
  std::vector<ConvCase> all;
  for (const ConvCase& c : conv_cases())
    if (c.dtype != Dtype::f64) all.push_back(c);
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    all.push_back({.lengths = {3000, 70, 5000}, .channels = 264, .dtype = dtype});
    all.push_back({.lengths = {3000, 70, 5000}, .channels = 2056, .dtype = dtype, .reverse = true});
    all.push_back({.lengths = std::vector<int>(3000, 3), .channels = 512, .dtype = dtype});
    all.push_back({.lengths = {20000, 1, 2}, .channels = 7, .dtype = dtype, .slack = 9000});
    all.push_back({.lengths = {20000, 1, 2}, .channels = 512, .dtype = dtype, .reverse = true, .slack = 900});
  }
  return all;
}

TEST_F(Conv1dCuda, EveryCase) {
  for (const ConvCase& c : gpu_cases()) {
    Conv v(c);
    run(v);
    expect_right(v);
    if (HasFatalFailure()) return;
  }
}

TEST_F(Conv1dCuda, SameBitsEveryTime) {
  for (const ConvCase& c : packed_cases()) {
    if (c.dtype == Dtype::f64) continue;
    Conv a(c), b(c);
    run(a), run(b);
    expect_same(a, b);
  }
}

TEST_F(Conv1dCuda, SameBitsAloneAndPacked) {
  for (const ConvCase& c : packed_cases()) {
    if (c.dtype == Dtype::f64) continue;
    SCOPED_TRACE(c.name());
    Conv packed(c);
    run(packed);
    for (int64_t i = 0; i < packed.sequences(); ++i) {
      Conv one = alone(packed, i);
      run(one);
      expect_same_alone(packed, one, i);
    }
  }
}

// With vectors of channels and without.
TEST_F(Conv1dCuda, SameBitsWhateverTheAlignment) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    Conv aligned({.dtype = dtype}), shifted({.dtype = dtype, .offset = 1});
    run(aligned), run(shifted);
    expect_same(aligned.out, 0, shifted.out, 0, aligned.out.rows, "out");
    expect_same(aligned.dx, 0, shifted.dx, 0, aligned.dx.rows, "dx");
  }
}

TEST_F(Conv1dCuda, NanStaysInItsSequence) {
  for (const ConvCase& c : packed_cases()) {
    if (c.dtype == Dtype::f64) continue;
    SCOPED_TRACE(c.name());
    Conv clean(c);
    run(clean);
    for (int64_t i = 0; i < clean.sequences(); ++i) {
      Conv bad(c);
      poison_sequence(bad, i, std::nan(""));
      run(bad);
      expect_same_but(clean, bad, i);
      EXPECT_EQ(std::isnan(bad.dweight.at(0, 0)), c.lengths[size_t(i)] > 0);
    }
  }
}

// No kernel leaves the tensors or fails to end.
TEST_F(Conv1dCuda, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : malformed_boundaries()) {
    for (const bool reverse : {false, true}) {
      for (const int channels : {24, 7}) {
        Conv v({.lengths = {20, 20, 20, 20, 20}, .channels = channels, .dtype = Dtype::bf16, .reverse = reverse});
        v.cu = cu;
        run(v);
        OnDevice device(v);
        Conv1dStep s = {v.problem(device.cu(), device), device(v.initial), 5, nullptr, device(v.out)};
        conv1d_step(s, nullptr);
        device.fetch(v.out), device.fetch(v.initial);
      }
    }
  }
}

TEST_F(Conv1dCuda, LargeValues) {
  Conv v({.lengths = {300}});
  std::mt19937 random(3);
  v.x.fill(random, 0, 300, 200);
  run(v);
  expect_right(v, 200);
}

TEST_F(Conv1dCuda, ManyRows) {
  for (const std::vector<int>& lengths : {std::vector<int>{100003}, std::vector<int>(50001, 2)}) {
    Conv v({.lengths = lengths, .channels = 12});
    for (int64_t r = 0; r < v.x.rows - v.c.slack; ++r)
      for (int64_t c = 0; c < v.c.channels; ++c) v.x.set(r, c, 1 + v.x.at(r, c)), v.dout.set(r, c, 1 + v.dout.at(r, c));
    run(v);
    expect_right(v, 2);
  }
}

// ---- Step ----------------------------------------------------------------------------------------------------------

TEST_F(Conv1dCuda, StepIsTheForwardWithStatesInAPool) {
  for (ConvCase c : gpu_cases()) {
    SCOPED_TRACE(c.name());
    if (c.lengths.size() > 2000 || (!c.lengths.empty() && c.lengths[0] > 2000)) continue;
    c.initial = c.final = true;
    Conv want(c), got(c);
    run(want);
    const StepPool pool(got);
    Matrix states = pool.states;
    OnDevice device(got);
    device.add(states);
    const DeviceArray<int32_t> indices(pool.indices);
    conv1d_step({.problem = got.problem(device.cu(), device),
                 .pool = device(states),
                 .slots = pool.states.rows / c.channels,
                 .indices = indices.data(),
                 .out = device(got.out)},
                nullptr);
    device.fetch(got.out), device.fetch(states);
    pool.expect_right(want, got, states);

    Matrix own = got.initial;
    device.add(own);
    conv1d_step({got.problem(device.cu(), device), device(own), got.sequences(), nullptr, device(got.out)}, nullptr);
    device.fetch(got.out), device.fetch(own);
    expect_same(want.out, 0, got.out, 0, want.out.rows, "out");
    expect_same(want.final, 0, own, 0, own.rows, "states");
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace packseq::testing
