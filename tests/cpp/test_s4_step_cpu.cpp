// The S4 step on the CPU, against the dense recurrence in long double, and against the filter's own spectrum.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "executors.h"
#include "filters_case.h"
#include "longconv/s4_step.h"

namespace packseq::testing {
namespace {

struct StepCase {
  std::vector<int> lengths;
  S4Sizes sizes;  // length is not used
  Dtype dtype = Dtype::f32;
  bool zoh = false, with_D = true;
  int slack = 3;

  std::string name() const {
    return sizes.name() + " sequences " + std::to_string(lengths.size()) + (zoh ? " zoh " : " bilinear ") +
           name_of(dtype);
  }
};

// One call's tensors. What it must not read or has not written is NaN.
struct Step {
  StepCase c;
  Dtype real;
  std::vector<int32_t> cu = {0}, indices;
  bool indexed = true;
  int64_t slots;
  Arrays parameters;  // w, P, B, C, dt
  Array D, u, pool, out;

  explicit Step(const StepCase& c_)
      : c(c_),
        real(c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
        slots(int64_t(c.lengths.size()) + 2),
        D(real, 0),
        u(real, 0),
        pool(real, 0),
        out(real, 0) {
    std::mt19937 random(21);
    for (int n : c.lengths) cu.push_back(cu.back() + n);
    for (const WideArray& x : s4_inputs(c.sizes)) parameters.emplace_back(real, x);
    D = Array(real, normal(random, size_t(c.sizes.filters * c.sizes.channels)));
    u = Array(c.dtype, size_t(total() * stride()));
    for (int64_t t = 0; t < cu.back(); ++t)
      for (int64_t i = 0; i < c.sizes.channels; ++i) {
        write(u.data(), t * stride() + i, c.dtype, double(normal(random, 1)[0]));
      }
    pool = Array(real, normal(random, size_t(slots) * state_size()));
    out = Array(c.dtype, size_t(total() * c.sizes.filters * c.sizes.channels));
    for (size_t i = 0; i < c.lengths.size(); ++i) indices.push_back(int32_t(slots - 1 - int64_t(i)));
  }

  int64_t total() const { return cu.back() + c.slack; }
  int64_t stride() const { return c.sizes.channels + 2; }
  size_t state_size() const { return size_t(2 * c.sizes.channels * c.sizes.poles); }
  size_t outputs() const { return size_t(c.sizes.filters * c.sizes.channels); }  // of a token

  void run(const Executor& executor = Executor::serial()) {
    s4_step({.dtype = c.dtype,
             .total = total(),
             .sequences = int64_t(cu.size()) - 1,
             .channels = c.sizes.channels,
             .filters = int(c.sizes.filters),
             .poles = c.sizes.poles,
             .rank = c.sizes.rank,
             .zoh = c.zoh,
             .cu_seqlens = cu.data(),
             .u = {u.data(), stride()},
             .w = parameters[0].data(),
             .P = parameters[1].data(),
             .B = parameters[2].data(),
             .C = parameters[3].data(),
             .dt = parameters[4].data(),
             .D = c.with_D ? D.data() : nullptr,
             .pool = pool.data(),
             .slots = slots,
             .indices = indexed ? indices.data() : nullptr,
             .out = out.data()},
            executor);
    EXPECT_TRUE(out.memory.intact() && pool.memory.intact());
  }
};

// Abar and Bbar of one channel, over both members of every pair.
DenseSystem discrete(const Step& s, size_t channel) {
  const S4Sizes& z = s.c.sizes;
  WideArrays p;
  for (const Array& x : s.parameters) p.push_back(x.wide());
  DenseSystem system(p[0], p[1], p[2], channel, size_t(z.channels), size_t(z.poles), size_t(z.rank));
  const Wide dt = p[4][channel];
  const size_t n = system.size;
  if (s.c.zoh) {
    for (size_t i = 0; i < n; ++i) {
      const WideComplex w = system.A[i * n + i], a = std::exp(dt * w);
      system.A[i * n + i] = a;
      system.B[i] *= w == WideComplex(0) ? dt : (a - Wide(1)) / w;
    }
    return system;
  }
  std::vector<WideComplex> left = system.A, right = system.A;
  for (WideComplex& x : left) x *= -dt / 2;
  for (WideComplex& x : right) x *= dt / 2;
  for (size_t i = 0; i < n; ++i) left[i * n + i] += Wide(1), right[i * n + i] += Wide(1), system.B[i] *= dt;
  system.B = solve(left, system.B);
  for (size_t j = 0; j < n; ++j) {
    std::vector<WideComplex> column(n);
    for (size_t i = 0; i < n; ++i) column[i] = right[i * n + j];
    column = solve(left, column);
    for (size_t i = 0; i < n; ++i) system.A[i * n + j] = column[i];
  }
  return system;
}

// What the call makes of `before`, the tensors as they were.
void expect_right(const Step& before, const Step& after, double tolerance, double state_tolerance) {
  const S4Sizes& z = before.c.sizes;
  const size_t N = size_t(z.poles), channels = size_t(z.channels);
  std::vector<bool> touched(size_t(before.slots), false);
  for (size_t c = 0; c < channels; ++c) {
    const DenseSystem system = discrete(before, c);
    const WideArray C = before.parameters[3].wide();
    for (size_t i = 0; i + 1 < before.cu.size(); ++i) {
      const int64_t slot = before.indexed ? before.indices[i] : int64_t(i);
      const bool known = slot >= 0 && slot < before.slots;
      std::vector<WideComplex> h(2 * N);
      if (known) touched[size_t(slot)] = true;
      const auto place = [&](size_t n) { return 2 * ((size_t(slot) * channels + c) * N + n); };
      for (size_t n = 0; n < N && known; ++n) {
        h[n] = {before.pool[place(n)], before.pool[place(n) + 1]}, h[N + n] = std::conj(h[n]);
      }
      for (int64_t t = before.cu[i]; t < before.cu[i + 1]; ++t) {
        const Wide u = before.u[size_t(t * before.stride()) + c];
        std::vector<WideComplex> next(2 * N);
        for (size_t a = 0; a < 2 * N; ++a) {
          next[a] = system.B[a] * u;
          for (size_t b = 0; b < 2 * N; ++b) next[a] += system.A[a * 2 * N + b] * h[b];
        }
        h = next;
        for (size_t f = 0; f < size_t(z.filters); ++f) {
          Wide y = before.c.with_D ? before.D[f * channels + c] * u : 0, size = 1 + std::abs(y);
          for (size_t n = 0; n < N; ++n) {
            const Wide term = 2 * (number(C, (f * channels + c) * N + n) * h[n]).real();
            y += term, size += std::abs(term);
          }
          const double got = after.out[size_t(t) * before.outputs() + f * channels + c];
          ASSERT_NEAR(got, known ? double(y) : 0, known ? tolerance * double(size) : 0)
              << "token " << t << " filter " << f << " channel " << c;
        }
      }
      for (size_t n = 0; n < N && known; ++n) {
        ASSERT_NEAR(after.pool[place(n)], double(h[n].real()), state_tolerance * double(1 + std::abs(h[n])));
        ASSERT_NEAR(after.pool[place(n) + 1], double(h[n].imag()), state_tolerance * double(1 + std::abs(h[n])));
      }
    }
  }
  for (size_t i = 0; i < before.pool.size; ++i) {
    if (touched[i / before.state_size()]) continue;
    ASSERT_EQ(after.pool[i], before.pool[i]) << "a slot of nobody";
  }
  for (size_t i = size_t(before.cu.back()) * before.outputs(); i < after.out.size; ++i) ASSERT_EQ(after.out[i], 0);
}

double out_tolerance(Dtype t) {
  return t == Dtype::f64 ? 1e-13 : t == Dtype::f32 ? 2e-7 : t == Dtype::f16 ? 1e-3 : 8e-3;
}
double state_tolerance(Dtype t) { return t == Dtype::f64 ? 1e-13 : 2e-7; }

std::vector<StepCase> cases() {
  std::vector<StepCase> all;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16})
    for (const int rank : {0, 1, 2}) {
      all.push_back({.lengths = {1, 0, 5, 130, 2, 64}, .sizes = {1, 19, 0, 5, rank}, .dtype = dtype});
      all.push_back({.lengths = {3, 1}, .sizes = {3, 1, 0, 1, rank}, .dtype = dtype, .with_D = false, .slack = 0});
      if (rank == 0) all.push_back({.lengths = {70, 3}, .sizes = {2, 5, 0, 8, 0}, .dtype = dtype, .zoh = true});
    }
  all.push_back({.lengths = {4}, .sizes = {1, 2, 0, 1024, 1}});
  return all;
}

TEST(S4StepCpu, EveryCase) {
  for (const StepCase& c : cases()) {
    if (c.sizes.poles > 100) continue;  // the dense recurrence would take too long
    SCOPED_TRACE(c.name());
    const Step before(c);
    Step after = before;
    after.run();
    expect_right(before, after, out_tolerance(c.dtype), state_tolerance(c.dtype));
  }
}

TEST(S4StepCpu, SlotsInOrderWithoutIndices) {
  const Step before({.lengths = {3, 2, 7}, .sizes = {1, 4, 0, 3, 1}});
  Step after = before;
  after.indexed = false;
  Step as_if = before;
  as_if.indexed = false;
  after.run();
  expect_right(as_if, after, 2e-7, 2e-7);
}

TEST(S4StepCpu, WithoutASlotThereAreZeros) {
  Step before({.lengths = {3, 2, 1, 4, 5}, .sizes = {2, 4, 0, 3, 1}});
  before.indices = {-1, 7, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min(), 2};
  Step after = before;
  after.run();
  expect_right(before, after, 2e-7, 2e-7);
}

TEST(S4StepCpu, SameBitsAloneAndPackedAndThreaded) {
  for (const StepCase& c : cases()) {
    SCOPED_TRACE(c.name());
    Step packed(c), again(c);
    const Step before(c);
    packed.run(), again.run(threaded());
    EXPECT_EQ(std::memcmp(packed.out.data(), again.out.data(), packed.out.memory.bytes()), 0);
    EXPECT_EQ(std::memcmp(packed.pool.data(), again.pool.data(), packed.pool.memory.bytes()), 0);
    for (size_t i = 0; i < c.lengths.size(); ++i) {
      StepCase alone_case = c;
      alone_case.lengths = {c.lengths[i]}, alone_case.slack = 0;
      Step alone(alone_case);
      const size_t begin = size_t(packed.cu[i]), slot = size_t(packed.indices[i]);
      const size_t row = size_t(packed.stride()) * size_of(c.dtype), state = packed.state_size() * size_of(packed.real);
      std::memcpy(alone.u.data(), before.u.memory.data() + begin * row, size_t(c.lengths[i]) * row);
      alone.indices = {0};
      std::memcpy(alone.pool.data(), before.pool.memory.data() + slot * state, state);
      alone.run();
      const size_t out_row = packed.outputs() * size_of(c.dtype);
      EXPECT_EQ(
          std::memcmp(alone.out.data(), packed.out.memory.data() + begin * out_row, size_t(c.lengths[i]) * out_row), 0);
      EXPECT_EQ(std::memcmp(alone.pool.data(), packed.pool.memory.data() + slot * state, state), 0);
    }
  }
}

// NaN in one sequence's channel stays there.
TEST(S4StepCpu, NanStaysInItsChannel) {
  const StepCase c = {.lengths = {5, 70, 9}, .sizes = {1, 21, 0, 5, 1}};
  Step clean(c), bad(c);
  write(bad.u.data(), 20 * bad.stride() + 17, c.dtype, std::nan(""));
  clean.run(), bad.run(threaded());
  for (size_t i = 0; i < clean.out.size; ++i) {
    const bool hit = i % 21 == 17 && i / 21 >= 20 && i / 21 < 75;
    ASSERT_EQ(std::isnan(bad.out[i]), hit) << i;
    if (hit) continue;
    ASSERT_EQ(bad.out[i], clean.out[i]) << i;
  }
}

TEST(S4StepCpu, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 90, -7, 12}, {-100, 2000000000, 3, 1}, {9, 9, 9, 9}}) {
    Step s({.lengths = {20, 20, 20}, .sizes = {1, 3, 0, 2, 1}});
    s4_step({.dtype = Dtype::f32,
             .total = 63,
             .sequences = 3,
             .channels = 3,
             .filters = 1,
             .poles = 2,
             .rank = 1,
             .zoh = false,
             .cu_seqlens = cu.data(),
             .u = {s.u.data(), s.stride()},
             .w = s.parameters[0].data(),
             .P = s.parameters[1].data(),
             .B = s.parameters[2].data(),
             .C = s.parameters[3].data(),
             .dt = s.parameters[4].data(),
             .D = nullptr,
             .pool = s.pool.data(),
             .slots = s.slots,
             .indices = nullptr,
             .out = s.out.data()},
            threaded());
    EXPECT_TRUE(s.out.memory.intact() && s.pool.memory.intact());
  }
}

