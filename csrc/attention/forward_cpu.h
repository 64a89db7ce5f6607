// Forward attention of one query tile: an online softmax over blocks of keys.
#pragma once
#include "attention/tile_cpu.h"

namespace packseq::PACKSEQ_ISA {

template <class T>
class ForwardTile {
  using Real = typename RealOf<T>::type;
  static constexpr int kWidth = kLanes<Real>;
  static constexpr int kPanel = 2 * kWidth;  // rows that go through the blocks together, one lane each

 public:
  ForwardTile(const AttentionForward& f, Scratch& s)
      : f_(f),
        p_(f.problem),
        transform_(f.problem),
        key_stride_(row_stride<Real>(f.problem.dim)),
        value_stride_(row_stride<Real>(f.problem.dim_v)),
        limits_(s, lane_capacity(f.problem)) {
    const int64_t lanes = lane_capacity(p_), dim = round_up(p_.dim, kWidth), dim_v = round_up(p_.dim_v, kWidth);
    q_ = s.take<Real>(lanes * dim);
    out_ = s.take<Real>(lanes * dim_v);
    top_ = s.take<Real>(lanes);
    sum_ = s.take<Real>(lanes);
    keys_ = s.take<Real>(kKeyBlock * key_stride_);
    values_ = s.take<Real>(kKeyBlock * value_stride_);
    scores_ = s.take<Real>(kKeyBlock * kPanel);
    square_ = s.take<Real>(kWidth * most(dim, dim_v));
    // Where the score is the product times the scale, the scale waits until the exponent: its sign goes into q, so that
    // the largest product is the largest score.
    plain_ = !transform_.capped && !transform_.biased && !p_.sinks && p_.scale != 0;
    unit_ = !plain_ ? 1 : p_.scale < 0 ? -p_.scale : p_.scale;
    exponent_ = Real(unit_ * kLog2e);
  }

  // `next` is the tile that this thread does afterwards.
  void run(const QueryTile& t, const QueryTile* next) {
    const TileRows<Real> tile(p_, t);
    const Mask mask(p_, t.sequence, t.q.size(), t.k.size());
    start(t, tile, mask);
    const KeyBlocks blocks(mask, t.q0, t.q1, kKeyBlock);
    for (int32_t b = 0; b < blocks.count; ++b) {
      const Range keys = block_keys(mask, t, blocks[b]);
      const int64_t row = t.k.begin + keys.begin;
      load_rows<T>(p_.k, row, keys.size(), t.kv_head, p_.dim, keys_, p_.dim, key_stride_);
      load_rows<T>(p_.v, row, keys.size(), t.kv_head, p_.dim_v, values_, p_.dim_v, value_stride_);
      Prefetch prefetch;
      if (b + 1 < blocks.count) {
        prefetch_keys(prefetch, t, block_keys(mask, t, blocks[b + 1]));
      } else {
        const auto prefetch_out = f_.sums ? prefetch_rows<Real> : prefetch_rows<T>;
        prefetch_out(prefetch, contiguous(f_.out, p_.heads, p_.dim_v), t.q.begin + t.q0, t.q1 - t.q0, tile.first_head,
                     p_.dim_v * (p_.heads / p_.kv_heads));
        if (next) prefetch_tile(prefetch, *next);
      }
      const int64_t panels = (tile.rows + kPanel - 1) / kPanel;
      prefetch.spread(panels * (gemm_groups(keys.size()) + gemm_groups(p_.dim_v)));
      for (int32_t r = 0; r < tile.rows; r += kPanel) run_panel(r, tile, mask, keys, prefetch);
    }
    finish(t, tile);
  }

  static int64_t lane_capacity(const AttentionProblem& p) {
    return round_up(most(forward_tile_rows(p), p.heads / p.kv_heads), kPanel);
  }

