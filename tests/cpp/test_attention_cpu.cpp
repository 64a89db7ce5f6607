// The CPU implementation of attention, against double loops.
#include <gtest/gtest.h>

#include <cstring>

#include "attention_case.h"
#include "executors.h"
#include "expect_close.h"

namespace packseq::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void expect_right(const Attention& a) {
  const Case& c = a.c;
  const Reference want(a);
  const double t = tolerance(c.dtype);
  expect_close(a.out, want.out, t, c.name + ": out");
  expect_close(a.lse, want.lse, c.dtype == Dtype::f64 ? t : 2e-6, c.name + ": lse");
  expect_close(a.dq, want.dq, 2 * t, c.name + ": dq");
  expect_close(a.dk, want.dk, 2 * t, c.name + ": dk");
  expect_close(a.dv, want.dv, 2 * t, c.name + ": dv");
  if (c.sinks) expect_close(a.dsinks, want.dsinks, 4 * t, c.name + ": dsinks");
}

void expect_right(const Case& c, unsigned seed = 1) {
  Attention a(c, seed);
  a.forward(threaded());
  a.backward(threaded());
  expect_right(a);
}

void expect_right_in_parts(const Case& c, unsigned seed) {
  Attention a(c, seed);
  Parts parts(a);
  const auto problem = [&](int i) {
    return Parts::problem(a.problem(), parts.cu_q[i].data(), parts.cu_k[i].data(), parts.positions[i].data());
  };
  for (int i : {0, 1}) {
    attention_forward({.problem = problem(i),
                       .out = parts.out.memory.data(),
                       .lse = nullptr,
                       .workspace = nullptr,
                       .sums = parts.sums.memory.data()},
                      threaded());
  }
  AttentionFinish finish = Parts::finish(a);
  finish.total = parts.out.memory.data(), finish.sums = parts.sums.memory.data();
  finish.out = a.out.memory.data(), finish.lse = a.lse.memory.data();
  attention_finish(finish, threaded());
  parts.finish_forward(a);
  AttentionDelta delta = Parts::start_backward(a);
  delta.out = a.out.memory.data(), delta.dlse = c.dlse ? a.dlse.memory.data() : nullptr;
  delta.delta = parts.delta.memory.data();
  attention_delta(delta, threaded());
  for (int i : {0, 1}) {
    attention_backward({.problem = problem(i),
                        .dout = a.dout.packed(),
                        .out = nullptr,
                        .lse = a.lse.memory.data(),
                        .dlse = nullptr,
                        .dq = parts.dq.memory.data(),
                        .dk = parts.dk.memory.data(),
                        .dv = parts.dv.memory.data(),
                        .dsinks = nullptr,
                        .workspace = nullptr,
                        .delta = parts.delta.memory.data(),
                        .add_to_keys = i > 0},
                       threaded());
  }
  parts.finish_backward(a);
  expect_right(a);
}

const Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16};

TEST(AttentionCpu, EveryDtype) {
  for (Dtype t : kDtypes) expect_right({.dtype = t, .name = name_of(t)});
}

TEST(AttentionCpu, Lengths) {
  for (int n : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 300}) {
    expect_right({.len_q = {n}, .name = std::to_string(n)});
    expect_right({.len_q = {n}, .dim = 72, .dim_v = 136, .causal = true, .name = std::to_string(n) + " wide"});
  }
}

TEST(AttentionCpu, HeadDims) {
  for (Dtype t : kDtypes) {
    for (int dim : {1, 3, 8, 15, 40, 64, 65, 96, 128, 192, 256}) {
      const int dim_v = dim == 64 ? 40 : dim == 40 ? 1 : dim;
      expect_right({.len_q = {70, 3},
                    .dim = dim,
                    .dim_v = dim_v,
                    .dtype = t,
                    .scale = 1 / std::sqrt(double(dim)),
                    .name = std::string(name_of(t)) + " dim " + std::to_string(dim)});
    }
  }
}

