// Attention backward on the tensor cores of Ampere and later, float16 and bfloat16; the same bits on every run.
//
// One block owns kKeys keys of one key/value head and walks over the queries that see them, for every query head of
// the group. A warp owns 16 or 32 of the keys. Scores are computed transposed, keys down and queries across, so that
// P and dS are, packed to halves, the left operands of dV and dK as they stand in registers; only dQ needs dS from
// shared memory. With D = rowsum(dO * O) - dlse, and everything in units of log 2:
//
//   for each block of queries:
//     S^T = K Q^T, dP^T = V dO^T
//     P^T = exp2(S^T - lse), dS^T = P^T * (dP^T - D)
//     dV += P^T dO, dK += dS^T Q
//     dQ += dS K                      one step late, so that a step has a single barrier
//
// dQ is summed over the key blocks in float32 global memory. The blocks take turns in ascending order of keys, counted
// by one integer a query block; they walk down from the last queries, so under a causal mask, where early keys have
// most to do, nobody waits but in the first few steps. Whoever is first stores instead of adding: nothing is cleared.
#pragma once
#include "attention/attention_sm80.h"
#include "attention/mask.h"
#include "attention/scores.cuh"
#include "core/device/load_tile.cuh"
#include "core/device/mma.cuh"
#include "core/device/turns.cuh"
#include "core/launch.h"

namespace packseq::sm80 {

template <int kDim_>
struct BackwardConfig {
  static constexpr int kDim = kDim_;
  // Accumulators of dK and dV fill the registers: 32 keys a warp up to 64 columns, 16 up to 128; beyond that two
  // warps share their keys, compute S and dP both, and own half of the columns each.
  static constexpr int kWarps = kDim <= 64 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kKeyTiles = kDim <= 64 ? 2 : 1;  // of 16 keys, for each warp
  static constexpr int kSplit = kDim <= 128 ? 1 : 2;    // warps that share their keys
  static constexpr int kKeys = 16 * kKeyTiles * kWarps / kSplit;
  static constexpr int kQueries = kDim <= 128 ? 64 : 32;     // of a step
  static constexpr int kChunk = kDim <= 64 ? 32 : kQueries;  // queries whose scores are in registers at once
  static constexpr int kBlocksPerSm = kDim <= 64 ? 2 : 1;
  // A warp's part of dQ.
  static constexpr int kDqRows = kDim % 64 == 0 && kDim != 192 ? 32 : 16, kDqCols = kDqRows == 32 ? 32 : 48;

  using KeyTile = SharedTile<kKeys, kDim>;
  using QueryTile = SharedTile<kQueries, kDim>;
  using ScoreTile = SharedTile<kKeys, kQueries>;
  static constexpr int kTileBytes = 2 * KeyTile::kBytes + 4 * QueryTile::kBytes + 2 * ScoreTile::kBytes;
  static constexpr int kStatisticsBytes = 2 * kQueries * int(sizeof(float2));

  static_assert((kQueries / kDqRows) * (kDim / kDqCols) == kWarps);
};

struct BackwardParams {
  AttentionBackward call;
  BackwardScratch scratch;
  const Tile* tiles;  // of keys
};

// What a block looks up now and then, kept out of its registers: they are full.
struct BackwardFacts {
  Mask mask;
  Scores scores;  // of the first head: only the slope differs between heads
};

// One step of a block's walk: a query head of the group, a block of queries, and this block's turn to add to its dQ.
struct Visit {
  int group, block, turn;
};

template <class T, class C>
class BackwardBlock {
 public:
  __device__ BackwardBlock(const BackwardParams& params, const BackwardFacts& facts, Tile tile, int kv_head,
                           unsigned char* shared)
      : params_(params),
        p_(params.call.problem),
        facts_(facts),
        sequence_(tile.sequence),
        kv_head_(kv_head),
        key_block_(tile.block),
        q_begin_(span_of(p_.cu_seqlens_q, p_.sequences, p_.total_q, tile.sequence).begin),
        k_begin_(span_of(p_.cu_seqlens_k, p_.sequences, p_.total_k, tile.sequence).begin),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        warp_key_(warp_ % (C::kWarps / C::kSplit) * 16 * C::kKeyTiles),
        shared_k_(shared_address(shared)),
        statistics_(reinterpret_cast<float2*>(shared + C::kTileBytes)) {}

