// Attention forward on the tensor cores of Ampere and later, float16 and bfloat16.
//
// One block computes kQueries rows of the output of one head. Its queries stay in shared memory; keys and values
// stream past in tiles of kKeys through two buffers each, filled by cp.async one step ahead, so a step has a single
// barrier. A warp owns 16 or 32 whole rows: scores, softmax and output never leave its registers, and the scores of
// one product are, packed to halves, an operand of the next.
//
//   for each block of keys some query may see:
//     S = Q K^T                     tensor cores
//     S = softcap, ALiBi, mask      only where asked for; the mask only on blocks that straddle an edge
//     m = running row maximum       a stale one, kept until it is short by a factor of 2^8: most steps rescale nothing
//     P = exp2(S - m), l += sum P
//     O += P V                      tensor cores
//   out = O / l, lse = m + log l
//
// Rows outside the sequence are never read: cp.async writes zeros in their place. What a row's sum is made of, and in
// which order, depends on its sequence alone.
#pragma once
#include "attention/attention_sm80.h"
#include "attention/mask.h"
#include "attention/scores.cuh"
#include "core/device/load_tile.cuh"
#include "core/device/mma.cuh"
#include "core/dispatch.h"
#include "core/launch.h"
#include "core/schedule.h"

namespace packseq::sm80 {

// Tile shapes. 32 rows a warp halve the shared-memory traffic of K and V; larger heads have registers for 16 only.
// Everything fits the 99 KiB of the smallest chips (sm_86, sm_89).
//
// kWide: the outputs are sums in float32, added to those of other keys (AttentionForward::sums).
template <int kDim_, bool kWide_>
struct ForwardConfig {
  static constexpr int kDim = kDim_;
  static constexpr bool kWide = kWide_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // of 16 rows, for each warp
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kBlocksPerSm = 2;
  static constexpr bool kHoldQueries = kDim == 64;  // in registers all along
  static constexpr float kStale = 8.0f;             // how far, in powers of two, a row's maximum may lag

  using QueryTile = SharedTile<kQueries, kDim>;
  using KeyTile = SharedTile<kKeys, kDim>;
  static constexpr int kTileBytes = QueryTile::kBytes + 4 * KeyTile::kBytes;
};

struct ForwardParams {
  AttentionForward call;
  const Tile* tiles;  // of queries
};

// What a block looks up now and then, kept out of its registers: they are full.
struct ForwardFacts {
  Mask mask;
  Scores scores;
  KeyBlocks blocks;
  VisibleKeys clear;  // of all of the block's queries: no need to mask tiles that lie within
};

template <class T, class C>
class ForwardBlock {
 public:
  __device__ ForwardBlock(const AttentionProblem& problem, const ForwardFacts& facts, Tile tile, int head,
                          uint32_t shared)
      : p_(problem),
        facts_(facts),
        q_begin_(int32_t(span_of(p_.cu_seqlens_q, p_.sequences, p_.total_q, tile.sequence).begin)),
        k_begin_(int32_t(span_of(p_.cu_seqlens_k, p_.sequences, p_.total_k, tile.sequence).begin)),
        head_(head),
        first_query_(tile.block * C::kQueries),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * 16 * C::kRowTiles),
        shared_q_(shared),
        shared_kv_(shared + C::QueryTile::kBytes) {
#pragma unroll
    for (auto& row : max_) row[0] = row[1] = -INFINITY;
  }

  // Starts copying the queries: to be called before the facts are there.
  __device__ void load_queries(int len_q) {
    const TileLoader<T, typename C::QueryTile, C::kThreads> queries(p_.q, head_, p_.dim);
    queries.load(shared_q_, q_begin_, first_query_, len_q);
  }

  __device__ void run(const AttentionForward& call) {
    const int kv_head = head_ / (p_.heads / p_.kv_heads);
    const TileLoader<T, typename C::KeyTile, C::kThreads> keys(p_.k, kv_head, p_.dim), values(p_.v, kv_head, p_.dim_v);
    const auto fetch = [&](int i, int first_key) {
      keys.load(shared_k(i), k_begin_, first_key, facts_.mask.len_k);
      values.load(shared_v(i), k_begin_, first_key, facts_.mask.len_k);
    };
    if (C::kWide) prefetch(call);
    const int count = facts_.blocks.count;
    int now = 0, next = facts_.blocks[0] * C::kKeys;
    if (count > 0) fetch(0, next);
    copy_async_commit();

    for (int i = 0; i < count; ++i) {
      now = next;
      next = facts_.blocks[i + 1] * C::kKeys;
      copy_async_wait<0>();
      __syncthreads();  // this step's tiles are there, and the other buffers are no longer read
      if (i + 1 < count) fetch(i + 1, next);
      if (C::kHoldQueries && i == 0) hold_queries();
      copy_async_commit();
      step(i, now);
    }
    if (count == 0) {  // the queries' copies may be under way still, to where the output will be staged
      copy_async_wait<0>();
      __syncthreads();
    }
    if constexpr (C::kWide) {
      add(call);
    } else {
      finish(call);
    }
  }