// A pole at the origin by zero-order hold: an integrator.
TEST(S4StepCpu, HoldAtTheOrigin) {
  Step s({.lengths = {100}, .sizes = {1, 1, 0, 1, 0}, .dtype = Dtype::f64, .zoh = true, .with_D = false});
  for (const size_t i : {0, 1}) write(s.parameters[0].data(), int64_t(i), Dtype::f64, 0);
  const Step before = s;
  s.run();
  expect_right(before, s, 1e-13, 1e-13);
}

// The response to an impulse is the filter whose spectrum s4_spectrum gives, C being C (I - Abar^length) there.
TEST(S4StepCpu, IsTheSpectrumsRecurrence) {
  for (const int rank : {0, 1, 2}) {
    const int length = 50;
    const S4Sizes z = {2, 3, length, 4, rank};
    Step s({.lengths = {length}, .sizes = z, .dtype = Dtype::f64, .with_D = false, .slack = 0});
    for (int64_t i = 0; i < int64_t(s.u.size); ++i) write(s.u.data(), i, Dtype::f64, i < z.channels ? 1 : 0);
    s.pool = Array(Dtype::f64, WideArray(s.pool.size));
    s.run();

    WideArrays inputs;
    for (const Array& x : s.parameters) inputs.push_back(x.wide());
    const size_t N = size_t(z.poles), n = 2 * N;
    for (size_t c = 0; c < 3; ++c) {
      const DenseSystem system = discrete(s, c);
      for (size_t f = 0; f < 2; ++f) {
        std::vector<WideComplex> row(n), power(n);
        for (size_t i = 0; i < N; ++i) {
          row[i] = number(inputs[3], (f * 3 + c) * N + i), row[N + i] = std::conj(row[i]);
        }
        power = row;
        for (int step = 0; step < length; ++step) {
          std::vector<WideComplex> next(n);
          for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j < n; ++j) next[j] += power[i] * system.A[i * n + j];
          power = next;
        }
        for (size_t i = 0; i < N; ++i) add(inputs[3], (f * 3 + c) * N + i, -power[i]);
      }
    }
    const Operator op = s4_operator(z);
    Arrays in;
    for (const WideArray& x : inputs) in.emplace_back(Dtype::f64, x);
    Array out(Dtype::f64, op.out_size);
    op.forward(Dtype::f64, in, out, Executor::serial());
    for (size_t row = 0; row < 6; ++row)
      for (int l = 0; l < length; ++l) {
        double k = 0;
        for (int j = 0; j <= length / 2; ++j) {
          const double angle = 2 * M_PI * j * l / length, twice = j == 0 || 2 * j == length ? 1 : 2;
          const size_t at = 2 * (row * size_t(length / 2 + 1) + size_t(j));
          k += twice * (out[at] * std::cos(angle) - out[at + 1] * std::sin(angle)) / length;
        }
        ASSERT_NEAR(s.out[size_t(l) * 6 + row], k, 1e-12) << "row " << row << " step " << l;
      }
  }
}

// Long sequences in float32: errors of the recurrence's own numbers would grow with every token.
TEST(S4StepCpu, StaysAccurate) {
  StepCase c = {.lengths = {16384}, .sizes = {1, 2, 0, 4, 1}};
  Step single(c);
  c.dtype = Dtype::f64;
  Step wide(c);
  for (Step* s : {&single, &wide}) {
    for (size_t i = 0; i < s->u.size; ++i) write(s->u.data(), int64_t(i), s->c.dtype, float(wide.u[i]));
    s->parameters[4] = Array(s->real, WideArray{0.001f, 0.0001f});
  }
  for (size_t i = 0; i < 4; ++i) wide.parameters[i] = Array(Dtype::f64, single.parameters[i].wide());
  wide.D = Array(Dtype::f64, single.D.wide()), wide.pool = Array(Dtype::f64, single.pool.wide());
  single.run(), wide.run();
  double scale = 0;
  for (size_t i = 0; i < wide.out.size; ++i) scale = std::max(scale, std::abs(wide.out[i]));
  for (size_t i = 0; i < wide.out.size; ++i) ASSERT_NEAR(single.out[i], wide.out[i], 2e-7 * scale) << i;
}

}  // namespace
}  // namespace packseq::testing