TEST(AttentionCpu, EmptyThings) {
  expect_right({.len_q = {}, .slack_q = 0, .slack_k = 0, .name = "nothing"});
  expect_right({.len_q = {}, .slack_q = 4, .slack_k = 4, .name = "slack alone"});
  expect_right({.len_q = {0, 0, 0}, .slack_q = 0, .slack_k = 0, .name = "no tokens"});
  expect_right({.len_q = {0, 4, 0, 0, 2, 0}, .sinks = true, .slack_q = 1, .name = "gaps"});
  expect_right({.len_q = {3, 0, 5}, .len_k = {0, 4, 6}, .name = "no keys, no queries"});
  expect_right({.len_q = {3, 0, 5}, .len_k = {0, 4, 6}, .causal = true, .sinks = true, .name = "the same with sinks"});
}

TEST(AttentionCpu, UnequalLengthsAndRowsWithoutKeys) {
  for (bool causal : {false, true}) {
    for (bool sinks : {false, true}) {
      expect_right(
          {.len_q = {40, 7, 150, 1}, .len_k = {9, 200, 3, 300}, .causal = causal, .sinks = sinks, .name = "unequal"});
    }
  }
  Attention a({.len_q = {6}, .len_k = {2}, .causal = true});
  a.forward(Executor::serial());
  EXPECT_EQ(a.lse.at(0, 0), -kInfinity);
  EXPECT_EQ(a.out.at(0, 0, 0), 0);
}

TEST(AttentionCpu, GroupedHeads) {
  for (int kv_heads : {1, 2, 4, 8}) {
    for (bool causal : {false, true}) {
      expect_right({.len_q = {65, 3, 140},
                    .heads = 8,
                    .kv_heads = kv_heads,
                    .causal = causal,
                    .alibi = true,
                    .name = "8 over " + std::to_string(kv_heads)});
    }
  }
  expect_right({.len_q = {20, 2}, .heads = 300, .kv_heads = 1, .dim = 8, .dim_v = 8, .name = "300 over 1"});
}

// Every combination of mask and score options, over lengths that do not fit the blocks.
TEST(AttentionCpu, EveryOption) {
  unsigned seed = 0;
  for (bool causal : {false, true})
    for (auto [left, right] : {std::pair{-1, -1}, {0, -1}, {5, 3}, {40, 0}, {-1, 7}, {130, 150}})
      for (int sink_tokens : {0, 4, 140})
        for (double softcap : {0.0, 2.0})
          for (bool alibi : {false, true})
            for (bool sinks : {false, true}) {
              const Dtype dtype = seed % 3 ? Dtype::f32 : Dtype::f64;
              expect_right({.len_q = {5, 0, 150, 33},
                            .len_k = {7, 2, 290, 20},
                            .heads = 4,
                            .kv_heads = 2,
                            .dim = 8,
                            .dim_v = 12,
                            .dtype = dtype,
                            .causal = causal,
                            .window_left = left,
                            .window_right = right,
                            .sink_tokens = sink_tokens,
                            .softcap = softcap,
                            .alibi = alibi,
                            .sinks = sinks,
                            .dlse = seed % 2 == 0,
                            .name = "causal " + std::to_string(causal) + " window " + std::to_string(left) + ", " +
                                    std::to_string(right) + " sink tokens " + std::to_string(sink_tokens) +
                                    " softcap " + std::to_string(softcap) + " alibi " + std::to_string(alibi) +
                                    " sinks " + std::to_string(sinks)},
                           ++seed);
            }
}

TEST(AttentionCpu, KeysInParts) { for_every_option_in_parts(kDtypes, expect_right_in_parts); }

TEST(AttentionCpu, Scales) {
  for (double scale : {0.0, -0.4, 1.0, 8.0}) {
    expect_right({.scale = scale, .name = "scale " + std::to_string(scale)});
    expect_right({.softcap = 5, .scale = scale, .name = "scale and softcap " + std::to_string(scale)});
  }
}

TEST(AttentionCpu, Strides) {
  for (Dtype t : kDtypes) {
    expect_right({.heads = 4, .dim = 20, .dtype = t, .causal = true, .strided = true, .name = "strided"});
  }
}

