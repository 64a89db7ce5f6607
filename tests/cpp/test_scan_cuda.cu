// The selective scan on the GPU, against its definition in double.
#include <limits>
#include <memory>

#include "device_array.cuh"
#include "expect_close.h"
#include "scan_case.h"

namespace packseq::testing {
namespace {

// A tensor's copy on the GPU.
struct Copy {
  Tensor* host;
  DeviceArray<char> device;

  explicit Copy(Tensor& x) : host(&x), device(int64_t(x.memory.bytes())) {
    device = std::vector<char>(x.memory.data(), x.memory.data() + x.memory.bytes());
  }
  char* data() const { return device.data(); }
  void fetch() const {
    const std::vector<char> values = device.values();
    std::copy(values.begin(), values.end(), host->memory.data());
  }
};

// A scan's tensors on the GPU; run() brings the outputs back into it.
struct OnGpu {
  Scan& s;
  Copy u{s.u}, delta{s.delta}, z{s.z}, dout{s.dout}, A{s.A}, B{s.B}, C{s.C}, D{s.D}, delta_bias{s.delta_bias},
      initial{s.initial}, dfinal{s.dfinal};
  Copy out{s.out}, final{s.final}, du{s.du}, ddelta{s.ddelta}, dz{s.dz}, dA{s.dA}, dB{s.dB}, dC{s.dC}, dD{s.dD},
      ddelta_bias{s.ddelta_bias}, dinitial{s.dinitial};
  DeviceArray<int32_t> cu{s.cu};

  explicit OnGpu(Scan& scan) : s(scan) {}

  ScanProblem problem() const {
    ScanProblem p = s.problem();
    const auto move = [](const void*& to, const Copy& x) { to = to ? x.data() : nullptr; };
    move(p.u.data, u), move(p.delta.data, delta), move(p.z.data, z), move(p.A, A);
    move(p.B.tokens.data, B), move(p.B.constants, B), move(p.C.tokens.data, C), move(p.C.constants, C);
    move(p.D, D), move(p.delta_bias, delta_bias), move(p.initial_states, initial);
    p.cu_seqlens = cu.data();
    return p;
  }

  void forward() {
    const ScanProblem p = problem();
    const DeviceArray<char> workspace(int64_t(scan_forward_workspace(p)));
    scan_forward({.problem = p, .out = out.data(), .final_states = final.data(), .workspace = workspace.data()},
                 nullptr);
    workspace.values();
    out.fetch(), final.fetch();
  }

