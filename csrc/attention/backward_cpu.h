// Backward attention of one sequence in one head of k and v: the probabilities are computed again from the log-sum-exp,
// query tile by query tile. dk and dv of the whole sequence add up in scratch, tile after tile, in a fixed order.
#pragma once
#include "attention/tile_cpu.h"

namespace packseq::PACKSEQ_ISA {

template <class T>
class BackwardSequence {
  using Real = typename RealOf<T>::type;
  static constexpr int kWidth = kLanes<Real>;

 public:
  BackwardSequence(const AttentionBackward& b, int64_t len_k, Scratch& s)
      : b_(b),
        p_(b.problem),
        transform_(b.problem),
        lanes_(lane_capacity(b.problem)),
        dim_(round_up(b.problem.dim, kWidth)),
        dim_v_(round_up(b.problem.dim_v, kWidth)),
        stride_(row_stride<Real>(b.problem.dim)),
        stride_v_(row_stride<Real>(b.problem.dim_v)),
        limits_(s, lanes_) {
    for (Real** x : {&q_t_, &dq_t_}) *x = s.take<Real>(lanes_ * dim_);
    q_ = s.take<Real>(lanes_ * stride_);
    dout_t_ = s.take<Real>(lanes_ * dim_v_);
    dout_ = s.take<Real>(lanes_ * stride_v_);
    for (Real** x : {&p_t_, &ds_t_}) *x = s.take<Real>(lanes_ * kKeyBlock);
    for (Real** x : {&lse_, &offset_}) *x = s.take<Real>(lanes_);
    row_ = s.take<Real>(most(dim_, dim_v_));
    square_ = s.take<Real>(kWidth * stride_v_);
    for (Real** x : {&k_, &dk_}) *x = s.take<Real>(len_k * stride_);
    for (Real** x : {&v_, &dv_}) *x = s.take<Real>(len_k * stride_v_);
  }

  // `next` is what this thread does afterwards.
  void run(const SequenceHead& h, const SequenceHead* next) {
    const int64_t len_q = h.q.size(), len_k = h.k.size();
    const Mask mask(p_, h.sequence, len_q, len_k);
    load_rows<T>(p_.k, h.k.begin, len_k, h.kv_head, p_.dim, k_, p_.dim, stride_);
    load_rows<T>(p_.v, h.k.begin, len_k, h.kv_head, p_.dim_v, v_, p_.dim_v, stride_v_);
    clear(dk_, len_k * stride_);
    clear(dv_, len_k * stride_v_);
    const int32_t queries = queries_per_tile(p_, len_q, kBackwardTileRows);
    for (int64_t q0 = 0; q0 < len_q; q0 += queries) {
      const QueryTile tile = tile_at(h, q0, queries);
      Prefetch prefetch;
      if (!b_.delta) prefetch_queries(prefetch, b_.dq, p_.dim, tile);
      if (tile.q1 < len_q) {
        prefetch_inputs(prefetch, tile_at(h, tile.q1, queries));
      } else {
        if (!b_.delta) {
          prefetch_keys(prefetch, contiguous(b_.dk, p_.kv_heads, p_.dim), contiguous(b_.dv, p_.kv_heads, p_.dim_v), h);
        }
        if (next) prefetch_sequence(prefetch, *next);
      }
      run_tile(tile, mask, h.dsinks, prefetch);
    }
    const int64_t row = h.k.begin * p_.kv_heads + h.kv_head;
    for (int64_t j = 0; j < len_k; ++j) {
      const int64_t at = row + j * p_.kv_heads;
      put(dk_ + j * stride_, p_.dim, Real(p_.scale), b_.dk, at, b_.add_to_keys);
      put(dv_ + j * stride_v_, p_.dim_v, Real(1), b_.dv, at, b_.add_to_keys);
    }
  }

 private:
  static int64_t lane_capacity(const AttentionProblem& p) {
    return round_up(most(kBackwardTileRows, p.heads / p.kv_heads), kWidth);
  }

  static QueryTile tile_at(const SequenceHead& h, int64_t q0, int64_t queries) {
    return {h.sequence, h.q, h.k, int32_t(q0), int32_t(least(q0 + queries, h.q.size())), h.kv_head};
  }