 private:
  static constexpr int kScoreTiles = C::kKeys / 8, kOutTiles = C::kDim / 8;

  __device__ uint32_t shared_k(int i) const { return shared_kv_ + (i & 1) * C::KeyTile::kBytes; }
  __device__ uint32_t shared_v(int i) const { return shared_kv_ + (2 + (i & 1)) * C::KeyTile::kBytes; }
  // The query that element e (0 .. 3) of row tile m belongs to; its key within the tile, of score tile n.
  __device__ int query_of(int m, int e) const { return first_query_ + warp_row_ + 16 * m + lane_ / 4 + 8 * (e / 2); }
  __device__ int key_of(int n, int e) const { return 8 * n + lane_ % 4 * 2 + e % 2; }

  __device__ void step(int i, int first_key) {
    float s[C::kRowTiles][kScoreTiles][4] = {};
    multiply_keys(s, shared_k(i));
    if (facts_.scores.transformed) {
      for_each(s, [&](float& x, int query, int key) {
        x = facts_.scores.transform(x, abs(query + facts_.mask.shift - (first_key + key)));
      });
    }
    if (!facts_.clear.hold(first_key, first_key + C::kKeys)) {
      hide(s, first_key);
    }
    softmax(s, facts_.scores.factor);
    multiply_values(s, shared_v(i));
  }

