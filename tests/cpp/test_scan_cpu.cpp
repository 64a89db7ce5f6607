// The CPU implementation of the selective scan, against a loop in double.
#include <gtest/gtest.h>

#include <cstring>

#include "executors.h"
#include "expect_close.h"
#include "scan_case.h"

namespace packseq::testing {
namespace {

const Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16};

// What is summed over many tokens may be off by more.
void expect_outputs(Scan& s) {
  const ScanReference want(s);
  for (const auto& [name, got] : s.outputs()) {
    expect_close(*got, want[name], 4 * tolerance(got->dtype), s.c.name + ": " + name);
  }
}

void expect_right(const ScanCase& c, unsigned seed = 1) {
  Scan s(c, seed);
  s.forward(threaded());
  s.backward(threaded());
  expect_outputs(s);
}

TEST(ScanReference, GradientsAreFiniteDifferences) {
  for (int variant = 0; variant < 16; ++variant) {
    Scan s({.lengths = {3, 0, 2},
            .channels = 2,
            .states = 2,
            .dtype = Dtype::f64,
            .complex = variant % 2 == 1,
            .constant_B = (variant & 2) != 0,
            .constant_C = (variant & 4) != 0,
            .softplus = (variant & 8) != 0,
            .reverse = (variant & 8) == 0});
    const auto loss = [&] {
      const ScanReference r(s);
      double sum = 0;
      for (int64_t t = 0; t < s.cu.back(); ++t)
        for (int64_t c = 0; c < 2; ++c) sum += s.dout.at(t, 0, c) * r.out[size_t(t * 2 + c)];
      for (int64_t i = 0; i < s.sequences(); ++i)
        for (int64_t c = 0; c < 2; ++c)
          for (int64_t n = 0; n < s.width(); ++n)
            sum += s.dfinal.at(i, c, n) * r.final[size_t((i * 2 + c) * s.width() + n)];
      return sum;
    };
    const ScanReference r(s);
    for (const auto& [name, x] : {std::pair{"du", &s.u},
                                  {"ddelta", &s.delta},
                                  {"dz", &s.z},
                                  {"dA", &s.A},
                                  {"dB", &s.B},
                                  {"dC", &s.C},
                                  {"dD", &s.D},
                                  {"ddelta_bias", &s.delta_bias},
                                  {"dinitial", &s.initial}}) {
      for (int64_t i = 0; i < x->total * x->token; ++i) {
        const int64_t t = i / x->token, h = i % x->token / x->head, d = i % x->head;
        const double value = x->at(t, h, d), small = 1e-5;
        if (std::isnan(value)) continue;  // slack
        x->set(t, h, d, value + small);
        const double above = loss();
        x->set(t, h, d, value - small);
        const double below = loss();
        x->set(t, h, d, value);
        EXPECT_NEAR((above - below) / (2 * small), r[name][size_t(i)], 1e-7) << name << " variant " << variant;
      }
    }
  }
}

TEST(ScanCpu, EveryDtype) {
  for (Dtype t : kDtypes)
    for (bool complex : {false, true}) {
      expect_right({.channels = 40, .dtype = t, .complex = complex, .name = name_of(t)});
    }
}

TEST(ScanCpu, Lengths) {
  for (int n : {0, 1, 2, 31, 32, 33, 63, 64, 65, 300})
    for (bool reverse : {false, true}) {
      expect_right({.lengths = {n}, .reverse = reverse, .name = std::to_string(n)});
    }
}

TEST(ScanCpu, States) {
  for (Dtype t : {Dtype::f32, Dtype::f64})
    for (int n : {1, 2, 3, 5, 16, 17, 64, 256})
      for (bool complex : {false, true}) {
        const std::string name = std::string(name_of(t)) + " states " + std::to_string(n);
        expect_right({.lengths = {40, 3}, .states = n, .dtype = t, .complex = complex, .name = name});
        expect_right({.lengths = {40, 3},
                      .states = n,
                      .dtype = t,
                      .complex = complex,
                      .constant_B = true,
                      .constant_C = true,
                      .name = name + " constant"});
      }
}

TEST(ScanCpu, Channels) {
  for (Dtype t : kDtypes)
    for (int channels : {1, 3, 8, 31, 32, 33, 40, 64, 300}) {
      expect_right({.lengths = {35, 2},
                    .channels = channels,
                    .dtype = t,
                    .name = std::string(name_of(t)) + " channels " + std::to_string(channels)});
    }
}

TEST(ScanCpu, Groups) {
  for (int groups : {1, 2, 5, 40})
    for (bool complex : {false, true}) {
      expect_right({.channels = 40, .groups = groups, .complex = complex, .name = std::to_string(groups) + " groups"});
    }
  // Several slices of a group's channels, of several blocks each.
  expect_right({.lengths = {40}, .channels = 2400, .states = 2, .groups = 2, .name = "2400 channels in 2 groups"});
  expect_right({.lengths = {35}, .channels = 300, .states = 64, .complex = true, .name = "300 channels, 64 states"});
}

TEST(ScanCpu, EveryOption) {
  unsigned seed = 0;
  for (int options = 0; options < 1 << 10; ++options) {
    const auto on = [&](int bit) { return (options >> bit & 1) != 0; };
    expect_right({.lengths = {5, 0, 70, 33},
                  .channels = 6,
                  .states = 5,
                  .groups = 2,
                  .dtype = kDtypes[options % 3 ? 0 : options / 3 % 4],
                  .complex = on(0),
                  .constant_B = on(1),
                  .constant_C = on(2),
                  .D = on(3),
                  .z = on(4),
                  .delta_bias = on(5),
                  .softplus = on(6),
                  .initial = on(7),
                  .dfinal = on(8),
                  .reverse = on(9),
                  .strided = seed % 2 == 0,
                  .name = "options " + std::to_string(options)},
                 ++seed);
  }
}

TEST(ScanCpu, EmptyThings) {
  for (bool constant : {false, true}) {
    for (const std::vector<int>& lengths :
         {std::vector<int>{}, std::vector<int>{0, 0, 0}, std::vector<int>{0, 4, 0, 0, 2, 0}}) {
      for (int slack : {0, 4}) {
        expect_right({.lengths = lengths, .constant_B = constant, .constant_C = constant, .slack = slack});
        expect_right({.lengths = lengths, .initial = false, .dfinal = false, .slack = slack});
      }
    }
  }
}

const ScanCase kRich = {.lengths = {64, 5, 300, 1, 0, 131, 17}, .channels = 40, .states = 17, .groups = 2};

void expect_same(Scan& a, Scan& b) {
  for (size_t i = 0; i < a.outputs().size(); ++i) {
    const auto [name, x] = a.outputs()[i];
    const Tensor* const y = b.outputs()[i].second;
    EXPECT_EQ(std::memcmp(x->memory.data(), y->memory.data(), x->memory.bytes()), 0) << name;
  }
}

TEST(ScanCpu, SameBitsWithAnyExecutor) {
  for (Dtype t : kDtypes)
    for (bool complex : {false, true})
      for (bool constant : {false, true}) {
        ScanCase c = kRich;
        c.dtype = t, c.complex = complex, c.constant_B = c.constant_C = constant;
        c.channels = 300;
        Scan first(c), second(c), third(c);
        first.forward(Executor::serial()), second.forward(threaded()), third.forward(one_range());
        first.backward(Executor::serial()), second.backward(threaded()), third.backward(one_range());
        expect_same(first, second), expect_same(first, third);
      }
}

// Rows of one sequence's tensors, and its states.
void copy_rows(Tensor& to, const Tensor& from, int64_t row, int64_t rows) {
  const size_t width = from.token * size_of(from.dtype);
  std::memcpy(to.memory.data(), from.memory.data() + row * width, rows * width);
}

TEST(ScanCpu, SameBitsAloneAndPacked) {
  for (bool complex : {false, true})
    for (bool reverse : {false, true}) {
      ScanCase all = kRich;
      all.complex = complex, all.reverse = reverse;
      Scan packed(all);
      packed.forward(threaded());
      packed.backward(threaded());
      for (size_t i = 0; i < all.lengths.size(); ++i) {
        ScanCase c = all;
        c.lengths = {all.lengths[i]};
        Scan alone(c);
        const int64_t begin = packed.cu[i], length = c.lengths[0];
        for (const auto member : {&Scan::u, &Scan::delta, &Scan::z, &Scan::dout, &Scan::B, &Scan::C}) {
          copy_rows(alone.*member, packed.*member, begin, length);
        }
        for (const auto member : {&Scan::A, &Scan::D, &Scan::delta_bias}) {
          copy_rows(alone.*member, packed.*member, 0, 1);
        }
        for (const auto member : {&Scan::initial, &Scan::dfinal}) {
          copy_rows(alone.*member, packed.*member, int64_t(i), 1);
        }
        alone.forward(Executor::serial());
        alone.backward(Executor::serial());
        for (const auto member : {&Scan::out, &Scan::du, &Scan::ddelta, &Scan::dz, &Scan::dB, &Scan::dC}) {
          expect_same_rows(packed.*member, begin, alone.*member, 0, length, "rows of sequence " + std::to_string(i));
        }
        for (const auto member : {&Scan::final, &Scan::dinitial}) {
          expect_same_rows(packed.*member, int64_t(i), alone.*member, 0, 1, "states of " + std::to_string(i));
        }
      }
    }
}

TEST(ScanCpu, NanStaysInItsSequence) {
  for (double poison : {std::nan(""), double(INFINITY)}) {
    for (size_t i = 0; i < kRich.lengths.size(); ++i) {
      Scan clean(kRich), bad(kRich);
      for (Tensor* x : {&bad.u, &bad.delta, &bad.z, &bad.dout, &bad.B, &bad.C}) {
        for (int64_t t = bad.cu[i]; t < bad.cu[i + 1]; ++t)
          for (int64_t h = 0; h < x->heads; ++h)
            for (int64_t d = 0; d < x->dim; ++d) x->set(t, h, d, poison);
      }
      for (Tensor* x : {&bad.initial, &bad.dfinal})
        for (int64_t h = 0; h < x->heads; ++h) x->set(int64_t(i), h, 0, poison);
      for (Scan* s : {&clean, &bad}) s->forward(threaded()), s->backward(threaded());
      for (const auto member : {&Scan::out, &Scan::du, &Scan::ddelta, &Scan::dz, &Scan::dB, &Scan::dC}) {
        const Tensor &x = clean.*member, &y = bad.*member;
        expect_same_rows(x, 0, y, 0, bad.cu[i], "before");
        expect_same_rows(x, bad.cu[i + 1], y, bad.cu[i + 1], x.total - bad.cu[i + 1], "after");
      }
      for (const auto member : {&Scan::final, &Scan::dinitial}) {
        const Tensor &x = clean.*member, &y = bad.*member;
        expect_same_rows(x, 0, y, 0, int64_t(i), "states before");
        expect_same_rows(x, int64_t(i) + 1, y, int64_t(i) + 1, x.total - int64_t(i) - 1, "states after");
      }
    }
  }
}

// The gradients summed over sequences do not see the slack.
TEST(ScanCpu, SlackIsZeroAndNeverRead) {
  for (bool constant : {false, true}) {
    ScanCase c = kRich;
    c.constant_B = c.constant_C = constant;
    ScanCase none = c;
    none.slack = 0;
    Scan with(c), without(none);
    for (Scan* s : {&with, &without}) s->forward(threaded()), s->backward(threaded());
    for (const auto& [name, x] : with.outputs()) {
      if (x->total != with.total()) continue;
      for (int64_t t = with.cu.back(); t < x->total; ++t)
        for (int64_t i = 0; i < x->token; ++i) ASSERT_EQ(x->at(t, 0, i), 0) << name;
    }
    for (const auto member : {&Scan::dA, &Scan::dD, &Scan::ddelta_bias}) {
      expect_same_rows(with.*member, 0, without.*member, 0, 1, "sums");
    }
  }
}

TEST(ScanCpu, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 500, 1000, -7, 40, 12},
                                         {-100, -5, 2000000000, 3, 2, 1},
                                         {9, 9, 9, 9, 9, 9},
                                         {5, 4, 3, 2, 1, 0}}) {
    Scan s({});
    s.cu = cu;
    ScanProblem p = s.problem();
    p.total = s.u.total;
    scan_forward({.problem = p, .out = s.out.memory.data(), .final_states = nullptr, .workspace = nullptr},
                 Executor::serial());
    scan_backward({.problem = p,
                   .dout = {s.dout.memory.data(), s.dout.token},
                   .dfinal_states = nullptr,
                   .du = s.du.memory.data(),
                   .ddelta = s.ddelta.memory.data(),
                   .dz = s.dz.memory.data(),
                   .dA = s.dA.memory.data(),
                   .dB = s.dB.memory.data(),
                   .dC = s.dC.memory.data(),
                   .dD = s.dD.memory.data(),
                   .ddelta_bias = s.ddelta_bias.memory.data(),
                   .dinitial_states = s.dinitial.memory.data(),
                   .workspace = nullptr},
                  Executor::serial());
    for (const auto& [name, x] : s.outputs()) EXPECT_TRUE(x->memory.intact()) << name;
  }
}