  // Rows of a contiguous [total_q, heads, dim] tensor.
  void prefetch_queries(Prefetch& prefetch, const void* x, int64_t dim, const QueryTile& t) const {
    const int64_t group = p_.heads / p_.kv_heads;
    prefetch_rows<T>(prefetch, contiguous(x, p_.heads, dim), t.q.begin + t.q0, t.q1 - t.q0, t.kv_head * group,
                     dim * group);
  }

  void prefetch_inputs(Prefetch& prefetch, const QueryTile& t) const {
    const int64_t group = p_.heads / p_.kv_heads, row = t.q.begin + t.q0, count = t.q1 - t.q0;
    prefetch_rows<T>(prefetch, p_.q, row, count, t.kv_head * group, p_.dim * group);
    prefetch_rows<T>(prefetch, b_.dout, row, count, t.kv_head * group, p_.dim_v * group);
    if (!b_.delta) prefetch_queries(prefetch, b_.out, p_.dim_v, t);
  }

  // As many rows as fit into the cache beside what is in use.
  void prefetch_keys(Prefetch& prefetch, const Packed& k, const Packed& v, const SequenceHead& h) const {
    const int64_t keys = least(h.k.size(), 256);
    prefetch_rows<T>(prefetch, k, h.k.begin, keys, h.kv_head, p_.dim);
    prefetch_rows<T>(prefetch, v, h.k.begin, keys, h.kv_head, p_.dim_v);
  }

  void prefetch_sequence(Prefetch& prefetch, const SequenceHead& h) const {
    prefetch_keys(prefetch, p_.k, p_.v, h);
    const int32_t queries = queries_per_tile(p_, h.q.size(), kBackwardTileRows);
    prefetch_inputs(prefetch, tile_at(h, 0, queries));
  }

  static void clear(Real* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store(x + i, Vec<Real>{});
  }

  // A finished row of a gradient: row `row` of a tensor of rows of n. `adds` where there is a delta: to what is there.
  void put(const Real* from, int64_t n, Real factor, void* tensor, int64_t row, bool adds) {
    if (b_.delta) {
      Real* const to = static_cast<Real*>(tensor) + row * n;
      for (int64_t i = 0; i < n; ++i) to[i] = (adds ? to[i] : Real(0)) + from[i] * factor;
    } else {
      for (int64_t i = 0; i < n; i += kWidth) store(row_ + i, load(from + i) * factor);
      store_row(row_, n, static_cast<T*>(tensor) + row * n);
    }
  }

  // About how often run_block steps on, over all blocks of a tile.
  int64_t steps(int64_t lanes, int64_t blocks, int64_t len_k) const {
    const auto panels = [](int64_t columns) { return (columns + 2 * kWidth - 1) / (2 * kWidth); };
    const int64_t keys = least(blocks * kKeyBlock, len_k);
    return gemm_groups(keys) * (2 * panels(lanes) + panels(dim_) + panels(dim_v_)) +
           blocks * panels(lanes) * gemm_groups(p_.dim);
  }

  void run_tile(const QueryTile& t, const Mask& mask, double* dsinks, Prefetch& prefetch) {
    const TileRows<Real> tile(p_, t);
    const int64_t lanes = round_up(tile.rows, kWidth);
    load_tile(t, tile, mask, lanes, dsinks);
    clear(dq_t_, lanes_ * p_.dim);
    const KeyBlocks blocks(mask, t.q0, t.q1, kKeyBlock);
    prefetch.spread(steps(lanes, blocks.count, mask.len_k));
    for (int32_t b = 0; b < blocks.count; ++b) {
      const int32_t k0 = blocks[b] * kKeyBlock;
      const int32_t k1 = int32_t(least(int64_t(k0) + kKeyBlock, mask.len_k));
      const Range keys = visible_keys(mask, t.q0, t.q1, k0, k1);
      if (keys.size()) run_block(tile.rows, lanes, keys, all_visible(mask, t.q0, t.q1, keys), prefetch);
    }
    store_dq(t, tile, lanes);
  }