  __device__ void hide(float (&s)[C::kRowTiles][kScoreTiles][4], int first_key) const {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = query_of(m, 2 * r);
        const VisibleKeys keys(facts_.mask, query, query + 1);
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            if (!keys.hold(first_key + key_of(n, e))) s[m][n][e] = -INFINITY;
          }
        }
      }
    }
  }

  template <class F>
  __device__ void for_each(float (&s)[C::kRowTiles][kScoreTiles][4], const F& f) const {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) f(s[m][n][e], query_of(m, e), key_of(n, e));
      }
    }
  }

  // S += Q K^T for this warp's rows.
  __device__ void multiply_keys(float (&s)[C::kRowTiles][kScoreTiles][4], uint32_t shared_k) const {
    const int lane = afresh(lane_);
    const uint32_t q_part = rows_first(lane), k_part = columns_first(lane);
    multiply<T, C::kDim / 16>(
        s,
        [&](auto& q, int k) {
#pragma unroll
          for (int m = 0; m < C::kRowTiles; ++m) {
            if (C::kHoldQueries) {
#pragma unroll
              for (int j = 0; j < 4; ++j) q[m][j] = held_[m][k][j];
            } else {
              load_query(q[m], q_part, m, k);
            }
          }
        },
        [&](auto& b, int k, int n) { load_matrix_x4(b, fragment<typename C::KeyTile>(shared_k, k_part, 16 * n, k)); });
  }
  __device__ void hold_queries() {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int k = 0; k < C::kDim / 16; ++k)
        load_query(held_[C::kHoldQueries ? m : 0][C::kHoldQueries ? k : 0], rows_first(lane_), m, k);
    }
  }
  __device__ void load_query(uint32_t (&q)[4], uint32_t q_part, int m, int k) const {
    load_matrix_x4(q, fragment<typename C::QueryTile>(shared_q_, q_part, warp_row_ + 16 * m, k));
  }

  // O += P V, where s holds P.
  __device__ void multiply_values(const float (&s)[C::kRowTiles][kScoreTiles][4], uint32_t shared_v) {
    const uint32_t v_part = rows_first(afresh(lane_));
    multiply<T, C::kKeys / 16>(
        out_,
        [&](auto& p, int k) {
#pragma unroll
          for (int m = 0; m < C::kRowTiles; ++m) pack_fragment<T>(p[m], s[m], k);
        },
        [&](auto& b, int k, int n) {
          load_matrix_x4_transposed(b, fragment<typename C::KeyTile>(shared_v, v_part, 16 * k, n));
        });
  }

  // Scores to P, in place; rows' maxima and sums brought up to date.
  __device__ void softmax(float (&s)[C::kRowTiles][kScoreTiles][4], float factor) {
    float top[C::kRowTiles][2];
    bool behind = false;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < kScoreTiles; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        top[m][r] = x;
        behind |= (x - max_[m][r]) * factor > C::kStale;
      }
    }
    if (__any_sync(~0u, behind)) rescale(top, factor);
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float offset = max_[m][r] == -INFINITY ? 0.0f : max_[m][r] * factor;
        float sum[2] = {};
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            s[m][n][e] = exp2_approx(fmaf(s[m][n][e], factor, -offset));
            sum[e % 2] += s[m][n][e];
          }
        }
        sum_[m][r] += sum[0] + sum[1];
      }
    }
  }

  // Raises the warp's maxima to `top` and brings what was summed under the old ones to the new.
  __device__ void rescale(const float (&top)[C::kRowTiles][2], float factor) {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float raised = fmaxf(max_[m][r], top[m][r]);
        const float by = raised == -INFINITY ? 1.0f : exp2_approx((max_[m][r] - raised) * factor);
        max_[m][r] = raised;
        sum_[m][r] *= by;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out_[m][n][2 * r] *= by;
          out_[m][n][2 * r + 1] *= by;
        }
      }
    }
  }

  // Brings the sums that add() will read to the L2: blocks end together, and would all wait for the memory then.
  __device__ void prefetch(const AttentionForward& call) const {
    constexpr int kFloats = 32, kLines = C::kDim / kFloats;  // of 128 bytes, in a row
    for (int i = lane_; i < 16 * C::kRowTiles * kLines; i += 32) {
      const int query = first_query_ + warp_row_ + i / kLines, col = i % kLines * kFloats;
      const float* const row =
          static_cast<float*>(call.out) + ((int64_t(q_begin_) + query) * p_.heads + head_) * p_.dim_v;
      if (query < facts_.mask.len_q && col < p_.dim_v) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + col));
    }
  }

  // Adds this block's sums, relative to its rows' maxima, to those of other keys, relative to powers of two. These are
  // in device memory, a microsecond away: all that a thread has of a row is asked for before the first is written.
  __device__ void add(const AttentionForward& call) const {
    const auto row_of = [&](int m, int r) { return (int64_t(q_begin_) + query_of(m, 2 * r)) * p_.heads + head_; };
    const auto sums_of = [&](int m, int r) { return static_cast<float2*>(call.sums) + row_of(m, r); };
    float2 before[C::kRowTiles][2] = {};
    float mine[C::kRowTiles][2];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        mine[m][r] = sum_[m][r];
        mine[m][r] += __shfl_xor_sync(~0u, mine[m][r], 1);
        mine[m][r] += __shfl_xor_sync(~0u, mine[m][r], 2);
        if (query_of(m, 2 * r) >= facts_.mask.len_q) mine[m][r] = 0.0f;
        if (mine[m][r] != 0.0f) before[m][r] = *sums_of(m, r);
      }
    }
    __syncwarp();  // all have read what one writes
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (mine[m][r] == 0.0f) continue;
        const float top = max_[m][r] * facts_.scores.factor, both = fmaxf(before[m][r].x, ceilf(top));
        const float keep = exp2_approx(before[m][r].x - both), by = exp2_approx(top - both);
        float* const out = static_cast<float*>(call.out) + row_of(m, r) * p_.dim_v + lane_ % 4 * 2;
        const auto at = [&](int n) { return reinterpret_cast<float2*>(out + 8 * n); };
        float2 x[kOutTiles] = {};
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          if (keep != 0.0f && 8 * n < p_.dim_v) x[n] = *at(n);
        }
        if (lane_ % 4 == 0) *sums_of(m, r) = {both, before[m][r].y * keep + mine[m][r] * by};
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          const float2 y = {x[n].x * keep + out_[m][n][2 * r] * by, x[n].y * keep + out_[m][n][2 * r + 1] * by};
          if (8 * n < p_.dim_v) *at(n) = y;
        }
      }
    }
  }

  // Normalises, writes the log-sum-exp, and the output through this warp's own rows of the queries' shared memory.
  __device__ void finish(const AttentionForward& call) {
    const float* sinks = static_cast<const float*>(p_.sinks);
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = sum_[m][r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float top = max_[m][r] * facts_.scores.factor, by = 1.0f;
        if (sinks) {
          const float sink = sinks[head_] * kLog2e, raised = fmaxf(top, sink);
          const float base = raised == -INFINITY ? 0.0f : raised;  // no key, and a sink that weighs nothing
          by = exp2_approx(top - base);
          sum = sum * by + exp2_approx(sink - base);
          top = raised;
        }
        by = sum == 0.0f ? 0.0f : by / sum;
        const int query = query_of(m, 2 * r);
        if (lane_ % 4 == 0 && query < facts_.mask.len_q) {
          const float lse = sum == 0.0f ? -INFINITY : top * kLn2 + logf(sum);
          static_cast<float*>(call.lse)[(int64_t(q_begin_) + query) * p_.heads + head_] = lse;
        }
        const int row = warp_row_ + 16 * m + 8 * r + lane_ / 4;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          const uint32_t halves = pack_halves<T>(out_[m][n][2 * r] * by, out_[m][n][2 * r + 1] * by);
          const uint32_t address = shared_q_ + C::QueryTile::offset(row, n) + lane_ % 4 * 4;
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(halves) : "memory");
        }
      }
    }
    __syncwarp();
    constexpr int kChunks = C::kDim / 8;  // of 16 bytes, in a row
    for (int i = lane_; i < 16 * C::kRowTiles * kChunks; i += 32) {
      const int row = warp_row_ + i / kChunks, chunk = i % kChunks, query = first_query_ + row;
      if (query >= facts_.mask.len_q || chunk * 8 >= p_.dim_v) continue;
      uint4 x;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(shared_q_ + C::QueryTile::offset(row, chunk)));
      T* out = static_cast<T*>(call.out) + ((int64_t(q_begin_) + query) * p_.heads + head_) * p_.dim_v + chunk * 8;
      *reinterpret_cast<uint4*>(out) = x;
    }
  }

  const AttentionProblem& p_;
  const ForwardFacts& facts_;
  const int32_t q_begin_, k_begin_;
  const int head_, first_query_, lane_, warp_row_;
  const uint32_t shared_q_, shared_kv_;

  float out_[C::kRowTiles][kOutTiles][4] = {};
  uint32_t held_[C::kHoldQueries ? C::kRowTiles : 1][C::kHoldQueries ? C::kDim / 16 : 1][4];
  float sum_[C::kRowTiles][2] = {};  // this thread's part of each row's
  float max_[C::kRowTiles][2];       // each row's, before `factor`; may lag by kStale
};