// Steps of nothing, steps so large that the decay is nothing, decays of nothing, and softplus at both ends.
TEST(ScanCpu, ExtremeSteps) {
  for (Dtype t : {Dtype::f32, Dtype::f64})
    for (bool complex : {false, true})
      for (bool softplus : {false, true}) {
        Scan s({.lengths = {40, 9},
                .dtype = t,
                .complex = complex,
                .delta_bias = false,
                .softplus = softplus,
                .name = std::string("extreme ") + name_of(t)});
        const double steps[] = {0, 1e4, 1e-8, 30, 500, 1e-3, 25};
        const double before_softplus[] = {-80, 1e4, 20, 20.001, -20, 0, -1000};
        for (int64_t i = 0; i < s.cu.back(); ++i)
          for (int64_t c = 0; c < s.c.channels; ++c) {
            s.delta.set(i, 0, c, softplus ? before_softplus[(i + c) % 7] : steps[(i + c) % 7]);
          }
        for (int64_t c = 0; c < s.c.channels; ++c) s.A.set(0, c, 0, c % 2 ? 0 : -1e-6);
        if (complex) {  // the angle's error is its rounding: keep it small
          for (int64_t c = 0; c < s.c.channels; ++c)
            for (int64_t n = 1; n < s.width(); n += 2) s.A.set(0, c, n, s.A.at(0, c, n) * 1e-3);
        }
        s.forward(threaded());
        s.backward(threaded());
        expect_outputs(s);
      }
}