TEST(AttentionCpu, ExpandedGradient) {
  Attention a({});
  for (int64_t d = 0; d < a.c.dim_v; ++d) a.dout.set(0, 0, d, 0.5 + double(d));
  a.dout.token = a.dout.head = 0;
  a.forward(Executor::serial());
  a.backward(Executor::serial());
  const Reference want(a);
  expect_close(a.dq, want.dq, 8e-6, "dq");
  expect_close(a.dv, want.dv, 8e-6, "dv");
}

const Case kRich = {.len_q = {64, 5, 300, 1, 0, 131, 17},
                    .len_k = {70, 5, 260, 40, 3, 131, 400},
                    .heads = 4,
                    .kv_heads = 2,
                    .dim = 24,
                    .dim_v = 40,
                    .causal = true,
                    .window_left = 100,
                    .sink_tokens = 3,
                    .softcap = 10,
                    .alibi = true,
                    .sinks = true};

TEST(AttentionCpu, SameBitsWithAnyExecutor) {
  for (Dtype t : kDtypes) {
    Case c = kRich;
    c.dtype = t;
    Attention first(c), second(c), third(c);
    first.forward(Executor::serial()), second.forward(threaded()), third.forward(one_range());
    first.backward(Executor::serial()), second.backward(threaded()), third.backward(one_range());
    for (size_t i = 0; i < first.outputs().size(); ++i) {
      const Tensor& x = *first.outputs()[i];
      EXPECT_EQ(std::memcmp(x.memory.data(), second.outputs()[i]->memory.data(), x.memory.bytes()), 0);
      EXPECT_EQ(std::memcmp(x.memory.data(), third.outputs()[i]->memory.data(), x.memory.bytes()), 0);
    }
  }
}

TEST(AttentionCpu, SameBitsAloneAndPacked) {
  Attention packed(kRich);
  packed.forward(threaded());
  packed.backward(threaded());
  for (size_t s = 0; s < kRich.len_q.size(); ++s) {
    Case c = kRich;
    c.len_q = {kRich.len_q[s]}, c.len_k = {kRich.len_k[s]};
    Attention alone(c);
    const auto copy = [&](Tensor& to, const Tensor& from, int64_t row, int64_t rows) {
      const size_t width = from.token * size_of(from.dtype);
      std::memcpy(to.memory.data(), from.memory.data() + row * width, rows * width);
    };
    const int64_t q0 = packed.cu_q[s], k0 = packed.cu_k[s], len_q = c.len_q[0], len_k = c.len_k[0];
    copy(alone.q, packed.q, q0, len_q), copy(alone.dout, packed.dout, q0, len_q);
    copy(alone.dlse, packed.dlse, q0, len_q);
    copy(alone.k, packed.k, k0, len_k), copy(alone.v, packed.v, k0, len_k);
    copy(alone.sinks, packed.sinks, 0, 1);
    alone.forward(Executor::serial());
    alone.backward(Executor::serial());
    const std::string what = "sequence " + std::to_string(s);
    expect_same_rows(packed.out, q0, alone.out, 0, len_q, what + ": out");
    expect_same_rows(packed.lse, q0, alone.lse, 0, len_q, what + ": lse");
    expect_same_rows(packed.dq, q0, alone.dq, 0, len_q, what + ": dq");
    expect_same_rows(packed.dk, k0, alone.dk, 0, len_k, what + ": dk");
    expect_same_rows(packed.dv, k0, alone.dv, 0, len_k, what + ": dv");
  }
}