  __device__ void run() {
    const QueryBlocks blocks(facts_.mask, key_block_ * C::kKeys, min((key_block_ + 1) * C::kKeys, facts_.mask.len_k),
                             C::kQueries);
    first_block_ = blocks.begin;
    blocks_end_ = blocks.end;
    Visit next = advance({0, blocks_end_, 0}), now, before, before_that;
    if (next.group < group_size()) {
      load_keys();
      load_queries(next, 0);
      copy_async_commit();
      store_statistics(load_statistics(next), 0);
    }
    int i = 0;
    for (; next.group < group_size(); ++i) {
      before_that = before;
      before = now;
      now = next;
      copy_async_wait<0>();
      __syncthreads();  // this step's tiles and the last step's dS are there; the other buffers are free
      if (i > 1) pass(before_that);
      next = advance(now);
      const bool more = next.group < group_size();
      float2 statistics;
      if (more) {
        load_queries(next, i + 1);
        statistics = load_statistics(next);
      }
      copy_async_commit();
      if (i > 0) accumulate_dq(before, i - 1);
      step(now, i);
      if (more) store_statistics(statistics, i + 1);
    }
    if (i > 0) {
      __syncthreads();
      if (i > 1) pass(before);
      accumulate_dq(now, i - 1);
    }
    __syncthreads();
    if (i > 0) pass(now);
    finish();
  }

 private:
  static constexpr int kCols = C::kDim / C::kSplit;  // of dK and dV that a warp owns
  static constexpr int kColTiles = kCols / 8, kScoreTiles = C::kChunk / 8;
  using Accumulator = float[C::kKeyTiles][kColTiles][4];
  using Chunk = float[C::kKeyTiles][kScoreTiles][4];

  __device__ int group_size() const { return p_.heads / p_.kv_heads; }
  __device__ int head_of(Visit v) const { return kv_head_ * group_size() + v.group; }
  __device__ uint32_t shared_v() const { return shared_k_ + C::KeyTile::kBytes; }
  __device__ uint32_t shared_q(int i) const { return shared_v() + C::KeyTile::kBytes + (i & 1) * C::QueryTile::kBytes; }
  __device__ uint32_t shared_dout(int i) const { return shared_q(i) + 2 * C::QueryTile::kBytes; }
  __device__ uint32_t shared_ds(int i) const {
    return shared_v() + C::KeyTile::kBytes + 4 * C::QueryTile::kBytes + (i & 1) * C::ScoreTile::kBytes;
  }

  // The next block of queries, downwards and then on to the next head, that lists this block of keys.
  __device__ Visit advance(Visit v) const {
    for (--v.block; v.group < group_size(); --v.block) {
      if (v.block < first_block_) {
        ++v.group;
        v.block = blocks_end_;
        continue;
      }
      const int q0 = v.block * C::kQueries;
      const KeyBlocks keys(facts_.mask, q0, min(q0 + C::kQueries, facts_.mask.len_q), C::kKeys);
      v.turn = key_block_ < keys.sinks ? key_block_ : key_block_ - keys.first + keys.sinks;
      const bool listed = key_block_ < keys.sinks || (key_block_ >= keys.first && v.turn < keys.count);
      if (listed) break;
    }
    return v;
  }

  __device__ int* counter(Visit v) const {
    const int64_t slot = q_begin_ / C::kQueries + sequence_ + v.block;
    return params_.scratch.turns + head_of(v) * turn_slots(p_, C::kDim) + slot;
  }
  __device__ void pass(Visit v) const {
    if (threadIdx.x == 0 && facts_.mask.len_k > C::kKeys) pass_turn(counter(v));
  }

  __device__ void load_keys() const {
    const auto rows = [&](const Packed& x) {
      return static_cast<const T*>(x.data) + k_begin_ * x.token + kv_head_ * x.head;
    };
    using Loader = TileLoader<T, typename C::KeyTile, C::kThreads>;
    Loader(rows(p_.k), p_.k.token, facts_.mask.len_k, p_.dim).load(shared_k_, key_block_ * C::kKeys);
    Loader(rows(p_.v), p_.v.token, facts_.mask.len_k, p_.dim_v).load(shared_v(), key_block_ * C::kKeys);
  }

