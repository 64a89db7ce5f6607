// Attention on the GPU through the C++ API, against double loops. Shapes are small: the whole file is also run under
// compute-sanitizer's memcheck and racecheck.
#include <cmath>
#include <memory>

#include "attention_case.h"
#include "device_array.cuh"
#include "expect_close.h"

namespace packseq::testing {
namespace {

using Bytes = DeviceArray<char>;

const Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};

// A copy on the GPU of an input, its heads and tokens `gap` elements further apart; the gaps hold NaN.
struct DeviceTensor {
  Bytes memory;
  int64_t token, head;

  DeviceTensor(const Tensor& x, int64_t gap)
      : memory(rows(x, gap)), token(x.heads * (x.dim + gap) + gap), head(x.dim + gap) {}
  Packed packed() const { return {memory.data(), token, head}; }

 private:
  static std::vector<char> rows(const Tensor& x, int64_t gap) {
    const int64_t size = size_of(x.dtype), head = x.dim + gap, token = x.heads * head + gap;
    std::vector<char> all(x.total * token * size, char(0xff));
    for (int64_t t = 0; t < x.total; ++t) {
      for (int64_t h = 0; h < x.heads; ++h) {
        const char* from = x.memory.data() + (t * x.token + h * x.head) * size;
        std::copy(from, from + x.dim * size, all.data() + (t * token + h * head) * size);
      }
    }
    return all;
  }
};

void download(Tensor& to, const Bytes& from) {
  const std::vector<char> values = from.values();
  std::copy(values.begin(), values.end(), to.memory.data());
}

// The tensors of a call on the GPU. Outputs and workspaces hold NaN before it.
struct OnGpu {
  Attention& a;
  DeviceArray<int32_t> cu_q, cu_k;
  DeviceTensor q, k, v, dout, dlse, slopes, sinks;
  Bytes out, lse, dq, dk, dv, dsinks;

  explicit OnGpu(Attention& a_, int64_t gap = 0)
      : a(a_),
        cu_q(a.cu_q),
        cu_k(a.cu_k),
        q(a.q, gap),
        k(a.k, gap),
        v(a.v, gap),
        dout(a.dout, gap),
        dlse(a.dlse, 0),
        slopes(a.slopes, 0),
        sinks(a.sinks, 0),
        out(a.out.memory.bytes()),
        lse(a.lse.memory.bytes()),
        dq(a.dq.memory.bytes()),
        dk(a.dk.memory.bytes()),
        dv(a.dv.memory.bytes()),
        dsinks(a.dsinks.memory.bytes()) {}

  AttentionProblem problem() const {
    AttentionProblem p = a.problem();
    p.cu_seqlens_q = cu_q.data(), p.cu_seqlens_k = cu_k.data();
    p.q = q.packed(), p.k = k.packed(), p.v = v.packed();
    if (p.alibi_slopes) p.alibi_slopes = slopes.memory.data();
    if (p.sinks) p.sinks = sinks.memory.data();
    return p;
  }

  void forward() const {
    const AttentionProblem p = problem();
    const Bytes workspace(int64_t(attention_forward_workspace(p)));
    attention_forward({.problem = p, .out = out.data(), .lse = lse.data(), .workspace = workspace.data()}, nullptr);
    workspace.values();  // nothing beside it was written
  }

  void backward() const {
    const AttentionProblem p = problem();
    run({.problem = p,
         .dout = dout.packed(),
         .out = out.data(),
         .lse = lse.data(),
         .dlse = a.c.dlse ? dlse.memory.data() : nullptr,
         .dq = dq.data(),
         .dk = dk.data(),
         .dv = dv.data(),
         .dsinks = a.c.sinks ? dsinks.data() : nullptr,
         .workspace = nullptr});
  }

  static void run(AttentionBackward call) {
    const Bytes workspace(int64_t(attention_backward_workspace(call)));
    call.workspace = workspace.data();
    attention_backward(call, nullptr);
    workspace.values();
  }

