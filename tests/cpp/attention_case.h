// One attention problem with its tensors, and the double loop that says what is right.
#pragma once
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "guarded.h"

namespace packseq::testing {

struct Case {
  std::vector<int> len_q = {5, 0, 37, 1, 130}, len_k = {};  // len_k as len_q where empty
  int heads = 2, kv_heads = 2, dim = 16, dim_v = 16;
  Dtype dtype = Dtype::f32;
  bool causal = false;
  int64_t window_left = -1, window_right = -1, sink_tokens = 0;
  double softcap = 0, scale = 0.3;
  bool alibi = false, sinks = false, dlse = true;
  int slack_q = 3, slack_k = 5;
  bool strided = false;  // tokens and heads further apart than they need be
  std::string name = "case";
};

// A packed tensor with strides, in memory between guard bands.
struct Tensor {
  Guarded memory;
  Dtype dtype;
  int64_t total, heads, dim, token, head;

  Tensor(Dtype t, int64_t total_, int64_t heads_, int64_t dim_, bool strided = false)
      : memory(size_t(total_) * (heads_ * (dim_ + (strided ? 3 : 0)) + (strided ? 5 : 0)) * size_of(t)),
        dtype(t),
        total(total_),
        heads(heads_),
        dim(dim_),
        token(heads_ * (dim_ + (strided ? 3 : 0)) + (strided ? 5 : 0)),
        head(dim_ + (strided ? 3 : 0)) {}

  double at(int64_t t, int64_t h, int64_t d = 0) const { return read(memory.data(), t * token + h * head + d, dtype); }
  void set(int64_t t, int64_t h, int64_t d, double x) { write(memory.data(), t * token + h * head + d, dtype, x); }
  Packed packed() const { return {memory.data(), token, head}; }

  // Rows begin .. end get random numbers.
  void fill(std::mt19937& random, int64_t begin, int64_t end) {
    std::normal_distribution<double> normal;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; ++d) set(t, h, d, normal(random));
  }
};

// The tensors of one call. Inputs' slack rows and gaps hold NaN, and so do outputs before the call.
struct Attention {
  const Case c;
  const Dtype stat;
  std::vector<int32_t> cu_q, cu_k;
  Tensor q, k, v, dout, slopes, sinks, dlse;
  Tensor out, lse, dq, dk, dv, dsinks;

  explicit Attention(const Case& c_, unsigned seed = 1)
      : c(c_),
        stat(c.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32),
        cu_q(boundaries(c.len_q)),
        cu_k(boundaries(c.len_k.empty() ? c.len_q : c.len_k)),
        q(c.dtype, cu_q.back() + c.slack_q, c.heads, c.dim, c.strided),
        k(c.dtype, cu_k.back() + c.slack_k, c.kv_heads, c.dim, c.strided),
        v(c.dtype, cu_k.back() + c.slack_k, c.kv_heads, c.dim_v, c.strided),
        dout(c.dtype, q.total, c.heads, c.dim_v, c.strided),
        slopes(stat, 1, c.heads, 1),
        sinks(stat, 1, c.heads, 1),
        dlse(stat, q.total, c.heads, 1),
        out(c.dtype, q.total, c.heads, c.dim_v),
        lse(stat, q.total, c.heads, 1),
        dq(c.dtype, q.total, c.heads, c.dim),
        dk(c.dtype, k.total, c.kv_heads, c.dim),
        dv(c.dtype, k.total, c.kv_heads, c.dim_v),
        dsinks(stat, 1, c.heads, 1) {
    std::mt19937 random(seed);
    q.fill(random, 0, cu_q.back());
    dout.fill(random, 0, cu_q.back());
    dlse.fill(random, 0, cu_q.back());
    k.fill(random, 0, cu_k.back());
    v.fill(random, 0, cu_k.back());
    sinks.fill(random, 0, 1);
    for (int h = 0; h < c.heads; ++h) slopes.set(0, h, 0, std::exp2(-2.0 * (h + 1) / c.heads) * 0.1);
  }