  void backward() {
    const ScanProblem p = problem();
    const DeviceArray<char> workspace(int64_t(scan_backward_workspace(p)));
    const ScanCase& c = s.c;
    scan_backward({.problem = p,
                   .dout = {dout.data(), s.dout.token},
                   .dfinal_states = c.dfinal ? dfinal.data() : nullptr,
                   .du = du.data(),
                   .ddelta = ddelta.data(),
                   .dz = c.z ? dz.data() : nullptr,
                   .dA = dA.data(),
                   .dB = dB.data(),
                   .dC = dC.data(),
                   .dD = c.D ? dD.data() : nullptr,
                   .ddelta_bias = c.delta_bias ? ddelta_bias.data() : nullptr,
                   .dinitial_states = c.initial ? dinitial.data() : nullptr,
                   .workspace = workspace.data()},
                  nullptr);
    workspace.values();
    for (const Copy* x : {&du, &ddelta, &dz, &dA, &dB, &dC, &dD, &ddelta_bias, &dinitial}) x->fetch();
  }
};

// Rounded outputs have their type's tolerance; sums over many tokens and channels are float32 whatever the type.
double tolerance_of(const Tensor& x) { return x.dtype == Dtype::f32 ? 1e-5 : tolerance(x.dtype); }

void expect_right(const ScanCase& c) {
  Scan s(c);
  OnGpu gpu(s);
  gpu.forward();
  gpu.backward();
  const ScanReference want(s);
  for (const auto& [name, got] : s.outputs()) {
    expect_close(*got, want[name], tolerance_of(*got), c.name + ": " + name);
  }
}

std::vector<ScanCase> cases() {
  std::vector<ScanCase> all;
  const auto add = [&](const std::string& name, ScanCase c) {
    for (const Dtype t : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      c.dtype = t;
      c.name = name + " " + name_of(t);
      all.push_back(c);
    }
  };
  add("default", {});
  add("16 states", {.channels = 64, .states = 16});
  add("every length to 40",
      {.lengths = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                   21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40},
       .channels = 16,
       .states = 16});
  add("channels beyond a block", {.lengths = {70, 0, 33}, .channels = 150, .states = 16});
  add("one channel", {.channels = 1, .states = 16});
  add("odd channels", {.channels = 7, .states = 5});
  add("groups", {.channels = 24, .states = 16, .groups = 4});
  add("one channel a group", {.channels = 5, .states = 3, .groups = 5});
  add("one state", {.states = 1});
  add("17 states", {.states = 17});
  add("200 states", {.lengths = {5, 0, 19}, .channels = 6, .states = 200, .groups = 2});
  add("256 states", {.lengths = {9, 8}, .channels = 4, .states = 256});
  add("strided", {.channels = 24, .states = 16, .groups = 2, .strided = true});
  add("reverse", {.channels = 24, .states = 16, .reverse = true});
  add("plain", {.channels = 24,
                .states = 16,
                .D = false,
                .z = false,
                .delta_bias = false,
                .softplus = false,
                .initial = false,
                .dfinal = false});
  add("constant B", {.channels = 24, .states = 16, .constant_B = true});
  add("constant C", {.channels = 24, .states = 16, .constant_C = true, .reverse = true});
  add("constant B and C", {.channels = 24, .states = 40, .constant_B = true, .constant_C = true});
  add("complex", {.channels = 24, .states = 8, .complex = true});
  add("complex, 16 states", {.channels = 10, .states = 16, .groups = 2, .complex = true, .reverse = true});
  add("complex, constant", {.channels = 10, .states = 7, .complex = true, .constant_B = true, .constant_C = true});
  add("complex, 100 states", {.lengths = {9, 0, 5}, .channels = 6, .states = 100, .complex = true});
  add("long", {.lengths = {8200, 3, 0, 9000, 8191}, .channels = 17, .states = 16});
  add("long, reverse, one group a channel",
      {.lengths = {20, 8192}, .channels = 6, .states = 12, .groups = 3, .reverse = true});
  add("segments", {.lengths = {4096, 4097, 12289, 3}, .channels = 24, .states = 16});
  add("segments, reverse, groups", {.lengths = {1, 8193}, .channels = 16, .states = 16, .groups = 2, .reverse = true});
  add("segments, complex", {.lengths = {9000}, .channels = 4, .states = 5, .complex = true, .reverse = true});
  add("many sequences", {.lengths = std::vector<int>(700, 3), .channels = 6, .states = 16});
  add("nothing but slack", {.lengths = {}, .slack = 40});
  add("empty sequences alone", {.lengths = {0, 0, 0}, .slack = 0});
  return all;
}

class ScanCuda : public GpuTest {};

TEST_F(ScanCuda, EveryCase) {
  for (const ScanCase& c : cases()) expect_right(c);
}

// Every sequence of a pack, bit for bit as if it were alone; a sequence of NaNs between them changes nothing.
void expect_isolated(ScanCase c) {
  const std::vector<int> lengths = c.lengths;
  Scan packed(c);
  const int64_t bad = int64_t(lengths.size()) / 2, begin = packed.cu[bad], end = packed.cu[bad + 1];
  for (Tensor* x : {&packed.u, &packed.delta, &packed.dout}) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < c.channels; ++i) x->set(t, 0, i, std::nan(""));
  }
  OnGpu gpu(packed);
  gpu.forward(), gpu.backward();
  for (int64_t i = 0; i < int64_t(lengths.size()); ++i) {
    if (i == bad) continue;
    c.lengths = {lengths[size_t(i)]};
    c.slack = 0;
    Scan alone(c);
    const int64_t first = packed.cu[i], rows = lengths[size_t(i)];
    const auto copy_rows = [&](Tensor& to, const Tensor& from, int64_t row, int64_t count) {
      const size_t width = size_t(from.token) * size_of(from.dtype);
      if (count) std::memcpy(to.memory.data(), from.memory.data() + size_t(row) * width, size_t(count) * width);
    };
    for (auto [to, from] : {std::pair{&alone.u, &packed.u},
                            {&alone.delta, &packed.delta},
                            {&alone.z, &packed.z},
                            {&alone.dout, &packed.dout},
                            {&alone.B, &packed.B},
                            {&alone.C, &packed.C}}) {
      copy_rows(*to, *from, first, rows);
    }
    for (auto [to, from] :
         {std::pair{&alone.A, &packed.A}, {&alone.D, &packed.D}, {&alone.delta_bias, &packed.delta_bias}}) {
      copy_rows(*to, *from, 0, 1);
    }
    copy_rows(alone.initial, packed.initial, i, 1);
    copy_rows(alone.dfinal, packed.dfinal, i, 1);
    OnGpu single(alone);
    single.forward(), single.backward();
    const std::string what = c.name + ", sequence " + std::to_string(i) + " of " + std::to_string(rows) + " rows: ";
    expect_same_rows(packed.out, first, alone.out, 0, rows, what + "out");
    expect_same_rows(packed.final, i, alone.final, 0, 1, what + "final");
    expect_same_rows(packed.du, first, alone.du, 0, rows, what + "du");
    expect_same_rows(packed.ddelta, first, alone.ddelta, 0, rows, what + "ddelta");
    expect_same_rows(packed.dz, first, alone.dz, 0, rows, what + "dz");
    expect_same_rows(packed.dB, first, alone.dB, 0, rows, what + "dB");
    expect_same_rows(packed.dC, first, alone.dC, 0, rows, what + "dC");
    expect_same_rows(packed.dinitial, i, alone.dinitial, 0, 1, what + "dinitial");
  }
}