// Very small steps keep their relative accuracy through softplus and its derivative.
TEST(ScanCpu, SmallStepsAreRelativelyRight) {
  Scan s({.lengths = {1},
          .channels = 40,
          .states = 1,
          .D = false,
          .z = false,
          .delta_bias = false,
          .initial = false,
          .dfinal = false,
          .slack = 0});
  for (int64_t c = 0; c < 40; ++c) s.delta.set(0, 0, c, -2.0 * double(c));
  s.forward(Executor::serial());
  s.backward(Executor::serial());
  const ScanReference want(s);
  for (size_t c = 0; c < 40; ++c) {
    EXPECT_NEAR(s.out.at(0, 0, int64_t(c)) / want.out[c], 1, 1e-6) << c;
    EXPECT_NEAR(s.du.at(0, 0, int64_t(c)) / want.du[c], 1, 1e-6) << c;
    EXPECT_NEAR(s.ddelta.at(0, 0, int64_t(c)) / want.ddelta[c], 1, 1e-6) << c;
  }
}

// Growth is computed too, up to infinity.
TEST(ScanCpu, GrowingStates) {
  for (Dtype t : {Dtype::f32, Dtype::f64}) {
    Scan s({.lengths = {9}, .channels = 3, .states = 2, .dtype = t, .softplus = false, .slack = 0, .name = "growing"});
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t n = 0; n < 2; ++n) s.A.set(0, c, n, 0.5 + 0.25 * double(c + n));
    s.forward(Executor::serial());
    s.backward(Executor::serial());
    expect_outputs(s);
    s.A.set(0, 0, 0, 1e6);
    s.forward(Executor::serial());
    EXPECT_TRUE(std::isinf(s.final.at(0, 0, 0)));
  }
}

