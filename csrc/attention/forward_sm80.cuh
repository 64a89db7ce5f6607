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
#include "core/launch.h"
#include "core/schedule.h"

namespace packseq::sm80 {

// Tile shapes. 32 rows a warp halve the shared-memory traffic of K and V; larger heads have registers for 16 only.
// Everything fits the 99 KiB of the smallest chips (sm_86, sm_89).
template <int kDim_>
struct ForwardConfig {
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // of 16 rows, for each warp
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kBlocksPerSm = 2;
  static constexpr float kStale = 8.0f;  // how far, in powers of two, a row's maximum may lag

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
};

template <class T, class C>
class ForwardBlock {
 public:
  __device__ ForwardBlock(const AttentionProblem& problem, const ForwardFacts& facts, Tile tile, int head,
                          uint32_t shared)
      : p_(problem),
        facts_(facts),
        q_begin_(span_of(p_.cu_seqlens_q, p_.sequences, p_.total_q, tile.sequence).begin),
        k_begin_(span_of(p_.cu_seqlens_k, p_.sequences, p_.total_k, tile.sequence).begin),
        head_(head),
        first_query_(tile.block * C::kQueries),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x / 32 * 16 * C::kRowTiles),
        shared_q_(shared),
        shared_kv_(shared + C::QueryTile::kBytes) {
#pragma unroll
    for (auto& row : max_) row[0] = row[1] = -INFINITY;
  }

  __device__ void run(const AttentionForward& call) {
    const int kv_head = head_ / (p_.heads / p_.kv_heads);
    const TileLoader<T, typename C::KeyTile, C::kThreads> keys(rows(p_.k, k_begin_, kv_head), p_.k.token,
                                                               facts_.mask.len_k, p_.dim);
    const TileLoader<T, typename C::KeyTile, C::kThreads> values(rows(p_.v, k_begin_, kv_head), p_.v.token,
                                                                 facts_.mask.len_k, p_.dim_v);
    const int count = facts_.blocks.count;
    if (count > 0) {
      const TileLoader<T, typename C::QueryTile, C::kThreads> queries(rows(p_.q, q_begin_, head_), p_.q.token,
                                                                      facts_.mask.len_q, p_.dim);
      queries.load(shared_q_, first_query_);
      keys.load(shared_k(0), facts_.blocks[0] * C::kKeys);
      values.load(shared_v(0), facts_.blocks[0] * C::kKeys);
    }
    copy_async_commit();

    for (int i = 0; i < count; ++i) {
      copy_async_wait<0>();
      __syncthreads();  // this step's tiles are there, and the other buffers are no longer read
      if (i + 1 < count) {
        keys.load(shared_k(i + 1), facts_.blocks[i + 1] * C::kKeys);
        values.load(shared_v(i + 1), facts_.blocks[i + 1] * C::kKeys);
      }
      copy_async_commit();
      step(i, facts_.blocks[i] * C::kKeys);
    }
    finish(call);
  }

 private:
  static constexpr int kScoreTiles = C::kKeys / 8, kOutTiles = C::kDim / 8;

  __device__ static const T* rows(const Packed& x, int64_t begin, int head) {
    return static_cast<const T*>(x.data) + begin * x.token + head * x.head;
  }
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
    const int end = min(first_query_ + C::kQueries, facts_.mask.len_q);
    if (!facts_.mask.all_visible(first_query_, end, first_key, first_key + C::kKeys)) {
      for_each(s, [&](float& x, int query, int key) {
        if (!facts_.mask.visible(query, first_key + key)) x = -INFINITY;
      });
    }
    softmax(s, facts_.scores.factor);
    multiply_values(s, shared_v(i));
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
    const uint32_t q_part = rows_first(lane_), k_part = columns_first(lane_);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      uint32_t q[C::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        load_matrix_x4(q[m], fragment<typename C::QueryTile>(shared_q_, q_part, warp_row_ + 16 * m, k));
      }
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        load_matrix_x4(b, fragment<typename C::KeyTile>(shared_k, k_part, 8 * n, k));
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
          mma_16x8x16<T>(s[m][n], q[m], b[0], b[1]);
          mma_16x8x16<T>(s[m][n + 1], q[m], b[2], b[3]);
        }
      }
    }
  }

  // O += P V, where s holds P.
  __device__ void multiply_values(const float (&s)[C::kRowTiles][kScoreTiles][4], uint32_t shared_v) {
    const uint32_t v_part = rows_first(lane_);
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
      uint32_t a[C::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float(&x)[4] = s[m][2 * k + j / 2];
          a[m][j] = pack_halves<T>(x[j % 2 * 2], x[j % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, fragment<typename C::KeyTile>(shared_v, v_part, 16 * k, n / 2));
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
          mma_16x8x16<T>(out_[m][n], a[m], b[0], b[1]);
          mma_16x8x16<T>(out_[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
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
          by = top == -INFINITY ? 0.0f : exp2_approx(top - raised);
          sum = sum * by + exp2_approx(sink - raised);
          top = raised;
        }
        by = sum == 0.0f ? 0.0f : by / sum;
        const int query = query_of(m, 2 * r);
        if (lane_ % 4 == 0 && query < facts_.mask.len_q) {
          const float lse = sum == 0.0f ? -INFINITY : top * kLn2 + logf(sum);
          static_cast<float*>(call.lse)[(q_begin_ + query) * p_.heads + head_] = lse;
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
      T* out = static_cast<T*>(call.out) + ((q_begin_ + query) * p_.heads + head_) * p_.dim_v + chunk * 8;
      *reinterpret_cast<uint4*>(out) = x;
    }
  }

  const AttentionProblem& p_;
  const ForwardFacts& facts_;
  const int64_t q_begin_, k_begin_;
  const int head_, first_query_, lane_, warp_row_;
  const uint32_t shared_q_, shared_kv_;

  float out_[C::kRowTiles][kOutTiles][4] = {};
  float sum_[C::kRowTiles][2] = {};  // this thread's part of each row's
  float max_[C::kRowTiles][2];       // each row's, before `factor`; may lag by kStale
};

// Zeros in the rows after the last sequence.
template <class T, class C>
__device__ void zero_slack(const AttentionForward& call, int block, int head) {
  const AttentionProblem& p = call.problem;
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
  const int64_t len_q = span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence).size();
  if (p.causal)
    tile.block = int((len_q - 1) / C::kQueries) - tile.block;  // the last queries see most: start them first
  ForwardFacts& facts = *reinterpret_cast<ForwardFacts*>(shared + C::kTileBytes);
  if (threadIdx.x == 0) {
    const Mask mask(p, len_q, span_of(p.cu_seqlens_k, p.sequences, p.total_k, tile.sequence).size());
    const int first = tile.block * C::kQueries;
    facts = {mask, Scores(p, head), KeyBlocks(mask, first, min(first + C::kQueries, mask.len_q), C::kKeys)};
  }
  __syncthreads();
  ForwardBlock<T, C>(p, facts, tile, head, shared_address(shared)).run(params.call);
}

template <class T, int kDim>
void forward(const AttentionForward& call, const Tile* tiles, int64_t places, cudaStream_t stream) {
  using C = ForwardConfig<kDim>;
  static_assert(C::kQueries == forward_rows(kDim));
  launch("attention forward", forward_kernel<T, C>, places * call.problem.heads, C::kThreads,
         C::kTileBytes + sizeof(ForwardFacts), stream, {.call = call, .tiles = tiles});
}

}  // namespace packseq::sm80