 private:
  // The keys of a block that some query of the tile may see.
  static Range block_keys(const Mask& mask, const QueryTile& t, int32_t block) {
    const int32_t k0 = block * kKeyBlock;
    return visible_keys(mask, t.q0, t.q1, k0, int32_t(least(int64_t(k0) + kKeyBlock, mask.len_k)));
  }

  void prefetch_keys(Prefetch& prefetch, const QueryTile& t, Range keys) const {
    prefetch_rows<T>(prefetch, p_.k, t.k.begin + keys.begin, keys.size(), t.kv_head, p_.dim);
    prefetch_rows<T>(prefetch, p_.v, t.k.begin + keys.begin, keys.size(), t.kv_head, p_.dim_v);
  }

  // The queries and the first block of keys.
  void prefetch_tile(Prefetch& prefetch, const QueryTile& t) const {
    const int64_t group = p_.heads / p_.kv_heads;
    prefetch_rows<T>(prefetch, p_.q, t.q.begin + t.q0, t.q1 - t.q0, t.kv_head * group, p_.dim * group);
    const Mask mask(p_, t.sequence, t.q.size(), t.k.size());
    const KeyBlocks blocks(mask, t.q0, t.q1, kKeyBlock);
    if (blocks.count > 0) prefetch_keys(prefetch, t, block_keys(mask, t, blocks[0]));
  }

  void run_panel(int32_t r, const TileRows<Real>& tile, const Mask& mask, Range loaded, Prefetch& prefetch) {
    const int32_t end = int32_t(least(r + kPanel, tile.rows));
    const Range queries = tile.queries_of(r, end);
    const Range keys = visible_keys(mask, queries.begin, queries.end, loaded.begin, loaded.end);
    if (!keys.size()) return;
    const bool clear = all_visible(mask, queries.begin, queries.end, keys);
    if (end - r > kWidth) {
      attend<2>(r, keys, loaded.begin, clear, prefetch);
    } else {
      attend<1>(r, keys, loaded.begin, clear, prefetch);
    }
  }

  // A panel of at most kWidth rows is kept one vector wide.
  static PACKSEQ_INLINE int panel_width(const TileRows<Real>& tile, int32_t r) {
    return tile.rows - r / kPanel * kPanel > kWidth ? kPanel : kWidth;
  }

  void start(const QueryTile& t, const TileRows<Real>& tile, const Mask& mask) {
    const int64_t padded = round_up(p_.dim, kWidth), lanes = round_up(tile.rows, kWidth);
    const T* q = static_cast<const T*>(p_.q.data) + (t.q.begin + t.q0) * p_.q.token + tile.first_head * p_.q.head;
    for (int32_t r = 0; r < lanes; r += kWidth) {
      for (int32_t i = 0; i < kWidth; ++i) {
        Real* row = square_ + i * padded;
        if (r + i < tile.rows) {
          const int32_t query = (r + i) % tile.queries, head = (r + i) / tile.queries;
          load_row(q + query * p_.q.token + head * p_.q.head, p_.dim, row, padded);
        } else {
          for (int64_t d = 0; d < padded; d += kWidth) store(row + d, Vec<Real>{});
        }
      }
      if (plain_ && p_.scale < 0) {
        for (int64_t d = 0; d < kWidth * padded; d += kWidth) store(square_ + d, -load(square_ + d));
      }
      const int width = panel_width(tile, r);
      Real* panel = q_ + r / kPanel * kPanel * padded + r % kPanel;
      for (int64_t d = 0; d < padded; d += kWidth) transpose(square_ + d, padded, panel + d * width, width);
    }
    limits_.set(p_, mask, tile, round_up(tile.rows, kPanel));
    const Real* sinks = static_cast<const Real*>(p_.sinks);
    constexpr Real none = -__builtin_huge_val();
    for (int32_t r = 0; r < round_up(tile.rows, kPanel); ++r) {
      const Real sink = sinks && r < tile.rows ? sinks[tile.head(r)] : none;
      top_[r] = sink;
      sum_[r] = sink == none ? Real(0) : sink - sink + Real(1);
    }
    const int64_t count = round_up(tile.rows, kPanel) * round_up(p_.dim_v, kWidth);
    for (int64_t i = 0; i < count; i += kWidth) store(out_ + i, Vec<Real>{});
  }

