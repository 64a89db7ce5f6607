// Attention forward in true float32, on the plain FMA units.
//
// One block computes 64 rows of the output of one head. Slices of queries, keys and values stream past in shared
// memory, one ahead; scores and output stay in registers, and the probabilities pass through shared memory from the
// threads that have them to those, of the same half warp, that sum values with them.
//
//   for each block of 64 keys some query may see:
//     S = Q K^T, softcap, ALiBi, mask
//     m = running row maximum, P = exp(S - m), l += sum P
//     O += P V
//   out = O / l, lse = m + log l
//
// Rows outside the sequence are never read. What a row's sum is made of, and in which order, depends on its sequence
// alone.
#pragma once
#include "attention/attention_f32.h"
#include "attention/mask.h"
#include "attention/scores_f32.cuh"
#include "core/device/ffma_tile.cuh"

namespace packseq::f32 {

struct ForwardParams {
  AttentionForward call;
  const Tile* tiles;  // of queries
};

// What a block looks up now and then, kept out of its registers.
struct Facts {
  Mask mask;
  ScoresF32 scores;
  KeyBlocks keys;     // of the tile of queries that starts at first_query
  FloatRows q, k, v;  // of the sequence
  int64_t q_begin, k_begin;
  int32_t first_query;
  int head;

  __device__ Facts(const AttentionProblem& p, int sequence, int32_t query, int head, int kv_head)
      : Facts(p, sequence, span_of(p.cu_seqlens_q, p.sequences, p.total_q, sequence),
              span_of(p.cu_seqlens_k, p.sequences, p.total_k, sequence), query, head, kv_head) {}

 private:
  __device__ Facts(const AttentionProblem& p, int sequence, Span q_span, Span k_span, int32_t query, int head,
                   int kv_head)
      : mask(p, sequence, q_span.size(), k_span.size()),
        scores(p, head),
        keys(mask, query, query + min(kF32Rows, mask.len_q - query), kF32Rows),
        q(p.q, q_span, head, p.dim),
        k(p.k, k_span, kv_head, p.dim),
        v(p.v, k_span, kv_head, p.dim_v),
        q_begin(q_span.begin),
        k_begin(k_span.begin),
        first_query(query),
        head(head) {}
};

template <class T>
class ForwardBlock {
 public:
  __device__ ForwardBlock(const AttentionForward& call, const Facts& facts, float* shared)
      : call_(call), p_(call.problem), facts_(facts), probabilities_(shared), memory_(shared + T::kScores) {
#pragma unroll
    for (float& x : max_) x = -INFINITY;
  }

  __device__ void run() {
    int loading = -1;  // the step that is being loaded
    const auto load = [&](float* to, int stage) {
      if (stage == 0) ++loading;
      load_stage(to, loading, stage);
    };
    const int key_slices = T::slices(p_.dim);
    FfmaStages<T, decltype(load)> stages(memory_, facts_.keys.count, key_slices + T::kRowSlices, load);
    for (int step = 0; step < facts_.keys.count; ++step) {
      typename T::Scores s = {};
      for (int i = 0; i < key_slices; ++i) {
        const float* slices = stages.next();
        T::multiply_transposed(s, slices, slices + T::kSlice);
      }
      softmax(s, facts_.keys[step] * T::kSize);
      for (int i = 0; i < T::kRowSlices; ++i) {
        const float* slice = stages.next();
        T::multiply(out_, probabilities_, i * T::kSliceRows, slice);
      }
    }
    if (call_.sums) {
      add();
    } else {
      finish();
    }
  }

 private:
  __device__ __forceinline__ void load_stage(float* to, int step, int stage) const {
    const int first_key = facts_.keys[step] * T::kSize, key_slices = T::slices(p_.dim);
    if (stage < key_slices) {
      T::load_columns(to, facts_.q, facts_.first_query, stage * T::kSliceCols);
      T::load_columns(to + T::kSlice, facts_.k, first_key, stage * T::kSliceCols);
    } else {
      T::load_rows(to, facts_.v, first_key, (stage - key_slices) * T::kSliceRows);
    }
  }

  // Scores to probabilities, up to the rows' sums; what has been summed so far follows the raised maximum.
  __device__ void softmax(typename T::Scores& s, int32_t first_key) {
    facts_.scores.template transform<T, false>(s, facts_.mask, facts_.first_query, first_key, nullptr);
    float top[T::kRows];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) top[i] = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
#pragma unroll
    for (int offset = T::kAcross / 2; offset; offset /= 2) {
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], offset));
    }
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      const float raised = fmaxf(max_[i], top[i] * kLog2e), base = raised == -INFINITY ? 0.0f : raised;
      const float by = exp2_approx(max_[i] - base);
      max_[i] = raised;
      sum_[i] *= by;