TEST_F(ScanCuda, SequencesAreIsolated) {
  std::vector<int> lengths = {5, 0, 37, 1, 130, 64, 8, 8300, 31, 300};
  for (const Dtype t : {Dtype::f32, Dtype::bf16}) {
    for (const bool reverse : {false, true}) {
      expect_isolated({.lengths = lengths,
                       .channels = 24,
                       .states = 16,
                       .dtype = t,
                       .reverse = reverse,
                       .name = std::string("isolated ") + name_of(t)});
      expect_isolated({.lengths = lengths,
                       .channels = 6,
                       .states = 20,
                       .dtype = t,
                       .reverse = reverse,
                       .name = std::string("isolated, 20 states ") + name_of(t)});
    }
  }
  lengths.resize(700, 3);  // more than there are slots for
  expect_isolated({.lengths = lengths, .channels = 2, .states = 16, .name = "isolated, many"});
}

TEST_F(ScanCuda, RunsRepeatBitForBit) {
  const ScanCase c = {.lengths = {300, 0, 8300, 77, 9}, .channels = 70, .states = 16, .dtype = Dtype::bf16};
  Scan first(c), second(c);
  for (Scan* s : {&first, &second}) {
    OnGpu gpu(*s);
    gpu.forward(), gpu.backward();
  }
  const auto a = first.outputs(), b = second.outputs();
  for (size_t i = 0; i < a.size(); ++i) {
    const Guarded &x = a[i].second->memory, &y = b[i].second->memory;
    EXPECT_EQ(std::memcmp(x.data(), y.data(), x.bytes()), 0) << a[i].first << " differs from run to run";
  }
}

// Steps far out: no decay, decay to nothing, softplus of very negative and very large numbers.
TEST_F(ScanCuda, ExtremeSteps) {
  for (const bool softplus : {false, true}) {
    ScanCase c = {.lengths = {50, 21}, .channels = 8, .states = 16, .delta_bias = false, .softplus = softplus};
    c.name = softplus ? "extreme steps through softplus" : "extreme steps";
    Scan s(c);
    const double values[] = {0, 1e-30, 1e30, 3e4, 25, 20, softplus ? -85.0 : 85.0, softplus ? -30.0 : 0.0};
    for (int64_t t = 0; t < s.cu.back(); ++t)
      for (int64_t i = 0; i < c.channels; ++i) {
        s.delta.set(t, 0, i, values[(t + 3 * i) % 8]);
        s.u.set(t, 0, i, s.u.at(t, 0, i) / std::max(1.0, std::abs(values[(t + 3 * i) % 8])));
      }
    for (int64_t n = 0; n < c.states; ++n) s.A.set(0, 0, n, n % 2 ? -1e-7 : 0);
    OnGpu gpu(s);
    gpu.forward();
    const ScanReference want(s);
    expect_close(s.out, want.out, 1e-5, c.name + ": out");
    expect_close(s.final, want.final, 1e-5, c.name + ": final");
  }
}