  // `loaded` is the key that keys_ and values_ start with.
  template <int N>
  void attend(int32_t r, Range keys, int32_t loaded, bool clear, Prefetch& prefetch) {
    const auto step = [&]() __attribute__((always_inline)) { prefetch.step(); };
    constexpr int width = N * kWidth;
    Real* out = out_ + r * round_up(p_.dim_v, kWidth);
    gemm<N, false, Start::zero>(Gemm<Real>{.m = keys.size(),
                                           .k = p_.dim,
                                           .a = keys_ + (keys.begin - loaded) * key_stride_,
                                           .lda = key_stride_,
                                           .b = q_ + r * round_up(p_.dim, kWidth),
                                           .ldb = width,
                                           .c = scores_,
                                           .ldc = width},
                                step);
    if (!plain_) transform<N>(r, keys);
    if (!clear) hide<N>(r, keys);
    alignas(64) Real factor[width];
    softmax<N>(r, keys.size(), factor);
    gemm<N, true, Start::scale_add>(Gemm<Real>{.m = p_.dim_v,
                                               .k = keys.size(),
                                               .a = values_ + (keys.begin - loaded) * value_stride_,
                                               .lda = value_stride_,
                                               .b = scores_,
                                               .ldb = width,
                                               .c = out,
                                               .ldc = width,
                                               .scale = factor},
                                    step);
  }

  template <int N>
  void transform(int32_t r, Range keys) {
    Vec<Real> slope;
    for (int32_t j = 0; j < keys.size(); ++j) {
      for (int v = 0; v < N; ++v) {
        Real* s = scores_ + (j * N + v) * kWidth;
        store(s, transform_(load(s), limits_, r + v * kWidth, keys.begin + j, slope));
      }
    }
  }

  template <int N>
  void hide(int32_t r, Range keys) {
    const Vec<Real> hidden = splat(Real(-__builtin_huge_val()));
    for (int32_t j = 0; j < keys.size(); ++j) {
      for (int v = 0; v < N; ++v) {
        Real* s = scores_ + (j * N + v) * kWidth;
        store(s, limits_.visible(r + v * kWidth, keys.begin + j) ? load(s) : hidden);
      }
    }
  }

  // Scores to probabilities relative to the largest score so far; `factor` is what earlier sums shrink by. The largest
  // one's is exactly 1, so a row that sees one key gets that key's value to the bit.
  template <int N>
  void softmax(int32_t r, int32_t keys, Real* factor) {
    for (int v = 0; v < N; ++v) {
      Real* const s = scores_ + v * kWidth;
      const Vec<Real> hidden = splat(Real(-__builtin_huge_val()));
      Vec<Real> most0 = hidden, most1 = hidden;
      int32_t j = 0;
      for (; j + 2 <= keys; j += 2) {
        most0 = max<Real>(load(s + j * N * kWidth), most0);
        most1 = max<Real>(load(s + (j + 1) * N * kWidth), most1);
      }
      if (j < keys) most0 = max<Real>(load(s + j * N * kWidth), most0);

      const Vec<Real> before = load(top_ + r + v * kWidth);
      const Vec<Real> top = max<Real>(before, max<Real>(most0, most1));
      const Vec<Real> base = top == hidden ? Vec<Real>{} : top;  // nothing seen so far: every term is exp(-inf)
      const Vec<Real> shrink = exp2_down<Real>((before - base) * exponent_);
      store(top_ + r + v * kWidth, top);
      store(factor + v * kWidth, shrink);

      Vec<Real> sum0{}, sum1{};
      const auto step = [&](int32_t key, Vec<Real> & sum) __attribute__((always_inline)) {
        Real* at = s + key * N * kWidth;
        const Vec<Real> p = exp2_down<Real>((load(at) - base) * exponent_);
        store(at, p);
        sum += p;
      };
      for (j = 0; j + 2 <= keys; j += 2) {
        step(j, sum0);
        step(j + 1, sum1);
      }
      if (j < keys) step(j, sum0);
      store(sum_ + r + v * kWidth, load(sum_ + r + v * kWidth) * shrink + (sum0 + sum1));
    }
  }