#pragma unroll
      for (float& x : out_[i]) x *= by;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float p = exp2_approx(fmaf(s[i][j], kLog2e, -base));
        sum_[i] += p;
        T::score(probabilities_, i, j) = p;
      }
    }
  }

  // Adds this block's sums, relative to its rows' maxima, to those of other keys, relative to powers of two.
  __device__ void add() {
    const int32_t rows = facts_.mask.len_q - facts_.first_query;
    const int64_t first = (facts_.q_begin + facts_.first_query) * p_.heads + facts_.head;
    float keep[T::kRows], by[T::kRows];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      float sum = sum_[i];
#pragma unroll
      for (int offset = T::kAcross / 2; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      float2* const sums = static_cast<float2*>(call_.sums) + first + T::row(i) * int64_t(p_.heads);
      const bool adds = T::row(i) < rows && sum != 0.0f;
      const float2 before = adds ? *sums : float2{};
      __syncwarp();  // all have read what one writes
      const float both = adds ? fmaxf(before.x, ceilf(max_[i])) : 0.0f;
      keep[i] = adds ? exp2_approx(before.x - both) : 1.0f;
      by[i] = adds ? exp2_approx(max_[i] - both) : 0.0f;
      if (adds && T::across() == 0) *sums = {both, before.y * keep[i] + sum * by[i]};
    }
    T::add(
        out_, [&](int i) { return by[i]; }, [&](int i) { return keep[i]; },
        static_cast<float*>(call_.out) + first * p_.dim_v, int64_t(p_.heads) * p_.dim_v, rows, p_.dim_v);
  }

  // Normalises; writes the output and the log-sum-exp.
  __device__ void finish() {
    float by[T::kRows];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      float sum = sum_[i], top = max_[i];
#pragma unroll
      for (int offset = T::kAcross / 2; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      by[i] = 1.0f;
      if (p_.sinks) {
        const float sink = static_cast<const float*>(p_.sinks)[facts_.head] * kLog2e, raised = fmaxf(top, sink);
        const float base = raised == -INFINITY ? 0.0f : raised;
        by[i] = exp2_approx(top - base);
        sum = sum * by[i] + exp2_approx(sink - base);
        top = raised;
      }
      by[i] = sum == 0.0f ? 0.0f : by[i] / sum;
      max_[i] = sum == 0.0f ? -INFINITY : fmaf(top, kLn2, logf(sum));
    }
    const int32_t rows = facts_.mask.len_q - facts_.first_query;
    const int64_t first = (facts_.q_begin + facts_.first_query) * p_.heads + facts_.head;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      if (T::across() == 0 && T::row(i) < rows) {
        static_cast<float*>(call_.lse)[first + T::row(i) * int64_t(p_.heads)] = max_[i];
      }
    }
    T::store(
        out_, [&](int i) { return by[i]; }, static_cast<float*>(call_.out) + first * p_.dim_v,
        int64_t(p_.heads) * p_.dim_v, rows, p_.dim_v);
  }

  const AttentionForward& call_;
  const AttentionProblem& p_;
  const Facts& facts_;
  float *const probabilities_, *const memory_;

  typename T::Sums out_ = {};
  float sum_[T::kRows] = {};  // this thread's part of each row's
  float max_[T::kRows];       // each row's, in units of log 2
};

// Zeros in the rows after the last sequence.
template <class T>
__device__ void zero_slack(const AttentionForward& call, int block, int head) {
  const AttentionProblem& p = call.problem;
  if (call.sums) return;
  const Span slack = span_of(p.cu_seqlens_q, p.sequences, p.total_q, p.sequences);
  const int64_t begin = slack.begin + int64_t(block) * T::kSize, rows = slack.end - begin;
  const int64_t first = begin * p.heads + head, stride = p.heads;
  T::store_zeros(static_cast<float*>(call.out) + first * p.dim_v, stride * p.dim_v, rows, p.dim_v);
  if (threadIdx.x < T::kSize && threadIdx.x < rows) {
    static_cast<float*>(call.lse)[first + threadIdx.x * stride] = 0.0f;
  }
}

template <class T, int kBlocksPerSm>
__global__ void __launch_bounds__(T::kThreads, kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(128) float shared[];
  const AttentionProblem& p = params.call.problem;
  const Tile tile = params.tiles[blockIdx.x / p.heads];
  const int head = blockIdx.x % p.heads;
  if (tile.sequence < 0) return;
  if (tile.sequence == p.sequences) return zero_slack<T>(params.call, tile.block, head);
  int32_t block = tile.block;
  if (p.causal) {  // the last queries see most: start them first
    const int64_t len_q = span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence).size();
    block = int32_t((len_q - 1) / T::kSize) - block;
  }
  Facts& facts = *reinterpret_cast<Facts*>(shared + T::kScores + 2 * T::kStage);
  if (threadIdx.x == 0) facts = Facts(p, tile.sequence, block * T::kSize, head, head / (p.heads / p.kv_heads));
  __syncthreads();
  ForwardBlock<T>(params.call, facts, shared).run();
}

}  // namespace packseq::f32