// Zeros in the rows after the last sequence.
template <class T, class C>
__device__ void zero_slack(const AttentionForward& call, int block, int head) {
  const AttentionProblem& p = call.problem;
  if (C::kWide) return;
  const Span slack = span_of(p.cu_seqlens_q, p.sequences, p.total_q, p.sequences);
  const int chunks = p.dim_v / 8;
  for (int i = threadIdx.x; i < C::kQueries * chunks; i += C::kThreads) {
    const int64_t row = slack.begin + int64_t(block) * C::kQueries + i / chunks;
    if (row >= slack.end) break;
    T* out = static_cast<T*>(call.out) + (row * p.heads + head) * p.dim_v + i % chunks * 8;
    *reinterpret_cast<uint4*>(out) = uint4{};
    if (i % chunks == 0) static_cast<float*>(call.lse)[row * p.heads + head] = 0.0f;
  }
}

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionProblem& p = params.call.problem;
  Tile tile = params.tiles[blockIdx.x / p.heads];
  const int head = blockIdx.x % p.heads;
  if (tile.sequence < 0) return;
  if (tile.sequence == p.sequences) return zero_slack<T, C>(params.call, tile.block, head);
  const int len_q = int(span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence).size());
  const int64_t len_k = span_of(p.cu_seqlens_k, p.sequences, p.total_k, tile.sequence).size();
  if (C::kWide && len_k == 0) return;
  if (p.causal) tile.block = (len_q - 1) / C::kQueries - tile.block;  // the last queries see most: start them first
  ForwardFacts& facts = *reinterpret_cast<ForwardFacts*>(shared + C::kTileBytes);
  ForwardBlock<T, C> block(p, facts, tile, head, shared_address(shared));
  block.load_queries(len_q);
  if (threadIdx.x == 0) {
    const Mask mask(p, tile.sequence, len_q, len_k);
    const int first = tile.block * C::kQueries, last = min(first + C::kQueries, mask.len_q);
    facts = {mask, Scores(p, head), KeyBlocks(mask, first, last, C::kKeys), VisibleKeys(mask, first, last)};
  }
  __syncthreads();
  block.run(params.call);
}

template <class T, int kDim>
void forward(const AttentionForward& call, const Tile* tiles, int64_t places, cudaStream_t stream) {
  dispatch<false, true>("wide", call.sums != nullptr, [&](auto wide) {
    using C = ForwardConfig<kDim, wide>;
    static_assert(C::kQueries == forward_rows(kDim));
    launch("attention forward", forward_kernel<T, C>, places * call.problem.heads, C::kThreads,
           C::kTileBytes + sizeof(ForwardFacts), stream, {.call = call, .tiles = tiles});
  });
}

}  // namespace packseq::sm80