  void finish(const QueryTile& t, const TileRows<Real>& tile) {
    const int64_t padded = round_up(p_.dim_v, kWidth);
    const int64_t row = (t.q.begin + t.q0) * p_.heads + tile.first_head;
    for (int32_t r = 0; r < tile.rows; r += kWidth) {
      const Vec<Real> sum = load(sum_ + r);
      const Vec<Real> inverse = f_.sums ? splat(Real(1)) : sum == Real(0) ? Vec<Real>{} : Real(1) / sum;
      const int width = panel_width(tile, r);
      const Real* panel = out_ + r / kPanel * kPanel * padded + r % kPanel;
      for (int64_t d = 0; d < padded; d += kWidth) {
        Vec<Real> square[kWidth];
        PACKSEQ_UNROLL
        for (int i = 0; i < kWidth; ++i) square[i] = load(panel + (d + i) * width) * inverse;
        transpose_rows<Real>(square);
        PACKSEQ_UNROLL
        for (int i = 0; i < kWidth; ++i) store(square_ + i * padded + d, square[i]);
      }
      for (int32_t i = r; i < r + kWidth && i < tile.rows; ++i) {
        const int64_t at = row + int64_t(i % tile.queries) * p_.heads + i / tile.queries;
        const Real* const values = square_ + (i - r) * padded;
        if (f_.sums) {
          add(values, i, static_cast<Real*>(f_.out) + at * p_.dim_v, static_cast<Real*>(f_.sums) + at * 2);
        } else {
          store_row(values, p_.dim_v, static_cast<T*>(f_.out) + at * p_.dim_v);
          const double lse = sum_[i] == 0 ? -__builtin_huge_val() : top_[i] * unit_ + log(sum_[i]);
          static_cast<Real*>(f_.lse)[at] = Real(lse);
        }
      }
    }
  }

  // A row's sums, relative to its largest score, to those of other keys, relative to a power of two.
  void add(const Real* values, int32_t row, Real* out, Real* sums) const {
    if (sum_[row] == 0) return;
    const double top = double(top_[row]) * double(exponent_), level = __builtin_ceil(top);
    const double before = sums[0], both = before > level ? before : level;
    const Real keep = Real(__builtin_exp2(before - both)), factor = Real(__builtin_exp2(top - both));
    for (int64_t d = 0; d < p_.dim_v; ++d) out[d] = (keep == 0 ? 0 : out[d] * keep) + values[d] * factor;
    sums[0] = Real(both);
    sums[1] = sums[1] * keep + sum_[row] * factor;
  }

  static PACKSEQ_INLINE double log(float x) { return __builtin_logf(x); }
  static PACKSEQ_INLINE double log(double x) { return __builtin_log(x); }

  const AttentionForward& f_;
  const AttentionProblem& p_;
  const ScoreTransform<Real> transform_;
  const int64_t key_stride_, value_stride_;
  const LaneLimits<Real> limits_;
  bool plain_;
  double unit_;    // what top_ is multiplied by to make it a score
  Real exponent_;  // and an exponent of 2

  Real *q_, *out_;        // panels of [dim or dim_v, kPanel], the last one perhaps [.., kWidth]
  Real *top_, *sum_;      // of each lane: the largest score so far, and the sum relative to it
  Real *keys_, *values_;  // one block
  Real* scores_;          // [kKeyBlock, kPanel]
  Real* square_;          // kWidth rows on their way in or out
};

}  // namespace packseq::PACKSEQ_ISA