  static std::vector<int32_t> boundaries(const std::vector<int>& lengths) {
    std::vector<int32_t> cu = {0};
    for (int n : lengths) cu.push_back(cu.back() + n);
    return cu;
  }

  AttentionProblem problem() const {
    return {.dtype = c.dtype,
            .total_q = q.total,
            .total_k = k.total,
            .sequences = int64_t(cu_q.size()) - 1,
            .heads = c.heads,
            .kv_heads = c.kv_heads,
            .dim = c.dim,
            .dim_v = c.dim_v,
            .cu_seqlens_q = cu_q.data(),
            .cu_seqlens_k = cu_k.data(),
            .q = q.packed(),
            .k = k.packed(),
            .v = v.packed(),
            .scale = c.scale,
            .causal = c.causal,
            .window_left = c.window_left,
            .window_right = c.window_right,
            .sink_tokens = c.sink_tokens,
            .softcap = c.softcap,
            .alibi_slopes = c.alibi ? slopes.memory.data() : nullptr,
            .sinks = c.sinks ? sinks.memory.data() : nullptr};
  }

  void forward(const Executor& executor) {
    attention_forward({.problem = problem(), .out = out.memory.data(), .lse = lse.memory.data(), .workspace = nullptr},
                      executor);
  }

  void backward(const Executor& executor) {
    attention_backward({.problem = problem(),
                        .dout = dout.packed(),
                        .out = out.memory.data(),
                        .lse = lse.memory.data(),
                        .dlse = c.dlse ? dlse.memory.data() : nullptr,
                        .dq = dq.memory.data(),
                        .dk = dk.memory.data(),
                        .dv = dv.memory.data(),
                        .dsinks = c.sinks ? dsinks.memory.data() : nullptr,
                        .workspace = nullptr},
                       executor);
  }

  std::vector<const Tensor*> outputs() const {
    std::vector<const Tensor*> all = {&out, &lse, &dq, &dk, &dv};
    if (c.sinks) all.push_back(&dsinks);
    return all;
  }
};

// Double loops over queries and keys, in double, straight from the formulas of attention.h.
struct Reference {
  std::vector<double> out, lse, dq, dk, dv, dsinks;

  explicit Reference(const Attention& a)
      : out(a.q.total * a.c.heads * a.c.dim_v),
        lse(a.q.total * a.c.heads),
        dq(a.q.total * a.c.heads * a.c.dim),
        dk(a.k.total * a.c.kv_heads * a.c.dim),
        dv(a.k.total * a.c.kv_heads * a.c.dim_v),
        dsinks(a.c.heads) {
    for (size_t s = 0; s + 1 < a.cu_q.size(); ++s)
      for (int h = 0; h < a.c.heads; ++h)
        for (int t = a.cu_q[s]; t < a.cu_q[s + 1]; ++t) row(a, s, h, t);
  }

 private:
  static bool visible(const Case& c, int64_t i, int64_t j) {
    const bool left = c.window_left < 0 || j >= i - c.window_left;
    const bool right = c.window_right < 0 || j <= i + c.window_right;
    return (!c.causal || j <= i) && ((left && right) || j < c.sink_tokens);
  }