TEST(AttentionCpu, NanStaysInItsSequence) {
  for (double poison : {std::nan(""), kInfinity}) {
    for (size_t s = 0; s < kRich.len_q.size(); ++s) {
      Attention clean(kRich), bad(kRich);
      const int64_t q0 = bad.cu_q[s], q1 = bad.cu_q[s + 1], k0 = bad.cu_k[s], k1 = bad.cu_k[s + 1];
      for (Tensor* x : {&bad.q, &bad.dout, &bad.dlse, &bad.k, &bad.v}) {
        const bool by_query = x->total == bad.q.total;
        for (int64_t t = by_query ? q0 : k0; t < (by_query ? q1 : k1); ++t)
          for (int64_t h = 0; h < x->heads; ++h)
            for (int64_t d = 0; d < x->dim; ++d) x->set(t, h, d, poison);
      }
      for (Attention* a : {&clean, &bad}) a->forward(threaded()), a->backward(threaded());
      for (const auto& [x, y, begin, end] : {std::tuple{&clean.out, &bad.out, q0, q1},
                                             {&clean.lse, &bad.lse, q0, q1},
                                             {&clean.dq, &bad.dq, q0, q1},
                                             {&clean.dk, &bad.dk, k0, k1},
                                             {&clean.dv, &bad.dv, k0, k1}}) {
        expect_same_rows(*x, 0, *y, 0, begin, "before");
        expect_same_rows(*x, end, *y, end, x->total - end, "after");
      }
    }
  }
}

TEST(AttentionCpu, NanInAVisibleKeyIsSeen) {
  Attention a({.len_q = {20}});
  a.k.set(7, 0, 2, std::nan(""));
  a.forward(Executor::serial());
  EXPECT_TRUE(std::isnan(a.out.at(3, 0, 0)));
  EXPECT_TRUE(std::isnan(a.lse.at(3, 0)));
  EXPECT_FALSE(std::isnan(a.out.at(3, 1, 0)));
}

// Plain arithmetic on one weight of exactly 1 gives no gradient at all, and so does ours.
TEST(AttentionCpu, OneKeyIsExact) {
  for (int dim : {7, 64, 256}) {
    for (double scale : {0.3, -0.3}) {
      for (Dtype t : {Dtype::f32, Dtype::f64}) {
        Attention a(
            {.len_q = {1, 9}, .len_k = {1, 1}, .dim = dim, .dim_v = dim, .dtype = t, .scale = scale, .dlse = false});
        a.forward(Executor::serial());
        a.backward(Executor::serial());
        for (int h = 0; h < 2; ++h)
          for (int d = 0; d < dim; ++d) {
            for (int row : {0, 1, 9}) ASSERT_EQ(a.out.at(row, h, d), a.v.at(row > 0, h, d));
            for (int row : {0, 1, 9}) ASSERT_EQ(a.dq.at(row, h, d), 0);
            for (int row : {0, 1}) ASSERT_EQ(a.dk.at(row, h, d), 0);
          }
      }
    }
  }
}

TEST(AttentionCpu, MalformedBoundariesStayInside) {
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 500, 1000, -7, 40, 12},
                                         {-100, -5, 2000000000, 3, 2, 1},
                                         {9, 9, 9, 9, 9, 9},
                                         {5, 4, 3, 2, 1, 0}}) {
    Attention a({});
    a.cu_q = a.cu_k = cu;
    a.forward(threaded());
    a.backward(threaded());
    for (const Tensor* x : a.outputs()) EXPECT_TRUE(x->memory.intact());
  }
}

// Large scores: the largest is far from the others, and exp would overflow without it.
TEST(AttentionCpu, LargeScores) {
  expect_right({.len_q = {200}, .dtype = Dtype::f64, .scale = 20, .name = "large scores"});
  Attention a({.len_q = {300}, .scale = 1e4});
  a.forward(threaded());
  a.backward(threaded());
  for (const Tensor* x : a.outputs())
    for (int64_t t = 0; t < a.cu_q.back(); ++t) ASSERT_TRUE(std::isfinite(x->at(t, 0)));
}

TEST(AttentionCpu, ManySequences) {
  std::vector<int> lengths(70001);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = int(i % 3);
  expect_right({.len_q = lengths, .heads = 1, .kv_heads = 1, .dim = 4, .dim_v = 4, .sinks = true, .name = "many"});
}

}  // namespace
}  // namespace packseq::testing
