// The long convolution on the GPU, against sums taken one after another in double.
#include "device_matrices.cuh"
#include "long_conv_case.h"

namespace packseq::testing {
namespace {

class LongConvCuda : public GpuTest {};

void run(LongConv& v) {
  const OnDevice device(v);
  {
    LongConvForward f = v.forward(device.cu(), device);
    const DeviceArray<char> workspace(int64_t(long_conv_forward_workspace(f.problem)));
    f.workspace = workspace.data();
    long_conv_forward(f, nullptr);
    workspace.values();
  }
  LongConvBackward b = v.backward(device.cu(), device);
  const DeviceArray<char> workspace(int64_t(long_conv_backward_workspace(b.problem)));
  b.workspace = workspace.data();
  long_conv_backward(b, nullptr);
  workspace.values();
  device.fetch(v.outputs());
}

void expect_all_right(const std::vector<LongConvCase>& cases) {
  for (const LongConvCase& c : cases) {
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
}

std::vector<LongConvCase> option_cases() {
  std::vector<LongConvCase> all;
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
  for (LongConvCase c : option_cases()) {
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
std::vector<LongConvCase> packed_cases() {
  std::vector<LongConvCase> all;
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

TEST_F(LongConvCuda, SameBitsEveryTime) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv a(c), b(c);
    run(a), run(b);
    expect_same(a, b);
  }
}

TEST_F(LongConvCuda, SameBitsAloneAndPacked) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv packed(c);
    run(packed);
    for (int64_t i = 0; i < packed.sequences(); ++i) {
      LongConv one = alone(packed, i);
      run(one);
      expect_same_rows(packed, packed.cu[size_t(i)], one, 0, one.u.rows);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(LongConvCuda, NanStaysInItsSequence) {
  for (const LongConvCase& c : packed_cases()) {
    SCOPED_TRACE(c.name());
    LongConv clean(c);
    run(clean);
    for (int64_t i = 0; i < clean.sequences(); ++i) {
      for (const double poison : {std::nan(""), double(INFINITY)}) {
        LongConv bad(c);
        poison_rows(bad, bad.cu[size_t(i)], bad.cu[size_t(i) + 1], poison);
        run(bad);
        expect_same_but(clean, bad, i);
        if (HasFatalFailure()) return;
        if (i % 3) break;
      }
    }
  }
}

TEST_F(LongConvCuda, NanStaysInItsChannel) {
  for (LongConvCase c : packed_cases()) {
    SCOPED_TRACE(c.name());
    c.channels = 10;
    LongConv clean(c), bad(c);
    poison_rows(bad, 0, bad.cu.back(), std::nan(""), 4);
    run(clean), run(bad);
    expect_same_but_channel(clean, bad, 4);
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
    LongConvCase c = v.c;
    c.lengths = lengths;
    LongConv want(c);
    run(want);
    check_cuda(cudaMemcpy(device.cu(), want.cu.data(), want.cu.size() * sizeof(int32_t), cudaMemcpyHostToDevice),
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