  __device__ void load_queries(Visit v, int i) const {
    const auto rows = [&](const Packed& x) {
      return static_cast<const T*>(x.data) + q_begin_ * x.token + head_of(v) * x.head;
    };
    using Loader = TileLoader<T, typename C::QueryTile, C::kThreads>;
    const Packed& dout = params_.call.dout;
    Loader(rows(p_.q), p_.q.token, facts_.mask.len_q, p_.dim).load(shared_q(i), v.block * C::kQueries);
    Loader(rows(dout), dout.token, facts_.mask.len_q, p_.dim_v).load(shared_dout(i), v.block * C::kQueries);
  }

  // lse and D of the step's query number threadIdx.x; a row outside the sequence has no weight.
  __device__ float2 load_statistics(Visit v) const {
    const int query = v.block * C::kQueries + threadIdx.x;
    if (threadIdx.x >= C::kQueries || query >= facts_.mask.len_q) return {INFINITY, 0.0f};
    const int64_t row = head_of(v) * p_.total_q + q_begin_ + query;
    return {params_.scratch.lse[row], params_.scratch.delta[row]};
  }
  __device__ void store_statistics(float2 x, int i) const {
    if (threadIdx.x < C::kQueries) statistics_[(i & 1) * C::kQueries + threadIdx.x] = x;
  }

  __device__ void step(Visit v, int i) {
#pragma unroll
    for (int chunk = 0; chunk < C::kQueries; chunk += C::kChunk) {
      Chunk s = {}, dp = {};
      multiply_transposed(s, shared_k_, shared_q(i), chunk);
      multiply_transposed(dp, shared_v(), shared_dout(i), chunk);
      differentiate(s, dp, v, i, chunk);
      accumulate(dv_, s, shared_dout(i), chunk);
      store_ds(dp, i, chunk);
      accumulate(dk_, dp, shared_q(i), chunk);
    }
  }

