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

// The log-sum-exp of a query. A row outside the sequence, or one that sees nothing, has no weight.
__device__ inline float row_lse(const BackwardParams& params, int64_t row, int head, bool inside) {
  if (!inside) return INFINITY;
  const float lse = static_cast<const float*>(params.call.lse)[row * params.call.problem.heads + head];
  return lse == -INFINITY ? INFINITY : lse;
}

// D of a query whose row_lse() is `lse`.
__device__ inline float row_delta(const BackwardParams& params, int64_t row, int head, float lse) {
  return lse == INFINITY ? 0.0f : params.delta[head * params.call.problem.total_q + row];
}

// `scale` times a tile of sums into its gradient, or to what is there, from the tensor's row `first` on.
template <class T>
__device__ __forceinline__ void put(bool adds, const typename T::Sums& sums, float scale, void* tensor, int64_t first,
                                    int64_t stride, int32_t rows, int dim) {
  float* const to = static_cast<float*>(tensor) + first * dim;
  const auto by = [&](int) { return scale; };
  if (adds) {
    T::add(
        sums, by, [](int) { return 1.0f; }, to, stride * dim, rows, dim);
  } else {
    T::store(sums, by, to, stride * dim, rows, dim);
  }
}

// Facts of a tile of queries, and of its rows.
struct DqFacts {
  Facts facts;
  FloatRows dout;
  float2 rows[kF32Rows];  // lse and D
};

template <class T>
class DqBlock {
 public:
  __device__ DqBlock(const BackwardParams& params, const DqFacts& facts, float* shared)
      : params_(params),
        p_(params.call.problem),
        facts_(facts.facts),
        dout_(facts.dout),
        rows_(facts.rows),
        ds_(shared),
        memory_(shared + T::kScores) {}

  __device__ void run() {
    int loading = -1;  // the step that is being loaded
    const auto load = [&](float* to, int stage) {
      if (stage == 0) ++loading;
      load_stage(to, loading, stage);
    };
    const int slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v);
    FfmaStages<T, decltype(load)> stages(memory_, facts_.keys.count, slices + slices_v + T::kRowSlices, load);
    for (int step = 0; step < facts_.keys.count; ++step) {
      {
        typename T::Scores s = {};
        for (int i = 0; i < slices; ++i) {
          const float* q = stages.next();
          T::multiply_transposed(s, q, q + T::kSlice);
        }
        const int32_t first_key = facts_.keys[step] * T::kSize;
        facts_.scores.template transform<T, false>(s, facts_.mask, facts_.first_query, first_key, ds_);
        T::for_each([&](int i, int j) {
          const float p = exp_accurate(s[i][j] - rows_[T::row(i)].x);
          T::score(ds_, i, j) = facts_.scores.capped() ? p * T::score(ds_, i, j) : p;
        });
      }
      {
        typename T::Scores dp = {};
        for (int i = 0; i < slices_v; ++i) {
          const float* dout = stages.next();
          T::multiply_transposed(dp, dout, dout + T::kSlice);
        }
        T::for_each([&](int i, int j) { T::score(ds_, i, j) *= dp[i][j] - rows_[T::row(i)].y; });
      }
      for (int i = 0; i < T::kRowSlices; ++i) {
        const float* k = stages.next();
        T::multiply(dq_, ds_, i * T::kSliceRows, k);
      }
    }
    const int64_t first = (facts_.q_begin + facts_.first_query) * p_.heads + facts_.head, stride = p_.heads;
    put<T>(params_.call.delta != nullptr, dq_, float(p_.scale), params_.call.dq, first, stride,
           facts_.mask.len_q - facts_.first_query, p_.dim);
  }

 private:
  __device__ __forceinline__ void load_stage(float* to, int step, int stage) const {
    const int first_key = facts_.keys[step] * T::kSize, slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v);
    if (stage < slices) {
      T::load_columns(to, facts_.q, facts_.first_query, stage * T::kSliceCols);
      T::load_columns(to + T::kSlice, facts_.k, first_key, stage * T::kSliceCols);
    } else if (stage < slices + slices_v) {
      T::load_columns(to, dout_, facts_.first_query, (stage - slices) * T::kSliceCols);
      T::load_columns(to + T::kSlice, facts_.v, first_key, (stage - slices) * T::kSliceCols);
    } else {
      T::load_rows(to, facts_.k, first_key, (stage - slices - slices_v) * T::kSliceRows);
    }
  }

  const BackwardParams& params_;
  const AttentionProblem& p_;
  const Facts& facts_;
  const FloatRows& dout_;
  const float2* const rows_;
  float *const ds_, *const memory_;

  typename T::Sums dq_ = {};
};