  void row(const Attention& a, size_t s, int h, int64_t t) {
    const Case& c = a.c;
    const int kv = h / (c.heads / c.kv_heads);
    const int64_t k0 = a.cu_k[s], len_k = a.cu_k[s + 1] - k0, len_q = a.cu_q[s + 1] - a.cu_q[s];
    const int64_t i = t - a.cu_q[s] + len_k - len_q;
    constexpr double none = -std::numeric_limits<double>::infinity();
    std::vector<double> score(len_k, none), slope(len_k, 1);
    double most = c.sinks ? a.sinks.at(0, h) : none;
    for (int64_t j = 0; j < len_k; ++j) {
      if (!visible(c, i, j)) continue;
      double x = 0;
      for (int d = 0; d < c.dim; ++d) x += a.q.at(t, h, d) * a.k.at(k0 + j, kv, d);
      x *= c.scale;
      if (c.softcap > 0) {
        const double cap = std::tanh(x / c.softcap);
        x = c.softcap * cap, slope[j] = 1 - cap * cap;
      }
      if (c.alibi) x -= a.slopes.at(0, h) * std::abs(double(i - j));
      score[j] = x;
      most = std::max(most, x);
    }
    double sum = c.sinks ? std::exp(a.sinks.at(0, h) - most) : 0;
    for (double x : score) sum += x == none ? 0 : std::exp(x - most);
    const int64_t at = t * c.heads + h;
    lse[at] = sum > 0 ? most + std::log(sum) : none;
    double delta = 0;
    for (int64_t j = 0; j < len_k; ++j) {
      const double p = score[j] == none ? 0 : std::exp(score[j] - lse[at]);
      for (int d = 0; d < c.dim_v; ++d) out[at * c.dim_v + d] += p * a.v.at(k0 + j, kv, d);
    }
    for (int d = 0; d < c.dim_v; ++d) delta += out[at * c.dim_v + d] * a.dout.at(t, h, d);
    if (c.dlse) delta -= a.dlse.at(t, h);
    if (c.sinks) dsinks[h] -= std::exp(a.sinks.at(0, h) - lse[at]) * delta;
    for (int64_t j = 0; j < len_k; ++j) {
      if (score[j] == none) continue;
      const double p = std::exp(score[j] - lse[at]);
      const int64_t key = (k0 + j) * c.kv_heads + kv;
      double dp = 0;
      for (int d = 0; d < c.dim_v; ++d) {
        dp += a.dout.at(t, h, d) * a.v.at(k0 + j, kv, d);
        dv[key * c.dim_v + d] += p * a.dout.at(t, h, d);
      }
      const double ds = p * (dp - delta) * slope[j] * c.scale;
      for (int d = 0; d < c.dim; ++d) {
        dq[at * c.dim + d] += ds * a.k.at(k0 + j, kv, d);
        dk[key * c.dim + d] += ds * a.q.at(t, h, d);
      }
    }
  }
};

// The same in two calls: with the first third of every sequence's keys, then with the others. What is added to starts
// at kBefore in slack rows, which must stay; other rows of dk and dv at NaN, as the first call writes them.
struct Parts {
  static constexpr double kBefore = 7;
  std::vector<int32_t> cu_q[2], cu_k[2], positions[2];  // two sequences for each: in one of them no query
  Tensor out, sums, dq, dk, dv, delta;

  explicit Parts(const Attention& a)
      : out(a.stat, a.q.total, a.c.heads, a.c.dim_v),
        sums(a.stat, a.q.total, a.c.heads, 2),
        dq(a.stat, a.q.total, a.c.heads, a.c.dim),
        dk(a.stat, a.k.total, a.c.kv_heads, a.c.dim),
        dv(a.stat, a.k.total, a.c.kv_heads, a.c.dim_v),
        delta(a.stat, a.q.total, a.c.heads, 1) {
    for (int part : {0, 1}) {
      cu_q[part] = cu_k[part] = {0};
      for (size_t s = 0; s + 1 < a.cu_q.size(); ++s) {
        const int len_k = a.cu_k[s + 1] - a.cu_k[s], level = len_k - (a.cu_q[s + 1] - a.cu_q[s]), cut = len_k / 3;
        const int q_end = a.cu_q[s + 1], q_begin = a.cu_q[s];
        cu_q[part].insert(cu_q[part].end(), {part == 0 ? q_end : q_begin, q_end});
        cu_k[part].insert(cu_k[part].end(), {a.cu_k[s] + cut, a.cu_k[s + 1]});
        positions[part].insert(positions[part].end(), {level, 0, level, cut});
      }
    }
    for (Tensor* x : {&out, &dq, &sums}) start(*x, a.cu_q.back());
    for (Tensor* x : {&dk, &dv}) start(*x, a.cu_k.back(), std::nan(""));
    for (int64_t t = 0; t < a.cu_q.back(); ++t) {
      for (int h = 0; h < a.c.heads; ++h) {
        sums.set(t, h, 0, -std::numeric_limits<double>::infinity());
        for (int d = 0; d < a.c.dim_v; ++d) out.set(t, h, d, std::nan(""));  // not read then
      }
    }
  }

