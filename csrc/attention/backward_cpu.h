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
        limits_(s, lanes_) {
    for (Real** x : {&q_, &q_t_, &dq_t_}) *x = s.take<Real>(lanes_ * dim_);
    for (Real** x : {&dout_, &dout_t_}) *x = s.take<Real>(lanes_ * dim_v_);
    for (Real** x : {&p_t_, &ds_t_}) *x = s.take<Real>(lanes_ * kKeyBlock);
    for (Real** x : {&lse_, &offset_}) *x = s.take<Real>(lanes_);
    row_ = s.take<Real>(dim_ > dim_v_ ? dim_ : dim_v_);
    k_ = s.take<Real>(len_k * p_.dim);
    v_ = s.take<Real>(len_k * p_.dim_v);
    dk_ = s.take<Real>(len_k * dim_);
    dv_ = s.take<Real>(len_k * dim_v_);
  }

  void run(const SequenceHead& h) {
    const int64_t len_q = h.q.size(), len_k = h.k.size();
    const Mask mask(p_, len_q, len_k);
    load_rows<T>(p_.k, h.k.begin, len_k, h.kv_head, p_.dim, k_, p_.dim);
    load_rows<T>(p_.v, h.k.begin, len_k, h.kv_head, p_.dim_v, v_, p_.dim_v);
    clear(dk_, len_k * dim_);
    clear(dv_, len_k * dim_v_);
    const int32_t queries = queries_per_tile(p_, len_q, kBackwardTileRows);
    for (int32_t q0 = 0; q0 < len_q; q0 += queries) {
      const int32_t q1 = q0 + queries < len_q ? q0 + queries : int32_t(len_q);
      run_tile({h.q, h.k, q0, q1, h.kv_head}, mask, h.dsinks);
    }
    const int64_t row = h.k.begin * p_.kv_heads + h.kv_head;
    for (int64_t j = 0; j < len_k; ++j) {
      const int64_t at = row + j * p_.kv_heads;
      store_scaled(dk_ + j * dim_, p_.dim, Real(p_.scale), static_cast<T*>(b_.dk) + at * p_.dim);
      store_row(dv_ + j * dim_v_, p_.dim_v, static_cast<T*>(b_.dv) + at * p_.dim_v);
    }
  }

 private:
  static int64_t lane_capacity(const AttentionProblem& p) {
    const int64_t group = p.heads / p.kv_heads;
    return round_up(kBackwardTileRows > group ? kBackwardTileRows : group, kWidth);
  }

  static void clear(Real* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store(x + i, Vec<Real>{});
  }

  void store_scaled(const Real* from, int64_t n, Real factor, T* to) {
    for (int64_t i = 0; i < n; i += kWidth) store(row_ + i, load(from + i) * factor);
    store_row(row_, n, to);
  }

  void run_tile(const QueryTile& t, const Mask& mask, double* dsinks) {
    const TileRows<Real> tile(p_, t);
    const int64_t lanes = round_up(tile.rows, kWidth);
    load_tile(t, tile, mask, lanes, dsinks);
    clear(dq_t_, lanes_ * p_.dim);
    const KeyBlocks blocks(mask, t.q0, t.q1, kKeyBlock);
    for (int32_t b = 0; b < blocks.count; ++b) {
      const int32_t k0 = blocks[b] * kKeyBlock;
      const int32_t k1 = k0 + kKeyBlock < mask.len_k ? k0 + kKeyBlock : mask.len_k;
      const Range keys = visible_keys(mask, t.q0, t.q1, k0, k1);
      if (keys.size()) run_block(tile.rows, lanes, keys, all_visible(mask, t.q0, t.q1, keys));
    }
    store_dq(t, tile, lanes);
  }

  void load_tile(const QueryTile& t, const TileRows<Real>& tile, const Mask& mask, int64_t lanes, double* dsinks) {
    limits_.set(p_, mask, tile, lanes);
    const T* const out = static_cast<const T*>(b_.out);
    const Real* const lse = static_cast<const Real*>(b_.lse);
    const Real* const dlse = static_cast<const Real*>(b_.dlse);
    for (int32_t r = 0; r < lanes; ++r) {
      Real *const q = q_ + r * dim_, *const dout = dout_ + r * dim_v_;
      if (r >= tile.rows) {
        clear(q, dim_);
        clear(dout, dim_v_);
        lse_[r] = offset_[r] = 0;
        continue;
      }
      const int64_t token = t.q.begin + tile.query(r), head = tile.head(r), at = token * p_.heads + head;
      load_rows<T>(p_.q, token, 1, head, p_.dim, q, dim_);
      load_rows<T>(b_.dout, token, 1, head, p_.dim_v, dout, dim_v_);
      load_row(out + at * p_.dim_v, p_.dim_v, row_, dim_v_);
      Vec<Real> delta{};
      for (int64_t d = 0; d < dim_v_; d += kWidth) delta += load(dout + d) * load(row_ + d);
      const bool empty = lse[at] == -__builtin_huge_val();
      lse_[r] = empty ? 0 : lse[at];
      offset_[r] = sum<Real>(delta) - (dlse ? dlse[at] : Real(0));
      if (dsinks && !empty) {
        const double sink = static_cast<const Real*>(p_.sinks)[head];
        dsinks[head] -= __builtin_exp(sink - double(lse[at])) * double(offset_[r]);
      }
    }
    for (int64_t r = 0; r < lanes; r += kWidth) {
      for (int64_t d = 0; d < dim_; d += kWidth) transpose(q_ + r * dim_ + d, dim_, q_t_ + d * lanes_ + r, lanes_);
      for (int64_t d = 0; d < dim_v_; d += kWidth) {
        transpose(dout_ + r * dim_v_ + d, dim_v_, dout_t_ + d * lanes_ + r, lanes_);
      }
    }
  }

  void run_block(int32_t rows, int64_t lanes, Range keys, bool all_clear) {
    const int64_t count = keys.size();
    const Real *k = k_ + keys.begin * p_.dim, *v = v_ + keys.begin * p_.dim_v;
    const auto rows_of = [&](int64_t dim, const Real* a, const Real* b, Real* c) {  // c = a b, over the head dim
      return Gemm<Real>{.m = count, .k = dim, .a = a, .lda = dim, .b = b, .ldb = lanes_, .c = c, .ldc = lanes_};
    };
    gemm_wide<false, Start::zero>(rows_of(p_.dim, k, q_t_, p_t_), lanes);
    gemm_wide<false, Start::zero>(rows_of(p_.dim_v, v, dout_t_, ds_t_), lanes);
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
            .m = p_.dim, .k = count, .a = k, .lda = p_.dim, .b = ds_t_, .ldb = lanes_, .c = dq_t_, .ldc = lanes_},
        lanes);
    const auto keys_of = [&](const Real* a, const Real* b, int64_t ldb, Real* c) {  // c += a b, over the tile's rows
      return Gemm<Real>{.m = count, .k = rows, .a = a, .lda = lanes_, .b = b, .ldb = ldb, .c = c, .ldc = ldb};
    };
    gemm_wide<false, Start::add>(keys_of(ds_t_, q_, dim_, dk_ + keys.begin * dim_), dim_);
    gemm_wide<false, Start::add>(keys_of(p_t_, dout_, dim_v_, dv_ + keys.begin * dim_v_), dim_v_);
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
      for (int64_t d = 0; d < dim_; d += kWidth) transpose(dq_t_ + d * lanes_ + r, lanes_, q_ + r * dim_ + d, dim_);
    }
    for (int32_t r = 0; r < tile.rows; ++r) {
      const int64_t at = (t.q.begin + tile.query(r)) * p_.heads + tile.head(r);
      store_scaled(q_ + r * dim_, p_.dim, Real(p_.scale), static_cast<T*>(b_.dq) + at * p_.dim);
    }
  }

  const AttentionBackward& b_;
  const AttentionProblem& p_;
  const ScoreTransform<Real> transform_;
  const int64_t lanes_, dim_, dim_v_;  // as they are in scratch: whole vectors
  const LaneLimits<Real> limits_;

  Real *q_, *dout_;              // [lanes, dim], [lanes, dim_v]: the tile's rows
  Real *q_t_, *dout_t_, *dq_t_;  // [dim, lanes], [dim_v, lanes]
  Real *p_t_, *ds_t_;            // [kKeyBlock, lanes]
  Real *lse_, *offset_;          // [lanes]; offset is delta - dlse
  Real* row_;
  Real *k_, *v_;    // [len_k, p_.dim], [len_k, p_.dim_v]: the sequence's
  Real *dk_, *dv_;  // [len_k, dim_], [len_k, dim_v_]
};

}  // namespace packseq::PACKSEQ_ISA