  // s += A B^T for this warp's rows of A and a chunk of the rows of B.
  __device__ void multiply_transposed(Chunk& s, uint32_t shared_a, uint32_t shared_b, int chunk) const {
    const uint32_t a_part = rows_first(lane_), b_part = columns_first(lane_);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      uint32_t a[C::kKeyTiles][4];
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) {
        load_matrix_x4(a[m], fragment<typename C::KeyTile>(shared_a, a_part, warp_key_ + 16 * m, k));
      }
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        load_matrix_x4(b, fragment<typename C::QueryTile>(shared_b, b_part, chunk + 8 * n, k));
#pragma unroll
        for (int m = 0; m < C::kKeyTiles; ++m) {
          mma_16x8x16<T>(s[m][n], a[m], b[0], b[1]);
          mma_16x8x16<T>(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // s becomes P, dp becomes dS.
  __device__ void differentiate(Chunk& s, Chunk& dp, Visit v, int i, int chunk) const {
    const int first_query = v.block * C::kQueries + chunk, first_key = key_block_ * C::kKeys;
    const int query_end = min(first_query + C::kChunk, facts_.mask.len_q);
    const bool all = facts_.mask.all_visible(first_query, query_end, first_key, first_key + C::kKeys);
    const auto key_of = [&](int m, int e) { return first_key + warp_key_ + 16 * m + lane_ / 4 + 8 * (e / 2); };
    const auto query_of = [&](int n, int e) { return first_query + 8 * n + lane_ % 4 * 2 + e % 2; };
    const auto for_each = [&](const auto& f) {
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) f(s[m][n][e], dp[m][n][e], query_of(n, e), key_of(m, e), n, e);
        }
      }
    };
    if (!facts_.scores.transformed) {
      const float factor = facts_.scores.factor;
      for_each([&](float& x, float&, int, int, int, int) { x *= factor; });
    } else {
      Scores scores = facts_.scores;
      if (p_.alibi_slopes) scores.slope = static_cast<const float*>(p_.alibi_slopes)[head_of(v)] * kLog2e;
      for_each([&](float& x, float& y, int query, int key, int n, int e) {
        // y - D is scaled by the softcap's slope, here where the score is still at hand.
        const float slope = scores.derivative(x), d = statistics_[(i & 1) * C::kQueries + chunk + query_in(n, e)].y;
        y = fmaf(slope, y - d, d);
        x = scores.transform(x, abs(query + facts_.mask.shift - key));
      });
    }
    if (!all) {
      for_each([&](float& x, float&, int query, int key, int, int) {
        if (!facts_.mask.visible(query, key)) x = -INFINITY;
      });
    }
    const float2* statistics = statistics_ + (i & 1) * C::kQueries + chunk;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float4 two = *reinterpret_cast<const float4*>(statistics + query_in(n, 0));  // of both of its queries
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_approx(s[m][n][e] - (e % 2 ? two.z : two.x));
          s[m][n][e] = p;
          dp[m][n][e] = p * (dp[m][n][e] - (e % 2 ? two.w : two.y));
        }
      }
    }
  }
  __device__ int query_in(int n, int e) const { return 8 * n + lane_ % 4 * 2 + e % 2; }

  // The A operand for rows 16 * m of the product over queries 16 * k of the chunk.
  __device__ static void pack(uint32_t (&a)[4], const Chunk& x, int m, int k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float(&pair)[4] = x[m][2 * k + j / 2];
      a[j] = pack_halves<T>(pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
    }
  }

  // sum += x B for this warp's keys and columns; rows of B are the chunk's queries.
  __device__ void accumulate(Accumulator& sum, const Chunk& x, uint32_t shared_b, int chunk) const {
    const uint32_t b_part = rows_first(lane_);
    const int first_col = C::kSplit == 1 ? 0 : warp_ / (C::kWarps / C::kSplit) * (kCols / 16);
#pragma unroll
    for (int k = 0; k < C::kChunk / 16; ++k) {
      uint32_t a[C::kKeyTiles][4];
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) pack(a[m], x, m, k);
#pragma unroll
      for (int n = 0; n < kColTiles; n += 2) {
        uint32_t b[4];
        load_matrix_x4_transposed(b,
                                  fragment<typename C::QueryTile>(shared_b, b_part, chunk + 16 * k, first_col + n / 2));
#pragma unroll
        for (int m = 0; m < C::kKeyTiles; ++m) {
          mma_16x8x16<T>(sum[m][n], a[m], b[0], b[1]);
          mma_16x8x16<T>(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // dS^T into shared memory as it lies in registers: a row a key.
  __device__ void store_ds(const Chunk& ds, int i, int chunk) const {
    if (C::kSplit > 1 && warp_ >= C::kWarps / C::kSplit) return;  // the other warp has the same
#pragma unroll
    for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_key_ + 16 * m + 8 * r + lane_ / 4;
          const uint32_t address = shared_ds(i) + C::ScoreTile::offset(row, chunk / 8 + n) + lane_ % 4 * 4;
          const uint32_t halves = pack_halves<T>(ds[m][n][2 * r], ds[m][n][2 * r + 1]);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(halves) : "memory");
        }
      }
    }
  }

  // dQ += dS K for the queries of step i, in turn with the other blocks of keys. In a row of the sum the columns
  // 16 c + {2t, 2t + 1, 2t + 8, 2t + 9} stand together, at 16 c + 4 t: one 16-byte access for a thread.
  __device__ void accumulate_dq(Visit v, int i) const {
    constexpr int kRowTiles = C::kDqRows / 16, kTiles = C::kDqCols / 8, kAcross = C::kDim / C::kDqCols;
    const int row0 = warp_ / kAcross * C::kDqRows, col0 = warp_ % kAcross * C::kDqCols;
    float dq[kRowTiles][kTiles][4] = {};
    const uint32_t a_part = columns_first(lane_), b_part = rows_first(lane_);
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrix_x4_transposed(a[m], fragment<typename C::ScoreTile>(shared_ds(i), a_part, 16 * k, row0 / 16 + m));
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, fragment<typename C::KeyTile>(shared_k_, b_part, 16 * k, col0 / 16 + n / 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_16x8x16<T>(dq[m][n], a[m], b[0], b[1]);
          mma_16x8x16<T>(dq[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (v.turn > 0) await_turn(counter(v), v.turn);
    float* rows = params_.scratch.dq + (head_of(v) * p_.total_q + q_begin_) * C::kDim + col0 + lane_ % 4 * 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = v.block * C::kQueries + row0 + 16 * m + 8 * r + lane_ / 4;
        if (query >= facts_.mask.len_q) continue;
        float* row = rows + int64_t(query) * C::kDim;
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          const float4 x = {dq[m][n][2 * r], dq[m][n][2 * r + 1], dq[m][n + 1][2 * r], dq[m][n + 1][2 * r + 1]};
          if (v.turn == 0) {
            *reinterpret_cast<float4*>(row + 8 * n) = x;
          } else {
            add_global(row + 8 * n, x);
          }
        }
      }
    }
  }

  // dK and dV through the keys' and values' shared memory, which nobody reads any more, to whole rows.
  __device__ void finish() const {
    stage(dk_, shared_k_, float(p_.scale));
    stage(dv_, shared_v(), 1.0f);
    __syncthreads();
    store(params_.call.dk, shared_k_, p_.dim);
    store(params_.call.dv, shared_v(), p_.dim_v);
  }

  __device__ void stage(const Accumulator& sum, uint32_t tile, float by) const {
    const int first_col = C::kSplit == 1 ? 0 : warp_ / (C::kWarps / C::kSplit) * kColTiles;
#pragma unroll
    for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_key_ + 16 * m + 8 * r + lane_ / 4;
          const uint32_t address = tile + C::KeyTile::offset(row, first_col + n) + lane_ % 4 * 4;
          const uint32_t halves = pack_halves<T>(sum[m][n][2 * r] * by, sum[m][n][2 * r + 1] * by);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(halves) : "memory");
        }
      }
    }
  }

  __device__ void store(void* out, uint32_t tile, int dim) const {
    constexpr int kChunks = C::kDim / 8;
    for (int i = threadIdx.x; i < C::kKeys * kChunks; i += C::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, key = key_block_ * C::kKeys + row;
      if (key >= facts_.mask.len_k || chunk * 8 >= dim) continue;
      uint4 x;
      asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(tile + C::KeyTile::offset(row, chunk)));
      T* to = static_cast<T*>(out) + ((k_begin_ + key) * p_.kv_heads + kv_head_) * dim + chunk * 8;
      *reinterpret_cast<uint4*>(to) = x;
    }
  }

  const BackwardParams& params_;
  const AttentionProblem& p_;
  const BackwardFacts& facts_;
  const int sequence_, kv_head_, key_block_;
  const int64_t q_begin_, k_begin_;
  const int lane_, warp_, warp_key_;
  const uint32_t shared_k_;
  float2* const statistics_;
  int first_block_, blocks_end_;

  Accumulator dk_ = {}, dv_ = {};
};