TEST(ScanCpu, LongSequence) {
  expect_right({.lengths = {20000, 3}, .channels = 3, .states = 4, .name = "long"});
  expect_right({.lengths = {20000}, .channels = 2, .states = 2, .complex = true, .name = "long complex"});
}

TEST(ScanCpu, ManySequences) {
  std::vector<int> lengths(70001);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = int(i % 3);
  expect_right({.lengths = lengths, .channels = 2, .states = 2, .name = "many"});
}

// Token by token from a pool: the bits of the forward, whatever else is in the call.
TEST(ScanCpu, StepsAreTheForward) {
  for (Dtype t : kDtypes)
    for (bool complex : {false, true})
      for (bool constant : {false, true}) {
        ScanCase c = {.lengths = {7, 40, 1, 33},
                      .channels = 40,
                      .states = 7,
                      .dtype = t,
                      .complex = complex,
                      .constant_B = constant,
                      .constant_C = constant,
                      .slack = 0};
        Scan s(c);
        s.forward(Executor::serial());
        const int64_t slots = 6;
        Tensor pool(s.param, slots, c.channels, s.width()), out(t, s.total(), 1, c.channels);
        const std::vector<int32_t> slot_of = {4, 0, 5, 2};
        for (size_t i = 0; i < slot_of.size(); ++i) {
          const size_t bytes = s.initial.token * size_of(s.param);
          std::memcpy(pool.memory.data() + slot_of[i] * bytes, s.initial.memory.data() + i * bytes, bytes);
        }
        const Tensor before = pool;
        // Every sequence by itself, cut into calls of some tokens; other calls hold a skipped sequence in front.
        for (int64_t i = 0; i < s.sequences(); ++i) {
          for (int64_t at = s.cu[i], step = 1; at < s.cu[i + 1]; at += step, step = step % 3 + 1) {
            step = std::min<int64_t>(step, s.cu[i + 1] - at);
            ScanProblem p = s.problem();
            const std::vector<int32_t> cu = {0, int32_t(step)};
            const auto move = [&](const void*& data, int64_t elements, Dtype type) {
              if (data) data = static_cast<const char*>(data) + elements * int64_t(size_of(type));
            };
            p.total = step, p.sequences = 1, p.cu_seqlens = cu.data(), p.initial_states = nullptr;
            move(p.u.data, at * s.u.token, t), move(p.delta.data, at * s.delta.token, t);
            move(p.z.data, at * s.z.token, t);
            if (!constant) {
              move(p.B.tokens.data, at * s.B.token, s.B.dtype), move(p.C.tokens.data, at * s.C.token, s.C.dtype);
            }
            scan_step({.problem = p,
                       .pool = pool.memory.data(),
                       .slots = slots,
                       .indices = &slot_of[size_t(i)],
                       .out = out.memory.data() + at * out.token * int64_t(size_of(t))},
                      at % 2 ? threaded() : Executor::serial());
          }
          const size_t bytes = s.final.token * size_of(s.param);
          EXPECT_EQ(
              std::memcmp(pool.memory.data() + slot_of[size_t(i)] * bytes, s.final.memory.data() + i * bytes, bytes),
              0);
        }
        expect_same_rows(out, 0, s.out, 0, out.total, "out");
        for (int64_t slot : {1, 3}) expect_same_rows(pool, slot, before, slot, 1, "untouched slot");
        EXPECT_TRUE(pool.memory.intact() && out.memory.intact());
      }
}