// Boundaries that make no sense: nothing outside the arrays is written, and it ends.
TEST_F(ScanCuda, MalformedBoundaries) {
  std::mt19937 random(3);
  for (int round = 0; round < 6; ++round) {
    const ScanCase c = {.lengths = {40, 30, 0, 8200, 20}, .channels = 20, .states = round % 2 ? 16 : 20};
    Scan s(c);
    OnGpu gpu(s);
    std::vector<int32_t> cu = s.cu;
    for (auto& x : cu) x = round < 3 ? int32_t(random()) : int32_t(random() % uint32_t(s.total()));
    gpu.cu = cu;
    gpu.forward(), gpu.backward();
  }
}

// One to three tokens of sequences whose states are in a pool, between guards: `indices` has slots that are not there.
void expect_right_step(const ScanCase& c, const std::vector<int32_t>& indices) {
  constexpr int64_t kSlots = 7;
  Scan s(c);
  const ScanReference want(s);
  OnGpu gpu(s);
  const size_t width = size_t(s.initial.token) * sizeof(float);
  const auto is_there = [&](int64_t slot) { return slot >= 0 && slot < kSlots; };
  std::vector<char> pool(kSlots * width, 1);
  for (size_t i = 0; i < indices.size(); ++i) {
    if (!is_there(indices[i])) continue;
    std::memcpy(&pool[size_t(indices[i]) * width], s.initial.memory.data() + i * width, width);
  }
  const DeviceArray<char> device_pool(pool);
  const DeviceArray<int32_t> device_indices(indices);
  scan_step({.problem = gpu.problem(),
             .pool = device_pool.data(),
             .slots = kSlots,
             .indices = device_indices.data(),
             .out = gpu.out.data()},
            nullptr);
  gpu.out.fetch();
  const std::vector<char> after = device_pool.values();
  std::vector<double> rows = want.out, states = want.final;
  std::vector<bool> touched(kSlots, false);
  for (size_t i = 0; i < indices.size(); ++i) {
    if (is_there(indices[i])) {
      touched[size_t(indices[i])] = true;
      std::memcpy(s.final.memory.data() + i * width, &after[size_t(indices[i]) * width], width);
      continue;
    }
    for (int64_t t = s.cu[i]; t < s.cu[i + 1]; ++t)
      for (int64_t n = 0; n < c.channels; ++n) {
        EXPECT_EQ(s.out.at(t, 0, n), 0) << c.name << ": token " << t << " has no state";
        rows[size_t(t * c.channels + n)] = 0;
      }
    std::memset(s.final.memory.data() + i * width, 0, width);
    std::fill_n(&states[i * size_t(s.final.token)], s.final.token, 0.0);
  }
  expect_close(s.out, rows, tolerance_of(s.out), c.name + ": out");
  expect_close(s.final, states, 1e-5, c.name + ": states");
  for (size_t slot = 0; slot < touched.size(); ++slot) {
    if (touched[slot]) continue;
    EXPECT_TRUE(std::all_of(&after[slot * width], &after[slot * width] + width, [](char x) { return x == 1; }))
        << c.name << ": slot " << slot << " is nobody's, and was written";
  }
}

TEST_F(ScanCuda, StepsFromAPool) {
  const int32_t least = std::numeric_limits<int32_t>::min(), most = std::numeric_limits<int32_t>::max();
  for (const bool complex : {false, true})
    for (const int states : {16, 5, 100})
      for (const Dtype t : {Dtype::f32, Dtype::bf16}) {
        ScanCase c = {.lengths = {1, 3, 0, 1, 2}, .channels = 40, .states = states, .groups = 2, .dtype = t};
        c.complex = complex;
        c.name = std::string("step ") + name_of(t) + (complex ? " complex " : " ") + std::to_string(states);
        expect_right_step(c, {4, 0, 2, -1, 6});
        expect_right_step(c, {7, most, least, 3, -1});
      }
}

}  // namespace
}  // namespace packseq::testing