// Zeros in the rows after the last sequence.
template <class T, class C>
__device__ void zero_slack_keys(const AttentionBackward& call, int block, int kv_head) {
  const AttentionProblem& p = call.problem;
  const Span slack = span_of(p.cu_seqlens_k, p.sequences, p.total_k, p.sequences);
  const auto zero = [&](void* out, int dim) {
    for (int i = threadIdx.x; i < C::kKeys * dim / 8; i += C::kThreads) {
      const int64_t row = slack.begin + int64_t(block) * C::kKeys + i / (dim / 8);
      if (row >= slack.end) break;
      T* to = static_cast<T*>(out) + (row * p.kv_heads + kv_head) * dim + i % (dim / 8) * 8;
      *reinterpret_cast<uint4*>(to) = uint4{};
    }
  };
  zero(call.dk, p.dim);
  zero(call.dv, p.dim_v);
}

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionProblem& p = params.call.problem;
  const Tile tile = params.tiles[blockIdx.x / p.kv_heads];
  const int kv_head = blockIdx.x % p.kv_heads;
  if (tile.sequence < 0) return;
  if (tile.sequence == p.sequences) return zero_slack_keys<T, C>(params.call, tile.block, kv_head);
  BackwardFacts& facts = *reinterpret_cast<BackwardFacts*>(shared + C::kTileBytes + C::kStatisticsBytes);
  if (threadIdx.x == 0) {
    facts = {Mask(p, span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence).size(),
                  span_of(p.cu_seqlens_k, p.sequences, p.total_k, tile.sequence).size()),
             Scores(p, kv_head * (p.heads / p.kv_heads))};
  }
  __syncthreads();
  BackwardBlock<T, C>(params, facts, tile, kv_head, shared).run();
}

template <class T, int kDim>
void backward(const AttentionBackward& call, const BackwardScratch& scratch, const Tile* key_tiles, int64_t places,
              cudaStream_t stream) {
  using C = BackwardConfig<kDim>;
  static_assert(C::kKeys == backward_rows(kDim) && C::kQueries == turn_rows(kDim));
  launch("attention backward", backward_kernel<T, C>, places * call.problem.kv_heads, C::kThreads,
         C::kTileBytes + C::kStatisticsBytes + sizeof(BackwardFacts), stream,
         {.call = call, .scratch = scratch, .tiles = key_tiles});
}

}  // namespace packseq::sm80