  void load_tile(const QueryTile& t, const TileRows<Real>& tile, const Mask& mask, int64_t lanes, double* dsinks) {
    limits_.set(p_, mask, tile, lanes);
    for (int32_t r = 0; r < lanes; ++r) {
      Real *const q = q_ + r * stride_, *const dout = dout_ + r * stride_v_;
      if (r < tile.rows) {
        load_rows<T>(p_.q, t.q.begin + tile.query(r), 1, tile.head(r), p_.dim, q, dim_, stride_);
        load_rows<T>(b_.dout, t.q.begin + tile.query(r), 1, tile.head(r), p_.dim_v, dout, dim_v_, stride_v_);
      } else {
        clear(q, dim_);
        clear(dout, dim_v_);
      }
    }
    for (int64_t r = 0; r < lanes; r += kWidth) {
      for (int64_t d = 0; d < dim_; d += kWidth) {
        transpose(q_ + r * stride_ + d, stride_, q_t_ + d * lanes_ + r, lanes_);
      }
      for (int64_t d = 0; d < dim_v_; d += kWidth) {
        transpose(dout_ + r * stride_v_ + d, stride_v_, dout_t_ + d * lanes_ + r, lanes_);
      }
      if (!b_.delta) load_delta(t, tile, int32_t(r));
    }
    load_statistics(t, tile, lanes, dsinks);
  }

  // delta = dout . out, into offset_. Terms are added in the order in which the products dout . v are: a row that sees
  // one key gets the same bits for both, and its gradient is exactly zero.
  void load_delta(const QueryTile& t, const TileRows<Real>& tile, int32_t r) {
    const Packed out = contiguous(b_.out, p_.heads, p_.dim_v);
    for (int32_t i = 0; i < kWidth; ++i) {
      Real* const row = square_ + i * stride_v_;
      if (r + i < tile.rows) {
        load_rows<T>(out, t.q.begin + tile.query(r + i), 1, tile.head(r + i), p_.dim_v, row, dim_v_, stride_v_);
      } else {
        clear(row, dim_v_);
      }
    }
    Vec<Real> delta{};
    for (int64_t d = 0; d < dim_v_; d += kWidth) {
      Vec<Real> out_t[kWidth];
      PACKSEQ_UNROLL
      for (int i = 0; i < kWidth; ++i) out_t[i] = load(square_ + i * stride_v_ + d);
      transpose_rows<Real>(out_t);
      PACKSEQ_UNROLL
      for (int i = 0; i < kWidth; ++i) delta += out_t[i] * load(dout_t_ + (d + i) * lanes_ + r);
    }
    store(offset_ + r, delta);
  }

  void load_statistics(const QueryTile& t, const TileRows<Real>& tile, int64_t lanes, double* dsinks) {
    const Real* const lse = static_cast<const Real*>(b_.lse);
    const Real *const dlse = static_cast<const Real*>(b_.dlse), *const delta = static_cast<const Real*>(b_.delta);
    for (int32_t r = 0; r < lanes; ++r) {
      if (r >= tile.rows) {
        lse_[r] = offset_[r] = 0;
        continue;
      }
      const int64_t head = tile.head(r), at = (t.q.begin + tile.query(r)) * p_.heads + head;
      const bool empty = lse[at] == -__builtin_huge_val();
      lse_[r] = empty ? 0 : lse[at];
      if (delta) offset_[r] = delta[at];
      if (dlse) offset_[r] -= dlse[at];
      if (dsinks && !empty) {
        const double sink = static_cast<const Real*>(p_.sinks)[head];
        dsinks[head] -= __builtin_exp(sink - double(lse[at])) * double(offset_[r]);
      }
    }
  }