// Facts of a tile of keys. Of `facts`, what belongs to a query head is the group's first one's; `keys` is not used.
struct DkvFacts {
  Facts facts;
  FloatRows dout;  // of the group's first head
  QueryBlocks queries;
  int32_t first_key;
  int kv_head;
};

template <class T>
class DkvBlock {
 public:
  __device__ DkvBlock(const BackwardParams& params, const DkvFacts& facts, float* shared)
      : params_(params),
        p_(params.call.problem),
        facts_(facts.facts),
        key_facts_(facts),
        p_tile_(shared),
        ds_tile_(shared + T::kScores),
        memory_(shared + 2 * T::kScores) {}

  __device__ void run() {
    const int group = p_.heads / p_.kv_heads, begin = key_facts_.queries.begin, end = key_facts_.queries.end;
    const int steps = begin < end ? group * (end - begin) : 0;
    int head = 0, block = begin - 1;  // of the stage that is being loaded; `head` counts within the group
    const auto load = [&](float* to, int stage) {
      if (stage == 0 && ++block == end) {
        block = begin;
        ++head;
      }
      load_stage(to, head, block * T::kSize, stage);
    };
    const int per_step = T::slices(p_.dim) + T::slices(p_.dim_v) + 2 * T::kRowSlices;
    FfmaStages<T, decltype(load)> stages(memory_, steps, per_step, load);
    for (int g = 0; g < group; ++g) {
      for (int b = begin; b < end; ++b) step(stages, facts_.head + g, b * T::kSize);
    }
    finish();
  }