  // With the boundaries' and positions' addresses.
  static AttentionProblem problem(AttentionProblem whole, const int32_t* cu_q, const int32_t* cu_k,
                                  const int32_t* positions) {
    whole.sequences *= 2;
    whole.cu_seqlens_q = cu_q, whole.cu_seqlens_k = cu_k, whole.positions = positions;
    return whole;
  }

  // What makes results of the sums, and what the backward starts from, but for the tensors' addresses.
  static AttentionFinish finish(const Attention& a) {
    return {.dtype = a.c.dtype,
            .rows = a.q.total,
            .heads = a.c.heads,
            .dim_v = a.c.dim_v,
            .total = nullptr,
            .sums = nullptr,
            .sinks = nullptr,
            .out = nullptr,
            .lse = nullptr};
  }
  static AttentionDelta start_backward(const Attention& a) {
    return {.dtype = a.c.dtype,
            .rows = a.q.total,
            .heads = a.c.heads,
            .dim_v = a.c.dim_v,
            .dout = a.dout.packed(),
            .out = nullptr,
            .dlse = nullptr,
            .delta = nullptr};
  }

  // Slack rows have results too then, which nobody asked for.
  void finish_forward(Attention& a) {
    for (Tensor* x : {&a.out, &a.lse}) move_slack(*x, out, a.cu_q.back());
  }

  void finish_backward(Attention& a) {
    for (auto [to, from, rows] :
         {std::tuple{&a.dq, &dq, a.cu_q.back()}, {&a.dk, &dk, a.cu_k.back()}, {&a.dv, &dv, a.cu_k.back()}}) {
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t h = 0; h < to->heads; ++h)
          for (int64_t d = 0; d < to->dim; ++d) to->set(t, h, d, from->at(t, h, d));
      move_slack(*to, *from, rows);
    }
  }

 private:
  static void start(Tensor& x, int64_t rows, double value = 0) {
    for (int64_t t = 0; t < x.total; ++t)
      for (int64_t h = 0; h < x.heads; ++h)
        for (int64_t d = 0; d < x.dim; ++d) x.set(t, h, d, t < rows ? value : kBefore);
  }

  // Zeros, as if the call had written them, where the slack rows are as before; else they stay NaN.
  static void move_slack(Tensor& to, const Tensor& from, int64_t rows) {
    bool same = true;
    for (int64_t t = rows; t < from.total; ++t)
      for (int64_t h = 0; h < from.heads; ++h)
        for (int64_t d = 0; d < from.dim; ++d) same &= from.at(t, h, d) == kBefore;
    for (int64_t t = rows; t < to.total && same; ++t)
      for (int64_t h = 0; h < to.heads; ++h)
        for (int64_t d = 0; d < to.dim; ++d) to.set(t, h, d, 0);
  }
};

// f(case, seed) for combinations of mask and score options.
template <class Dtypes, class F>
void for_every_option_in_parts(const Dtypes& dtypes, const F& f) {
  unsigned seed = 0;
  for (bool causal : {false, true})
    for (auto [left, right] : {std::pair{-1, -1}, {5, 3}, {130, 150}})
      for (int sink_tokens : {0, 30})
        for (bool scores : {false, true}) {
          const Dtype dtype = dtypes[seed % std::size(dtypes)];
          f(Case{.len_q = {5, 0, 90, 33},
                 .len_k = {7, 2, 170, 20},
                 .heads = 4,
                 .kv_heads = 2,
                 .dim = 40,
                 .dim_v = 72,
                 .dtype = dtype,
                 .causal = causal,
                 .window_left = left,
                 .window_right = right,
                 .sink_tokens = sink_tokens,
                 .softcap = scores ? 2.0 : 0.0,
                 .alibi = scores,
                 .dlse = seed % 2 == 0,
                 .name = "in parts, case " + std::to_string(seed)},
            seed + 1);
          ++seed;
        }
}

}  // namespace packseq::testing