TEST(ScanCpu, StepsOfManyAndSkipped) {
  Scan s({.lengths = {3, 1, 0, 2, 1}, .channels = 40, .slack = 2});
  s.forward(Executor::serial());
  const std::vector<int32_t> indices = {1, -1, 0, 4, 5};  // the second and the last are skipped
  Tensor pool(s.param, 5, 40, s.width()), out(s.c.dtype, s.total(), 1, 40);
  const size_t bytes = s.initial.token * size_of(s.param);
  for (int i : {0, 2, 3}) {
    std::memcpy(pool.memory.data() + indices[size_t(i)] * bytes, s.initial.memory.data() + i * bytes, bytes);
  }
  const Tensor before = pool;
  scan_step({.problem = s.problem(),
             .pool = pool.memory.data(),
             .slots = 5,
             .indices = indices.data(),
             .out = out.memory.data()},
            threaded());
  for (int64_t i = 0; i < 5; ++i) {
    const int64_t rows = s.cu[i + 1] - s.cu[i];
    if (i == 1 || i == 4) {
      for (int64_t c = 0; c < 40; ++c) EXPECT_EQ(out.at(s.cu[i], 0, c), 0);
    } else {
      expect_same_rows(out, s.cu[i], s.out, s.cu[i], rows, "out");
      expect_same_rows(pool, indices[size_t(i)], s.final, i, 1, "state");
    }
  }
  for (int64_t slot : {2, 3}) expect_same_rows(pool, slot, before, slot, 1, "untouched slot");
  for (int64_t t = s.cu.back(); t < s.total(); ++t) EXPECT_EQ(out.at(t, 0, 0), 0);

  // Without indices sequence i has slot i.
  Tensor all = s.initial, again(s.c.dtype, s.total(), 1, 40);
  scan_step(
      {.problem = s.problem(), .pool = all.memory.data(), .slots = 5, .indices = nullptr, .out = again.memory.data()},
      threaded());
  expect_same_rows(again, 0, s.out, 0, s.total(), "out");
  expect_same_rows(all, 0, s.final, 0, 5, "states");
}

}  // namespace
}  // namespace packseq::testing