  void run_block(int32_t rows, int64_t lanes, Range keys, bool all_clear, Prefetch& prefetch) {
    const auto step = [&]() __attribute__((always_inline)) { prefetch.step(); };
    const int64_t count = keys.size();
    const Real *k = k_ + keys.begin * stride_, *v = v_ + keys.begin * stride_v_;
    const auto rows_of = [&](int64_t dim, int64_t stride, const Real* a, const Real* b,
                             Real* c) {  // c = a b, over the head dim
      return Gemm<Real>{.m = count, .k = dim, .a = a, .lda = stride, .b = b, .ldb = lanes_, .c = c, .ldc = lanes_};
    };
    gemm_wide<false, Start::zero>(rows_of(p_.dim, stride_, k, q_t_, p_t_), lanes, step);
    gemm_wide<false, Start::zero>(rows_of(p_.dim_v, stride_v_, v, dout_t_, ds_t_), lanes, step);
    const bool plain = !transform_.capped && !transform_.biased;
    if (plain && all_clear) {
      differentiate<true, true>(lanes, keys);
    } else if (plain) {
      differentiate<true, false>(lanes, keys);
    } else {
      differentiate<false, false>(lanes, keys);
    }
    gemm_wide<true, Start::add>(
        Gemm<Real>{
            .m = p_.dim, .k = count, .a = k, .lda = stride_, .b = ds_t_, .ldb = lanes_, .c = dq_t_, .ldc = lanes_},
        lanes, step);
    const auto keys_of = [&](const Real* a, const Real* b, int64_t ldb, Real* c) {  // c += a b, over the tile's rows
      return Gemm<Real>{.m = count, .k = rows, .a = a, .lda = lanes_, .b = b, .ldb = ldb, .c = c, .ldc = ldb};
    };
    gemm_wide<false, Start::add>(keys_of(ds_t_, q_, stride_, dk_ + keys.begin * stride_), dim_, step);
    gemm_wide<false, Start::add>(keys_of(p_t_, dout_, stride_v_, dv_ + keys.begin * stride_v_), dim_v_, step);
  }

  // In place: products to probabilities, and their gradients to those of scale * q . k.
  template <bool kPlain, bool kClear>
  void differentiate(int64_t lanes, Range keys) {
    for (int32_t j = 0; j < keys.size(); ++j) {
      for (int64_t lane = 0; lane < lanes; lane += kWidth) {
        Real *const p_at = p_t_ + j * lanes_ + lane, *const ds_at = ds_t_ + j * lanes_ + lane;
        Vec<Real> slope, x = load(p_at);
        if constexpr (kPlain) {
          x = x * transform_.scale - load(lse_ + lane);
        } else {
          x = transform_(x, limits_, lane, keys.begin + j, slope) - load(lse_ + lane);
        }
        Vec<Real> p = exp2<Real>(x * Real(kLog2e));
        Vec<Real> ds = p * (load(ds_at) - load(offset_ + lane));
        if constexpr (!kPlain) ds = ds * slope;
        if constexpr (!kClear) {
          const Vec<Int<Real>> visible = limits_.visible(lane, keys.begin + j);
          p = visible ? p : Vec<Real>{};
          ds = visible ? ds : Vec<Real>{};
        }
        store(p_at, p);
        store(ds_at, ds);
      }
    }
  }

  void store_dq(const QueryTile& t, const TileRows<Real>& tile, int64_t lanes) {
    for (int64_t r = 0; r < lanes; r += kWidth) {
      for (int64_t d = 0; d < dim_; d += kWidth)
        transpose(dq_t_ + d * lanes_ + r, lanes_, q_ + r * stride_ + d, stride_);
    }
    for (int32_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (t.q.begin + tile.query(r)) * p_.heads + tile.head(r);
      put(q_ + r * stride_, p_.dim, Real(p_.scale), b_.dq, at, true);
    }
  }

  const AttentionBackward& b_;
  const AttentionProblem& p_;
  const ScoreTransform<Real> transform_;
  const int64_t lanes_, dim_, dim_v_;  // whole vectors
  const int64_t stride_, stride_v_;    // of rows in scratch
  const LaneLimits<Real> limits_;

  Real *q_, *dout_;              // [lanes, dim], [lanes, dim_v]: the tile's rows
  Real *q_t_, *dout_t_, *dq_t_;  // [dim, lanes], [dim_v, lanes]
  Real *p_t_, *ds_t_;            // [kKeyBlock, lanes]
  Real *lse_, *offset_;          // [lanes]; offset is delta - dlse
  Real *row_, *square_;          // one row, and kWidth of out
  Real *k_, *v_;                 // [len_k, dim], [len_k, dim_v]: the sequence's
  Real *dk_, *dv_;               // [len_k, dim], [len_k, dim_v]
};

}  // namespace packseq::PACKSEQ_ISA
