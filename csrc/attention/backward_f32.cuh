// Attention backward in true float32, on the plain FMA units: two kernels, no atomics, the same bits on every run.
//
// With D = rowsum(dO * O) - dlse, both compute scores anew:
//
//   P = exp(S - lse), dP = dO V^T, dS = P * (dP - D) * (slope of the softcap)
//   dq_kernel:   a block owns 64 queries of a head and walks over the keys they see:            dQ = scale * dS K
//   dkv_kernel:  a block owns 64 keys of a key/value head and walks over the queries that see them, for every query
//                head of the group; its scores stand transposed:                 dV = P^T dO, dK = scale * dS^T Q
//
// P and dS are left in shared memory as soon as they are known: the next product needs the registers.
#pragma once
#include "attention/forward_f32.cuh"

namespace packseq::f32 {

struct BackwardParams {
  AttentionBackward call;
  const float* delta;  // [heads, total_q]
  const Tile* tiles;   // of queries for dq, of keys for dk and dv
};

// The log-sum-exp in units of log 2, and D, of a query. A row outside the sequence, or one that sees nothing, has no
// weight.
struct RowFacts {
  float lse, delta;

  __device__ RowFacts(const BackwardParams& params, int64_t row, int head, bool inside) : lse(INFINITY), delta(0.0f) {
    if (!inside) return;
    const AttentionProblem& p = params.call.problem;
    const float natural = static_cast<const float*>(params.call.lse)[row * p.heads + head];
    if (natural == -INFINITY) return;
    lse = natural * kLog2e;
    delta = params.delta[head * p.total_q + row];
  }
};

// Facts of a tile of queries, and of its rows.
struct DqFacts {
  Facts facts;
  RowFacts rows[kF32Rows];
};

template <class T>
class DqBlock {
 public:
  __device__ DqBlock(const BackwardParams& params, const DqFacts& facts, int32_t first_query, int head, float* shared)
      : params_(params),
        p_(params.call.problem),
        facts_(facts.facts),
        rows_(facts.rows),
        first_query_(first_query),
        head_(head),
        ds_(shared),
        memory_(shared + T::kScores) {}

  __device__ void run() {
    const auto load = [&](float* to, int step, int stage) { load_stage(to, step, stage); };
    const int slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v), steps = facts_.keys.count;
    FfmaStages<T, decltype(load)> stages(memory_, steps, slices + slices_v + T::kRowSlices, load);
    for (int step = 0; step < steps; ++step) {
      {
        typename T::Scores s = {};
        for (int i = 0; i < slices; ++i) {
          const float* q = stages.next();
          T::multiply_transposed(s, q, q + T::kSlice);
        }
        const int32_t first_key = facts_.keys[step] * T::kSize;
        facts_.scores.template transform<T, false>(s, facts_.mask, first_query_, first_key, ds_);
        T::for_each([&](int i, int j) {
          const float p = exp_shifted(s[i][j], rows_[T::row(i)].lse);
          T::score(ds_, i, j) = facts_.scores.capped() ? p * T::score(ds_, i, j) : p;
        });
      }
      {
        typename T::Scores dp = {};
        for (int i = 0; i < slices_v; ++i) {
          const float* dout = stages.next();
          T::multiply_transposed(dp, dout, dout + T::kSlice);
        }
        T::for_each([&](int i, int j) { T::score(ds_, i, j) *= dp[i][j] - rows_[T::row(i)].delta; });
      }
      for (int i = 0; i < T::kRowSlices; ++i) {
        const float* k = stages.next();
        T::multiply(dq_, ds_, i * T::kSliceRows, k);
      }
    }
    const int64_t first = (facts_.q_begin + first_query_) * p_.heads + head_, stride = p_.heads;
    const float scale = float(p_.scale);
    T::store(
        dq_, [&](int) { return scale; }, static_cast<float*>(params_.call.dq) + first * p_.dim, stride * p_.dim,
        facts_.mask.len_q - first_query_, p_.dim);
  }