 private:
  template <class Stages>
  __device__ __forceinline__ void step(Stages& stages, int head, int32_t first_query) {
    const int64_t first = facts_.q_begin + first_query;
    float lse[4];  // of the queries, the columns of the scores
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      lse[j] = row_lse(params_, first + T::col(j), head, T::col(j) < facts_.mask.len_q - first_query);
    }
    {
      typename T::Scores s = {};
      const int slices = T::slices(p_.dim);
      for (int i = 0; i < slices; ++i) {
        const float* k = stages.next();
        T::multiply_transposed(s, k, k + T::kSlice);
      }
      ScoresF32 scores = facts_.scores;
      scores.set_head(p_, head);
      scores.template transform<T, true>(s, facts_.mask, first_query, key_facts_.first_key, ds_tile_);
      T::for_each([&](int i, int j) {
        const float p = exp_accurate(s[i][j] - lse[j]);
        T::score(p_tile_, i, j) = p;
        T::score(ds_tile_, i, j) = scores.capped() ? p * T::score(ds_tile_, i, j) : p;
      });
    }
    {
      float delta[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) delta[j] = row_delta(params_, first + T::col(j), head, lse[j]);
      typename T::Scores dp = {};
      const int slices = T::slices(p_.dim_v);
      for (int i = 0; i < slices; ++i) {
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

  __device__ __forceinline__ void load_stage(float* to, int head, int32_t first_query, int stage) const {
    const int slices = T::slices(p_.dim), slices_v = T::slices(p_.dim_v), first_key = key_facts_.first_key;
    FloatRows q = facts_.q, dout = key_facts_.dout;
    q.data += head * p_.q.head;
    dout.data += head * params_.call.dout.head;
    if (stage < slices) {
      T::load_columns(to, facts_.k, first_key, stage * T::kSliceCols);
      T::load_columns(to + T::kSlice, q, first_query, stage * T::kSliceCols);
    } else if ((stage -= slices) < slices_v) {
      T::load_columns(to, facts_.v, first_key, stage * T::kSliceCols);
      T::load_columns(to + T::kSlice, dout, first_query, stage * T::kSliceCols);
    } else if ((stage -= slices_v) < T::kRowSlices) {
      T::load_rows(to, dout, first_query, stage * T::kSliceRows);
    } else {
      T::load_rows(to, q, first_query, (stage - T::kRowSlices) * T::kSliceRows);
    }
  }

  __device__ void finish() const {
    const int32_t first_key = key_facts_.first_key, rows = facts_.mask.len_k - first_key;
    const int64_t first = (facts_.k_begin + first_key) * p_.kv_heads + key_facts_.kv_head, stride = p_.kv_heads;
    put<T>(params_.call.add_to_keys, dk_, float(p_.scale), params_.call.dk, first, stride, rows, p_.dim);
    put<T>(params_.call.add_to_keys, dv_, 1.0f, params_.call.dv, first, stride, rows, p_.dim_v);
  }

  const BackwardParams& params_;
  const AttentionProblem& p_;
  const Facts& facts_;
  const DkvFacts& key_facts_;
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
    if (params.call.delta) return;
    const int64_t begin = q.begin + int64_t(tile.block) * T::kSize, stride = int64_t(p.heads) * p.dim;
    T::store_zeros(static_cast<float*>(params.call.dq) + begin * stride + head * p.dim, stride, q.end - begin, p.dim);
    return;
  }
  // Under a causal mask the last queries see most: start them first.
  const int32_t block = p.causal ? int32_t((q.size() - 1) / T::kSize) - tile.block : tile.block;
  DqFacts& facts = *reinterpret_cast<DqFacts*>(shared + T::kScores + 2 * T::kStage);
  if (threadIdx.x == 0) {
    facts.facts = Facts(p, tile.sequence, block * T::kSize, head, head / (p.heads / p.kv_heads));
    facts.dout = FloatRows(params.call.dout, q, head, p.dim_v);
  }
  if (threadIdx.x < T::kSize) {
    const int64_t query = int64_t(block) * T::kSize + threadIdx.x;
    const float lse = row_lse(params, q.begin + query, head, query < q.size());
    facts.rows[threadIdx.x] = {lse, row_delta(params, q.begin + query, head, lse)};
  }
  __syncthreads();
  DqBlock<T>(params, facts, shared).run();
}

template <class T, int kBlocksPerSm>
__global__ void __launch_bounds__(T::kThreads, kBlocksPerSm) dkv_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) float shared[];
  const AttentionProblem& p = params.call.problem;
  const Tile tile = params.tiles[blockIdx.x / p.kv_heads];
  const int kv_head = blockIdx.x % p.kv_heads;
  if (tile.sequence < 0) return;
  if (tile.sequence == p.sequences) {
    if (params.call.delta) return;
    const Span slack = span_of(p.cu_seqlens_k, p.sequences, p.total_k, tile.sequence);
    const int64_t begin = slack.begin + int64_t(tile.block) * T::kSize, row = begin * p.kv_heads + kv_head;
    const int64_t rows = slack.end - begin, stride = p.kv_heads;
    T::store_zeros(static_cast<float*>(params.call.dk) + row * p.dim, stride * p.dim, rows, p.dim);
    T::store_zeros(static_cast<float*>(params.call.dv) + row * p.dim_v, stride * p.dim_v, rows, p.dim_v);
    return;
  }
  DkvFacts& facts = *reinterpret_cast<DkvFacts*>(shared + 2 * T::kScores + 2 * T::kStage);
  if (threadIdx.x == 0) {
    const int head = kv_head * (p.heads / p.kv_heads), first_key = tile.block * T::kSize;
    facts.facts = Facts(p, tile.sequence, 0, head, kv_head);
    const Mask& mask = facts.facts.mask;
    const Span q = span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence);
    facts.dout = FloatRows(params.call.dout, q, head, p.dim_v);
    facts.queries = QueryBlocks(mask, first_key, first_key + min(T::kSize, mask.len_k - first_key), T::kSize);
    facts.first_key = first_key;
    facts.kv_head = kv_head;
  }
  __syncthreads();
  DkvBlock<T>(params, facts, shared).run();
}

}  // namespace packseq::f32