  void download() const {
    testing::download(a.out, out), testing::download(a.lse, lse), testing::download(a.dq, dq);
    testing::download(a.dk, dk), testing::download(a.dv, dv), testing::download(a.dsinks, dsinks);
  }
};

void run(Attention& a, int64_t gap = 0) {
  const OnGpu gpu(a, gap);
  gpu.forward();
  gpu.backward();
  gpu.download();
}

void expect_right(const Attention& a) {
  const Case& c = a.c;
  const Reference want(a);
  const double t = tolerance(c.dtype);
  expect_close(a.out, want.out, t, c.name + ": out");
  expect_close(a.lse, want.lse, 4e-6, c.name + ": lse");
  expect_close(a.dq, want.dq, 2 * t, c.name + ": dq");
  expect_close(a.dk, want.dk, 2 * t, c.name + ": dk");
  expect_close(a.dv, want.dv, 2 * t, c.name + ": dv");
  if (c.sinks) expect_close(a.dsinks, want.dsinks, 4 * t, c.name + ": dsinks");
}

void expect_right(const Case& c, unsigned seed = 1, int64_t gap = 0) {
  Attention a(c, seed);
  run(a, gap);
  expect_right(a);
}

std::vector<char> bytes_of(const Tensor& x) { return {x.memory.data(), x.memory.data() + x.memory.bytes()}; }

void expect_right_in_parts(const Case& c, unsigned seed) {
  Attention a(c, seed);
  Parts parts(a);
  const OnGpu gpu(a);
  const Bytes out(bytes_of(parts.out)), sums(bytes_of(parts.sums)), dq(bytes_of(parts.dq)), dk(bytes_of(parts.dk)),
      dv(bytes_of(parts.dv));
  const auto with_part = [&](int i, const auto& f) {
    const DeviceArray<int32_t> cu_q(parts.cu_q[i]), cu_k(parts.cu_k[i]), positions(parts.positions[i]);
    f(Parts::problem(gpu.problem(), cu_q.data(), cu_k.data(), positions.data()));
  };
  for (int i : {0, 1}) {
    with_part(i, [&](const AttentionProblem& p) {
      const Bytes workspace(int64_t(attention_forward_workspace(p)));
      attention_forward(
          {.problem = p, .out = out.data(), .lse = nullptr, .workspace = workspace.data(), .sums = sums.data()},
          nullptr);
      workspace.values();
    });
  }
  download(parts.out, out);
  AttentionFinish finish = Parts::finish(a);
  finish.total = out.data(), finish.sums = sums.data(), finish.out = gpu.out.data(), finish.lse = gpu.lse.data();
  attention_finish(finish, nullptr);
  AttentionDelta start = Parts::start_backward(a);
  const Bytes delta(bytes_of(parts.delta));
  start.dout = gpu.dout.packed(), start.out = gpu.out.data(), start.delta = delta.data();
  start.dlse = c.dlse ? gpu.dlse.memory.data() : nullptr;
  attention_delta(start, nullptr);
  delta.values();
  download(a.out, gpu.out), download(a.lse, gpu.lse);
  parts.finish_forward(a);
  for (int i : {0, 1}) {
    with_part(i, [&](const AttentionProblem& p) {
      OnGpu::run({.problem = p,
                  .dout = gpu.dout.packed(),
                  .out = nullptr,
                  .lse = gpu.lse.data(),
                  .dlse = nullptr,
                  .dq = dq.data(),
                  .dk = dk.data(),
                  .dv = dv.data(),
                  .dsinks = nullptr,
                  .workspace = nullptr,
                  .delta = delta.data(),
                  .add_to_keys = i > 0});
    });
  }
  download(parts.dq, dq), download(parts.dk, dk), download(parts.dv, dv);
  parts.finish_backward(a);
  expect_right(a);
}

class AttentionCuda : public GpuTest {};

void expect_right_for_every_dim() {
  for (Dtype t : kDtypes) {
    for (auto [dim, dim_v] : {std::pair{8, 8},
                              {40, 40},
                              {64, 64},
                              {96, 96},
                              {128, 128},
                              {192, 192},
                              {256, 256},
                              {64, 16},
                              {24, 104},
                              {136, 248}}) {
      expect_right({.len_q = {0, 1, 63, 0, 64, 65, 130},
                    .heads = 2,
                    .kv_heads = 1,
                    .dim = dim,
                    .dim_v = dim_v,
                    .dtype = t,
                    .causal = dim % 16 == 0,
                    .scale = 1 / std::sqrt(double(dim)),
                    .name = std::string(name_of(t)) + " dims " + std::to_string(dim) + ", " + std::to_string(dim_v)});
    }
  }
}

TEST_F(AttentionCuda, HeadDims) { expect_right_for_every_dim(); }

// The tiles for chips with little shared memory, which others run only when told to.
TEST_F(AttentionCuda, HeadDimsInSmallTiles) {
  setenv("PACKSEQ_SMALL_TILES", "1", 1);
  expect_right_for_every_dim();
  unsetenv("PACKSEQ_SMALL_TILES");
}

TEST_F(AttentionCuda, Lengths) {
  for (Dtype t : kDtypes) {
    for (int n : {1, 2, 63, 64, 65, 127, 128, 129, 257}) {
      for (int dim : {64, 128}) {
        const std::string name = std::string(name_of(t)) + " length " + std::to_string(n);
        expect_right({.len_q = {n},
                      .heads = 1,
                      .kv_heads = 1,
                      .dim = dim,
                      .dim_v = dim,
                      .dtype = t,
                      .causal = n % 2 == 0,
                      .scale = 0.1,
                      .slack_q = 0,
                      .slack_k = 0,
                      .name = name});
      }
    }
  }
}

TEST_F(AttentionCuda, EmptyThings) {
  for (Dtype t : kDtypes) {
    expect_right({.len_q = {}, .dtype = t, .slack_q = 0, .slack_k = 0, .name = "nothing"});
    expect_right({.len_q = {}, .dtype = t, .slack_q = 4, .slack_k = 140, .name = "slack alone"});
    expect_right({.len_q = {0, 0, 0}, .dtype = t, .slack_q = 0, .slack_k = 0, .name = "no tokens"});
    expect_right({.len_q = {0, 4, 0, 0, 2, 0}, .dtype = t, .sinks = true, .slack_q = 1, .name = "gaps"});
    expect_right({.len_q = {3, 0, 5}, .len_k = {0, 4, 6}, .dtype = t, .name = "no keys, no queries"});
    expect_right({.len_q = {3, 0, 5}, .len_k = {0, 4, 6}, .dtype = t, .causal = true, .sinks = true, .name = "sinks"});
    expect_right({.len_q = {3, 5}, .len_k = {0, 0}, .dtype = t, .slack_k = 0, .name = "no keys at all"});
    expect_right({.len_q = {0, 0}, .len_k = {3, 70}, .dtype = t, .slack_q = 0, .name = "no queries at all"});
  }
}

TEST_F(AttentionCuda, UnequalLengthsAndRowsWithoutKeys) {
  for (Dtype t : kDtypes) {
    for (bool causal : {false, true}) {
      for (bool sinks : {false, true}) {
        expect_right({.len_q = {40, 7, 150, 1},
                      .len_k = {9, 200, 3, 300},
                      .dtype = t,
                      .causal = causal,
                      .sinks = sinks,
                      .name = std::string(name_of(t)) + " unequal"});
      }
    }
  }
}

TEST_F(AttentionCuda, GroupedHeads) {
  for (Dtype t : kDtypes) {
    for (int kv_heads : {1, 2, 8}) {
      for (bool causal : {false, true}) {
        expect_right({.len_q = {65, 3, 140},
                      .heads = 8,
                      .kv_heads = kv_heads,
                      .dtype = t,
                      .causal = causal,
                      .alibi = true,
                      .name = std::string(name_of(t)) + " 8 over " + std::to_string(kv_heads)});
      }
    }
  }
}

// Every combination of mask and score options, over lengths that do not fit the blocks.
TEST_F(AttentionCuda, EveryOption) {
  unsigned seed = 0;
  for (bool causal : {false, true})
    for (auto [left, right] : {std::pair{-1, -1}, {0, -1}, {5, 3}, {40, 0}, {-1, 7}, {130, 150}})
      for (int sink_tokens : {0, 4, 140})
        for (double softcap : {0.0, 2.0})
          for (bool alibi : {false, true})
            for (bool sinks : {false, true}) {
              const Dtype dtype = kDtypes[seed % 3];
              expect_right({.len_q = {5, 0, 150, 33},
                            .len_k = {7, 2, 290, 20},
                            .dim = 8,
                            .dim_v = 16,
                            .dtype = dtype,
                            .causal = causal,
                            .window_left = left,
                            .window_right = right,
                            .sink_tokens = sink_tokens,
                            .softcap = softcap,
                            .alibi = alibi,
                            .sinks = sinks,
                            .dlse = seed % 2 == 0,
                            .name = std::string(name_of(dtype)) + " causal " + std::to_string(causal) + " window " +
                                    std::to_string(left) + ", " + std::to_string(right) + " sink tokens " +
                                    std::to_string(sink_tokens) + " softcap " + std::to_string(softcap) + " alibi " +
                                    std::to_string(alibi) + " sinks " + std::to_string(sinks)},
                           ++seed);
            }
}

TEST_F(AttentionCuda, KeysInParts) { for_every_option_in_parts(kDtypes, expect_right_in_parts); }

TEST_F(AttentionCuda, KeysInPartsForEveryDim) {
  for (Dtype t : kDtypes) {
    for (int dim : {8, 64, 96, 128, 192, 256}) {
      expect_right_in_parts({.len_q = {0, 1, 63, 130},
                             .heads = 4,
                             .kv_heads = 2,
                             .dim = dim,
                             .dim_v = dim,
                             .dtype = t,
                             .causal = true,
                             .scale = 1 / std::sqrt(double(dim)),
                             .name = std::string(name_of(t)) + " in parts, dim " + std::to_string(dim)},
                            1);
    }
  }
}

TEST_F(AttentionCuda, Scales) {
  for (Dtype t : kDtypes) {
    for (double scale : {0.0, -0.4, 1.0}) {
      const std::string name = std::string(name_of(t)) + " scale " + std::to_string(scale);
      expect_right({.dtype = t, .scale = scale, .name = name});
      expect_right({.dtype = t, .softcap = 5, .scale = scale, .name = name + " and softcap"});
    }
  }
}

// Rows that only fill up a tile stand far from the keys: their scores would overflow.
TEST_F(AttentionCuda, NegativeSlopes) {
  for (Dtype t : kDtypes) {
    Attention a({.len_q = {65, 20}, .dtype = t, .alibi = true});
    for (int h = 0; h < a.c.heads; ++h) a.slopes.set(0, h, 0, -2 - h);
    run(a);
    const Reference want(a);
    const std::string name = name_of(t);
    expect_close(a.out, want.out, tolerance(t), name + ": out");
    expect_close(a.dq, want.dq, 2 * tolerance(t), name + ": dq");
    expect_close(a.dk, want.dk, 2 * tolerance(t), name + ": dk");
    expect_close(a.dv, want.dv, 2 * tolerance(t), name + ": dv");
  }
}

// A sink of -inf is none, also in rows that see no key.
TEST_F(AttentionCuda, SinkOfMinusInfinity) {
  for (Dtype t : kDtypes) {
    Attention a({.len_q = {6, 70}, .len_k = {2, 70}, .dtype = t, .causal = true, .sinks = true});
    a.sinks.set(0, 0, 0, -INFINITY);
    run(a);
    EXPECT_EQ(a.lse.at(0, 0), -INFINITY) << name_of(t);
    EXPECT_EQ(a.dsinks.at(0, 0), 0) << name_of(t);
    for (const Tensor* x : {&a.out, &a.dq, &a.dk, &a.dv}) {
      for (int64_t row = 0; row < x->total; ++row) {
        for (int64_t d = 0; d < x->dim; ++d) ASSERT_TRUE(std::isfinite(x->at(row, 0, d))) << name_of(t) << row;
      }
    }
  }
}

TEST_F(AttentionCuda, Strides) {
  for (Dtype t : kDtypes) {
    expect_right({.len_q = {130, 20},
                  .heads = 4,
                  .dim = 40,
                  .dim_v = 72,
                  .dtype = t,
                  .causal = true,
                  .name = std::string(name_of(t)) + " strided"},
                 1, 8);
  }
}

TEST_F(AttentionCuda, ExpandedGradient) {
  for (Dtype t : kDtypes) {
    Attention a({.dtype = t});
    for (int64_t d = 0; d < a.c.dim_v; ++d) a.dout.set(0, 0, d, 0.5 + double(d) / 8);
    for (int64_t row = 0; row < a.dout.total; ++row)
      for (int64_t h = 0; h < a.c.heads; ++h)
        for (int64_t d = 0; d < a.c.dim_v; ++d) a.dout.set(row, h, d, a.dout.at(0, 0, d));
    OnGpu gpu(a);
    gpu.dout.token = gpu.dout.head = 0;
    gpu.forward(), gpu.backward(), gpu.download();
    const Reference want(a);
    expect_close(a.dq, want.dq, 2 * tolerance(t), "dq");
    expect_close(a.dk, want.dk, 2 * tolerance(t), "dk");
    expect_close(a.dv, want.dv, 2 * tolerance(t), "dv");
  }
}

Case rich(Dtype t, int dim) {
  return {.len_q = {64, 5, 300, 1, 0, 131, 17},
          .len_k = {70, 5, 260, 40, 3, 131, 400},
          .heads = 4,
          .kv_heads = 2,
          .dim = dim,
          .dim_v = dim,
          .dtype = t,
          .causal = true,
          .window_left = 100,
          .sink_tokens = 3,
          .softcap = 10,
          .scale = 0.1,
          .alibi = true,
          .sinks = true};
}

template <class F>
void for_rich(const F& f) {
  for (Dtype t : kDtypes) {
    for (int dim : {24, 128, 256}) f(rich(t, dim));
  }
}

TEST_F(AttentionCuda, SameBitsEveryTime) {
  for_rich([](const Case& c) {
    Attention first(c), second(c);
    run(first), run(second, 8);
    for (size_t i = 0; i < first.outputs().size(); ++i) {
      const Tensor &x = *first.outputs()[i], &y = *second.outputs()[i];
      EXPECT_EQ(std::memcmp(x.memory.data(), y.memory.data(), x.memory.bytes()), 0) << name_of(c.dtype) << i;
    }
  });
}

TEST_F(AttentionCuda, SameBitsAloneAndPacked) {
  for_rich([](const Case& all) {
    Attention packed(all);
    run(packed);
    for (size_t s = 0; s < all.len_q.size(); ++s) {
      Case c = all;
      c.len_q = {all.len_q[s]}, c.len_k = {all.len_k[s]}, c.slack_q = c.slack_k = 0;
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
      run(alone);
      const std::string what = std::string(name_of(c.dtype)) + " sequence " + std::to_string(s);
      expect_same_rows(packed.out, q0, alone.out, 0, len_q, what + ": out");
      expect_same_rows(packed.lse, q0, alone.lse, 0, len_q, what + ": lse");
      expect_same_rows(packed.dq, q0, alone.dq, 0, len_q, what + ": dq");
      expect_same_rows(packed.dk, k0, alone.dk, 0, len_k, what + ": dk");
      expect_same_rows(packed.dv, k0, alone.dv, 0, len_k, what + ": dv");
    }
  });
}

TEST_F(AttentionCuda, NanStaysInItsSequence) {
  for (Dtype t : kDtypes) {
    const Case c = rich(t, 24);
    for (size_t s = 0; s < c.len_q.size(); ++s) {
      Attention clean(c), bad(c);
      const int64_t q0 = bad.cu_q[s], q1 = bad.cu_q[s + 1], k0 = bad.cu_k[s], k1 = bad.cu_k[s + 1];
      for (Tensor* x : {&bad.q, &bad.dout, &bad.dlse, &bad.k, &bad.v}) {
        const bool by_query = x->total == bad.q.total;
        for (int64_t row = by_query ? q0 : k0; row < (by_query ? q1 : k1); ++row)
          for (int64_t h = 0; h < x->heads; ++h)
            for (int64_t d = 0; d < x->dim; ++d) x->set(row, h, d, std::nan(""));
      }
      run(clean), run(bad);
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

TEST_F(AttentionCuda, NanInAVisibleKeyIsSeen) {
  for (Dtype t : kDtypes) {
    Attention a({.len_q = {20}, .dtype = t});
    a.k.set(7, 0, 2, std::nan(""));
    run(a);
    EXPECT_TRUE(std::isnan(a.out.at(3, 0, 0)));
    EXPECT_TRUE(std::isnan(a.lse.at(3, 0)));
    EXPECT_FALSE(std::isnan(a.out.at(3, 1, 0)));
  }
}

TEST_F(AttentionCuda, MalformedBoundariesStayInside) {
  for (Dtype t : kDtypes) {
    for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 500, 1000, -7, 40, 12},
                                           {-100, -5, 2000000000, 3, 2, 1},
                                           {9, 9, 9, 9, 9, 9},
                                           {5, 4, 3, 2, 1, 0}}) {
      Attention a({.dtype = t, .sinks = true});
      a.cu_q = a.cu_k = cu;
      run(a);  // which looks at the guard bands
    }
  }
}

// Large scores: the largest is far from the others, and exp would overflow without it.
TEST_F(AttentionCuda, LargeScores) {
  for (Dtype t : kDtypes) {
    Attention a({.len_q = {300}, .dtype = t, .scale = 100});
    run(a);
    for (const Tensor* x : {&a.out, &a.dq, &a.dk, &a.dv}) {
      for (int64_t row = 0; row < a.cu_q.back(); ++row) ASSERT_TRUE(std::isfinite(x->at(row, 0))) << name_of(t);
    }
  }
}

TEST_F(AttentionCuda, ManySequences) {
  std::vector<int> lengths(2001);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = int(i % 3);
  for (Dtype t : kDtypes) {
    expect_right(
        {.len_q = lengths, .heads = 1, .kv_heads = 1, .dim = 8, .dim_v = 8, .dtype = t, .sinks = true, .name = "many"});
  }
}

}  // namespace
}  // namespace packseq::testing