 private:
  __device__ __forceinline__ void load_stage(float* to, int step, int stage) const {
    const int kv_head = head_ / (p_.heads / p_.kv_heads), first_key = facts_.keys[step] * T::kSize;
    const int slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v);
    const int32_t len_q = facts_.mask.len_q, len_k = facts_.mask.len_k;
    const FloatRows keys = head_rows(p_.k, facts_.k_begin, kv_head, len_k, p_.dim);
    if (stage < slices) {
      const int col = stage * T::kSliceCols;
      T::load_columns(to, head_rows(p_.q, facts_.q_begin, head_, len_q, p_.dim), first_query_, col);
      T::load_columns(to + T::kSlice, keys, first_key, col);
    } else if (stage < slices + slices_v) {
      const int col = (stage - slices) * T::kSliceCols;
      const Packed& dout = params_.call.dout;
      T::load_columns(to, head_rows(dout, facts_.q_begin, head_, len_q, p_.dim_v), first_query_, col);
      T::load_columns(to + T::kSlice, head_rows(p_.v, facts_.k_begin, kv_head, len_k, p_.dim_v), first_key, col);
    } else {
      T::load_rows(to, keys, first_key, (stage - slices - slices_v) * T::kSliceRows);
    }
  }

  const BackwardParams& params_;
  const AttentionProblem& p_;
  const Facts& facts_;
  const RowFacts* const rows_;
  const int32_t first_query_;
  const int head_;
  float *const ds_, *const memory_;

  typename T::Sums dq_ = {};
};

// Facts of a tile of keys.
struct KeyFacts {
  Facts facts;  // `scores` and `keys` are not used: both differ between the steps
  QueryBlocks queries;
  int kv_head, group;

  __device__ KeyFacts(const AttentionProblem& p, int sequence, int32_t first_key, int head)
      : facts(p, sequence, 0, head),
        queries(facts.mask, first_key, min(first_key, facts.mask.len_k - kF32Rows) + kF32Rows, kF32Rows),
        kv_head(head),
        group(p.heads / p.kv_heads) {}
};

template <class T>
class DkvBlock {
 public:
  __device__ DkvBlock(const BackwardParams& params, const KeyFacts& facts, int32_t first_key, float* shared)
      : params_(params),
        p_(params.call.problem),
        facts_(facts.facts),
        queries_(facts.queries),
        group_(facts.group),
        kv_head_(facts.kv_head),
        first_key_(first_key),
        p_tile_(shared),
        ds_tile_(shared + T::kScores),
        memory_(shared + 2 * T::kScores) {}

  __device__ void run() {
    const auto load = [&](float* to, int step, int stage) { load_stage(to, step, stage); };
    const int slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v), steps = group_ * blocks();
    FfmaStages<T, decltype(load)> stages(memory_, steps, slices + slices_v + 2 * T::kRowSlices, load);
    for (int step = 0; step < steps; ++step) {
      float lse[4], delta[4];
      load_rows(step, lse, delta);
      {
        typename T::Scores s = {};
        for (int i = 0; i < slices; ++i) {
          const float* k = stages.next();
          T::multiply_transposed(s, k, k + T::kSlice);
        }
        const ScoresF32 scores(p_, head(step));
        scores.template transform<T, true>(s, facts_.mask, first_query(step), first_key_, ds_tile_);
        T::for_each([&](int i, int j) {
          const float p = exp_shifted(s[i][j], lse[j]);
          T::score(p_tile_, i, j) = p;
          T::score(ds_tile_, i, j) = scores.capped() ? p * T::score(ds_tile_, i, j) : p;
        });
      }
      {
        typename T::Scores dp = {};
        for (int i = 0; i < slices_v; ++i) {
          const float* v = stages.next();
          T::multiply_transposed(dp, v, v + T::kSlice);
        }
        T::for_each([&](int i, int j) { T::score(ds_tile_, i, j) *= dp[i][j] - delta[j]; });
      }
      for (int i = 0; i < T::kRowSlices; ++i) {
        const float* dout = stages.next();
        T::multiply(dv_, p_tile_, i * T::kSliceRows, dout);
      }
      for (int i = 0; i < T::kRowSlices; ++i) {
        const float* q = stages.next();
        T::multiply(dk_, ds_tile_, i * T::kSliceRows, q);
      }
    }
    finish();
  }

 private:
  __device__ int blocks() const { return max(queries_.end - queries_.begin, 0); }
  __device__ int head(int step) const { return kv_head_ * group_ + step / blocks(); }
  __device__ int32_t first_query(int step) const { return (queries_.begin + step % blocks()) * T::kSize; }

  // What the step's queries, the columns of the scores, bring along.
  __device__ void load_rows(int step, float (&lse)[4], float (&delta)[4]) const {
    const int32_t first = first_query(step);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const RowFacts row(params_, facts_.q_begin + first + T::col(j), head(step),
                         T::col(j) < facts_.mask.len_q - first);
      lse[j] = row.lse;
      delta[j] = row.delta;
    }
  }

  __device__ __forceinline__ void load_stage(float* to, int step, int stage) const {
    const int slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v);
    const int32_t len_q = facts_.mask.len_q, len_k = facts_.mask.len_k, first = first_query(step);
    const FloatRows q = head_rows(p_.q, facts_.q_begin, head(step), len_q, p_.dim);
    const FloatRows dout = head_rows(params_.call.dout, facts_.q_begin, head(step), len_q, p_.dim_v);
    if (stage < slices) {
      const int col = stage * T::kSliceCols;
      T::load_columns(to, head_rows(p_.k, facts_.k_begin, kv_head_, len_k, p_.dim), first_key_, col);
      T::load_columns(to + T::kSlice, q, first, col);
    } else if (stage < slices + slices_v) {
      const int col = (stage - slices) * T::kSliceCols;
      T::load_columns(to, head_rows(p_.v, facts_.k_begin, kv_head_, len_k, p_.dim_v), first_key_, col);
      T::load_columns(to + T::kSlice, dout, first, col);
    } else {
      const int32_t slice = stage - slices - slices_v;
      if (slice < T::kRowSlices) {
        T::load_rows(to, dout, first, slice * T::kSliceRows);
      } else {
        T::load_rows(to, q, first, (slice - T::kRowSlices) * T::kSliceRows);
      }
    }
  }

  __device__ void finish() const {
    const int64_t first = (facts_.k_begin + first_key_) * p_.kv_heads + kv_head_, stride = p_.kv_heads;
    const int32_t rows = facts_.mask.len_k - first_key_;
    const float scale = float(p_.scale);
    T::store(
        dk_, [&](int) { return scale; }, static_cast<float*>(params_.call.dk) + first * p_.dim, stride * p_.dim, rows,
        p_.dim);
    T::store(
        dv_, [](int) { return 1.0f; }, static_cast<float*>(params_.call.dv) + first * p_.dim_v, stride * p_.dim_v, rows,
        p_.dim_v);
  }

  const BackwardParams& params_;
  const AttentionProblem& p_;
  const Facts& facts_;
  const QueryBlocks queries_;
  const int group_, kv_head_;
  const int32_t first_key_;
  float *const p_tile_, *const ds_tile_, *const memory_;

  typename T::Sums dk_ = {}, dv_ = {};
};

template <class T, int kBlocksPerSm>
__global__ void __launch_bounds__(T::kThreads, kBlocksPerSm) dq_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) float shared[];
  const AttentionProblem& p = params.call.problem;
  const Tile tile = params.tiles[blockIdx.x / p.heads];
  const int head = blockIdx.x % p.heads;
  if (tile.sequence < 0) return;
  const Span q = span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence);
  if (tile.sequence == p.sequences) {
    const int64_t begin = q.begin + int64_t(tile.block) * T::kSize, stride = int64_t(p.heads) * p.dim;
    T::store_zeros(static_cast<float*>(params.call.dq) + begin * stride + head * p.dim, stride, q.end - begin, p.dim);
    return;
  }
  // Under a causal mask the last queries see most: start them first.
  const int32_t block = p.causal ? int32_t((q.size() - 1) / T::kSize) - tile.block : tile.block;
  DqFacts& facts = *reinterpret_cast<DqFacts*>(shared + T::kScores + 2 * T::kStage);
  if (threadIdx.x == 0) facts.facts = Facts(p, tile.sequence, block * T::kSize, head);
  if (threadIdx.x < T::kSize) {
    const int64_t query = int64_t(block) * T::kSize + threadIdx.x;
    facts.rows[threadIdx.x] = RowFacts(params, q.begin + query, head, query < q.size());
  }
  __syncthreads();
  DqBlock<T>(params, facts, block * T::kSize, head, shared).run();
}

template <class T, int kBlocksPerSm>
__global__ void __launch_bounds__(T::kThreads, kBlocksPerSm) dkv_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) float shared[];
  const AttentionProblem& p = params.call.problem;
  const Tile tile = params.tiles[blockIdx.x / p.kv_heads];
  const int kv_head = blockIdx.x % p.kv_heads;
  if (tile.sequence < 0) return;
  if (tile.sequence == p.sequences) {
    const Span slack = span_of(p.cu_seqlens_k, p.sequences, p.total_k, tile.sequence);
    const int64_t begin = slack.begin + int64_t(tile.block) * T::kSize, row = begin * p.kv_heads + kv_head;
    const int64_t rows = slack.end - begin, stride = p.kv_heads;
    T::store_zeros(static_cast<float*>(params.call.dk) + row * p.dim, stride * p.dim, rows, p.dim);
    T::store_zeros(static_cast<float*>(params.call.dv) + row * p.dim_v, stride * p.dim_v, rows, p.dim_v);
    return;
  }
  KeyFacts& facts = *reinterpret_cast<KeyFacts*>(shared + 2 * T::kScores + 2 * T::kStage);
  if (threadIdx.x == 0) facts = KeyFacts(p, tile.sequence, tile.block * T::kSize, kv_head);
  __syncthreads();
  DkvBlock<T>(params, facts, tile.block * T::kSize, shared).run();
}

}  // namespace packseq::f32
