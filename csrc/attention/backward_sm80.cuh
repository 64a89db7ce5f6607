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
// by an integer a query block; they walk down from the last queries, so under a causal mask, where early keys have most
// to do, nobody waits but in the first few steps. Whoever is first stores instead of adding: nothing is cleared. Where
// keys come in parts, all add, to what the caller has.
#pragma once
#include <climits>

#include "attention/attention_sm80.h"
#include "attention/mask.h"
#include "attention/scores.cuh"
#include "core/device/load_tile.cuh"
#include "core/device/mma.cuh"
#include "core/device/turns.cuh"
#include "core/dispatch.h"
#include "core/launch.h"

namespace packseq::sm80 {

// One step of a block's walk: a query head of the group, a block of queries, and this block's turn to add to its dQ.
struct alignas(16) Visit {
  int group, block, turn;
  bool last;   // no other block adds to this dQ after this one
  bool clear;  // every query sees every key
};

// What a block looks up now and then, kept out of its registers: they are full.
struct BackwardFacts {
  Mask mask;
  Scores scores;    // of the first head: only the slope differs between heads
  Visit visits[8];  // the last ones and the next, by number modulo 8
  int table[256];   // see BackwardBlock::advance(); as many as the block has threads
};

// Tile shapes. Accumulators of dK and dV fill the registers: up to 64 columns a warp owns 32 keys; beyond, two warps
// share their keys, each computing the scores of half of the queries and owning half of the columns of dK and dV, and
// what the one computed the other reads from shared memory. kSmall fits the 99 KiB of sm_86 and sm_89.
//
// kWide: dK and dV leave in float32 (AttentionBackward::delta).
template <int kDim_, bool kSmall_, bool kWide_>
struct BackwardConfig {
  static constexpr int kDim = kDim_;
  static constexpr bool kSmall = kSmall_, kWide = kWide_;
  static constexpr int kSplit = kDim <= 64 ? 1 : 2;  // warps that share their keys
  static constexpr int kWarps = kDim <= 64 || (kSmall && kDim == 256) ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kKeyTiles = kDim <= 64 || (!kSmall && kDim <= 128) ? 2 : 1;  // of 16 keys, for each warp
  static constexpr int kKeys = 16 * kKeyTiles * kWarps / kSplit;
  static constexpr int kQueries = kDim <= 128 ? 64 : 32;               // of a step
  static constexpr int kChunk = kDim == 192 || kDim == 256 ? 16 : 32;  // whose scores a warp has in registers at once
  static constexpr int kStages = kDim <= 64 ? 2 : kSmall ? 1 : 3;      // buffers of queries and dO
  static constexpr int kBlocksPerSm = kDim <= 64 ? 2 : 1;
  // A warp's part of dQ.
  static constexpr int kDqRows = kDim % 64 == 0 && kDim != 192 ? 32 : 16;
  static constexpr int kDqCols = kQueries / kDqRows * kDim / kWarps;

  using KeyTile = SharedTile<kKeys, kDim>;
  using QueryTile = SharedTile<kQueries, kDim>;
  using ScoreTile = SharedTile<kKeys, kQueries>;
  // What a warp reads of its partner's scores waits for the next step's barrier where a third buffer keeps the queries.
  static constexpr bool kDeferred = kStages == 3;
  static constexpr int kScoreBuffers = kSplit == 1 ? 2 : kDeferred ? 4 : 3;  // two of dS, then those of P
  static constexpr int kTileBytes =
      2 * KeyTile::kBytes + 2 * kStages * QueryTile::kBytes + kScoreBuffers * ScoreTile::kBytes;
  static constexpr int kStatisticsBytes = 2 * 2 * kQueries * int(sizeof(float));
  static constexpr int kSharedBytes = kTileBytes + kStatisticsBytes + int(sizeof(BackwardFacts));

  static_assert(kChunk * (kSplit == 1 ? 2 : kSplit) == kQueries && kDqCols % 16 == 0);
};

struct BackwardParams {
  AttentionBackward call;
  BackwardScratch scratch;
  const Tile* tiles;  // of keys
  int group;          // query heads to a key/value head
};

template <class T, class C>
class BackwardBlock {
 public:
  __device__ BackwardBlock(const BackwardParams& params, BackwardFacts& facts, Tile tile, int kv_head,
                           unsigned char* shared)
      : params_(params),
        p_(params.call.problem),
        facts_(facts),
        sequence_(tile.sequence),
        kv_head_(kv_head),
        key_block_(tile.block),
        q_begin_(int32_t(span_of(p_.cu_seqlens_q, p_.sequences, p_.total_q, tile.sequence).begin)),
        k_begin_(int32_t(span_of(p_.cu_seqlens_k, p_.sequences, p_.total_k, tile.sequence).begin)),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        half_(C::kSplit == 1 ? 0 : warp_ / kKeyWarps),
        warp_key_(warp_ % kKeyWarps * 16 * C::kKeyTiles),
        shared_k_(shared_address(shared)),
        statistics_(reinterpret_cast<float*>(shared + C::kTileBytes)) {}

  __device__ void run() {
    const QueryBlocks blocks(facts_.mask, key_block_ * C::kKeys, min((key_block_ + 1) * C::kKeys, facts_.mask.len_k),
                             C::kQueries);
    first_block_ = blocks.begin;
    blocks_end_ = blocks.end;
    table_begin_ = INT_MAX - C::kThreads;  // empty: holds no block
    block_ = blocks_end_;
    bool more = advance(0);
    __syncthreads();
    int i = 0;
    for (; more; ++i) {
      if (i == 0) {
        load_keys();
        fetch(0);
      } else if (C::kStages == 1) {
        __syncthreads();  // the buffer is no longer read
        fetch(i);
      }
      more = advance(i + 1);
      copy_async_wait<0>();
      __syncthreads();  // this step's tiles and the last step's dS are there; the other buffers are free
      pass(i);
      if (C::kStages > 1 && more) fetch(i + 1);
      step(i);
    }
    __syncthreads();
    if (i > 0) {
      finish_step(i - 1);
      __syncthreads();
      if (warp_ == 0) {
        settle_additions();
        if (i > 1) pass_on(i - 2);
        pass_on(i - 1);
      }
    }
    finish();
  }

 private:
  static constexpr int kCols = C::kDim / C::kSplit;  // of dK and dV that a warp owns
  static constexpr int kColTiles = kCols / 8, kScoreTiles = C::kChunk / 8;
  static constexpr int kKeyWarps = C::kWarps / C::kSplit;
  static constexpr int kUnlisted = -1, kLast = 1 << 30, kClear = 1 << 29;  // of facts_.table
  using Accumulator = float[C::kKeyTiles][kColTiles][4];
  using Chunk = float[C::kKeyTiles][kScoreTiles][4];

  __device__ int head_of(Visit v) const { return kv_head_ * params_.group + v.group; }
  __device__ uint32_t shared_v() const { return shared_k_ + C::KeyTile::kBytes; }
  __device__ uint32_t shared_q(int i) const {
    return shared_v() + C::KeyTile::kBytes + i % C::kStages * C::QueryTile::kBytes;
  }
  __device__ uint32_t shared_dout(int i) const { return shared_q(i) + C::kStages * C::QueryTile::kBytes; }
  __device__ uint32_t shared_ds(int i) const {
    return shared_v() + C::KeyTile::kBytes + 2 * C::kStages * C::QueryTile::kBytes + i % 2 * C::ScoreTile::kBytes;
  }
  __device__ uint32_t shared_p(int i) const {
    return shared_ds(0) + (2 + i % (C::kScoreBuffers == 4 ? 2 : 1)) * C::ScoreTile::kBytes;
  }

  __device__ Visit visit(int i) const { return facts_.visits[i % 8]; }

  // Writes down visit i, the next block of queries, downwards and then on to the next head, that lists this block of
  // keys; returns false where there is none. The caller's next barrier makes it known to all threads.
  __device__ bool advance(int i) {
    for (;;) {
      if (--block_ < first_block_) {
        if (++group_ == params_.group) return false;
        block_ = blocks_end_;
        continue;
      }
      if (block_ < table_begin_ || block_ >= table_begin_ + C::kThreads) fill_table(block_ + 1 - C::kThreads);
      const int entry = facts_.table[block_ - table_begin_];
      if (entry == kUnlisted) continue;
      if (threadIdx.x == 0) {
        facts_.visits[i % 8] = {group_, block_, entry & ~(kLast | kClear), (entry & kLast) != 0, (entry & kClear) != 0};
      }
      return true;
    }
  }

  // What advance() needs to know of kThreads blocks of queries, worked out by a thread each.
  __device__ void fill_table(int begin) {
    __syncthreads();  // the old one is no longer read
    table_begin_ = begin;
    const Mask& mask = facts_.mask;
    const int q0 = (begin + int(threadIdx.x)) * C::kQueries, q1 = min(q0 + C::kQueries, mask.len_q);
    int entry = kUnlisted;
    if (q0 >= 0 && q0 < q1) {
      const KeyBlocks keys(mask, q0, q1, C::kKeys);
      const int turn = key_block_ < keys.sinks ? key_block_ : key_block_ - keys.first + keys.sinks;
      if (key_block_ < keys.sinks || (key_block_ >= keys.first && turn < keys.count)) {
        const bool clear = VisibleKeys(mask, q0, q1).hold(key_block_ * C::kKeys, (key_block_ + 1) * C::kKeys);
        entry = turn | (turn + 1 >= keys.count ? kLast : 0) | (clear ? kClear : 0);
      }
    }
    facts_.table[threadIdx.x] = entry;
    __syncthreads();
  }

  __device__ int* counter(Visit v) const {
    const int64_t slot = q_begin_ / C::kQueries + sequence_ + v.block;
    return params_.scratch.turns + head_of(v) * turn_slots(p_, C::kDim) + slot;
  }
  // To be called behind the barrier of step i: all warps have made their additions for visit i - 2. It is the wait for
  // them that costs, so the warps relieve each other at it.
  __device__ void pass(int i) const {
    if (i < 2 || i % C::kWarps != warp_) return;
    settle_additions();
    pass_on(i - 2);
  }
  __device__ void pass_on(int i) const {
    const Visit v = visit(i);
    if (!v.last) pass_turn(counter(v), v.turn + 1);
  }

  __device__ void load_keys() const {
    using Loader = TileLoader<T, typename C::KeyTile, C::kThreads>;
    const int first = key_block_ * C::kKeys;
    Loader(p_.k, kv_head_, p_.dim).load(shared_k_, k_begin_, first, facts_.mask.len_k);
    Loader(p_.v, kv_head_, p_.dim_v).load(shared_v(), k_begin_, first, facts_.mask.len_k);
  }

  // Starts copying a step's queries, dO, lse and delta. Rows outside the sequence become zeros, which add nothing.
  __device__ void fetch(int i) const {
    const Visit v = visit(i);
    using Loader = TileLoader<T, typename C::QueryTile, C::kThreads>;
    const int first = v.block * C::kQueries;
    Loader(p_.q, head_of(v), p_.dim).load(shared_q(i), q_begin_, first, facts_.mask.len_q);
    Loader(params_.call.dout, head_of(v), p_.dim_v).load(shared_dout(i), q_begin_, first, facts_.mask.len_q);
    if (threadIdx.x < 2 * C::kQueries) {
      const int query = first + threadIdx.x % C::kQueries;
      const float* from = threadIdx.x < C::kQueries ? params_.scratch.lse : params_.scratch.delta;
      copy_async_4(shared_address(statistics(i) + threadIdx.x), from + head_of(v) * p_.total_q + q_begin_ + query,
                   query < facts_.mask.len_q);
    }
    copy_async_commit();
  }
  __device__ float* statistics(int i) const { return statistics_ + i % 2 * 2 * C::kQueries; }

  __device__ void step(int i) {
    if (C::kSplit == 1) {
      if (i > 0) accumulate_dq(i - 1);
#pragma unroll
      for (int chunk = 0; chunk < C::kQueries; chunk += C::kChunk) {
        Chunk s = {}, dp = {};
        score(s, dp, i, chunk);
        store(shared_ds(i), dp, chunk);
        accumulate(dv_, s, shared_dout(i), chunk);
        accumulate(dk_, dp, shared_q(i), chunk);
      }
    } else {
      // The two warps that share their keys share a scheduler too: they do what is left of the step before at different
      // times, so that one has products to compute while the other exponentiates or waits for its turn.
      const int mine = half_ * C::kChunk;
      if (i > 0 && half_ == 0) finish_step(i - 1);
      Chunk s = {}, dp = {};
      score(s, dp, i, mine);
      store(shared_p(i), s, mine);
      store(shared_ds(i), dp, mine);
      accumulate(dv_, s, shared_dout(i), mine);
      accumulate(dk_, dp, shared_q(i), mine);
      if (i > 0 && half_ == 1) finish_step(i - 1);
      if (!C::kDeferred) {
        asm volatile("bar.sync %0, 64;" ::"r"(1 + warp_ % kKeyWarps) : "memory");
        accumulate_partner(i);
      }
    }
  }

  // What step i left for after the next barrier.
  __device__ void finish_step(int i) {
    accumulate_dq(i);
    if (C::kDeferred) accumulate_partner(i);
  }

  // dV and dK of the queries whose scores the other warp of these keys has left in shared memory.
  __device__ void accumulate_partner(int i) {
    const int other = C::kChunk - half_ * C::kChunk;
    accumulate(dv_, shared_p(i), shared_dout(i), other);
    accumulate(dk_, shared_ds(i), shared_q(i), other);
  }

  // P and dS of this warp's keys and a chunk of queries.
  __device__ void score(Chunk& p, Chunk& ds, int i, int chunk) const {
    multiply_transposed(p, shared_k_, shared_q(i), chunk);
    multiply_transposed(ds, shared_v(), shared_dout(i), chunk);
    differentiate(p, ds, i, chunk);
  }

  // s += A B^T for this warp's rows of A and a chunk of the rows of B.
  __device__ void multiply_transposed(Chunk& s, uint32_t shared_a, uint32_t shared_b, int chunk) const {
    const int lane = afresh(lane_);
    const uint32_t a_part = rows_first(lane), b_part = columns_first(lane);
    multiply<T, C::kDim / 16>(
        s,
        [&](auto& a, int k) {
#pragma unroll
          for (int m = 0; m < C::kKeyTiles; ++m) {
            load_matrix_x4(a[m], fragment<typename C::KeyTile>(shared_a, a_part, warp_key_ + 16 * m, k));
          }
        },
        [&](auto& b, int k, int n) {
          load_matrix_x4(b, fragment<typename C::QueryTile>(shared_b, b_part, chunk + 16 * n, k));
        });
  }

  // s becomes P, dp becomes dS.
  __device__ void differentiate(Chunk& s, Chunk& dp, int i, int chunk) const {
    const Visit v = visit(i);
    const int first_query = v.block * C::kQueries + chunk, first_key = key_block_ * C::kKeys;
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
        const float slope = scores.derivative(x), d = statistics(i)[C::kQueries + chunk + query_in(n, e)];
        y = fmaf(slope, y - d, d);
        x = scores.transform(x, abs(query + facts_.mask.shift - key));
        if (query >= facts_.mask.len_q) x = -INFINITY;  // far from every key, by a negative slope it would overflow
      });
    }
    if (!v.clear) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const VisibleKeys keys(facts_.mask, query_of(n, c), query_of(n, c) + 1);
#pragma unroll
          for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
            for (int e = c; e < 4; e += 2) {
              if (!keys.hold(key_of(m, e))) s[m][n][e] = -INFINITY;
            }
          }
        }
      }
    }
    const float* lse = statistics(i) + chunk;
    const float* delta = lse + C::kQueries;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float2 l = *reinterpret_cast<const float2*>(lse + query_in(n, 0));
      const float2 d = *reinterpret_cast<const float2*>(delta + query_in(n, 0));
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exp2_approx(s[m][n][e] - (e % 2 ? l.y : l.x));
          s[m][n][e] = p;
          dp[m][n][e] = p * (dp[m][n][e] - (e % 2 ? d.y : d.x));
        }
      }
    }
  }
  __device__ int query_in(int n, int e) const { return 8 * n + lane_ % 4 * 2 + e % 2; }

  // sum += x B for this warp's keys and columns; rows of B are the chunk's queries.
  __device__ void accumulate(Accumulator& sum, const Chunk& x, uint32_t shared_b, int chunk) const {
    accumulate(sum, shared_b, chunk, [&](auto& a, int k) {
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) pack_fragment<T>(a[m], x[m], k);
    });
  }

  // The same where the other warp of these keys has left x in shared memory.
  __device__ void accumulate(Accumulator& sum, uint32_t shared_x, uint32_t shared_b, int chunk) const {
    const uint32_t a_part = rows_first(afresh(lane_));
    accumulate(sum, shared_b, chunk, [&](auto& a, int k) {
#pragma unroll
      for (int m = 0; m < C::kKeyTiles; ++m) {
        load_matrix_x4(a[m], fragment<typename C::ScoreTile>(shared_x, a_part, warp_key_ + 16 * m, chunk / 16 + k));
      }
    });
  }

  template <class LoadA>
  __device__ void accumulate(Accumulator& sum, uint32_t shared_b, int chunk, const LoadA& load_a) const {
    const uint32_t b_part = rows_first(afresh(lane_));
    multiply<T, C::kChunk / 16>(sum, load_a, [&](auto& b, int k, int n) {
      const int col = half_ * (kCols / 16) + n;
      load_matrix_x4_transposed(b, fragment<typename C::QueryTile>(shared_b, b_part, chunk + 16 * k, col));
    });
  }

  // P^T or dS^T into shared memory as it lies in registers: a row a key.
  __device__ void store(uint32_t tile, const Chunk& x, int chunk) const {
#pragma unroll
    for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_key_ + 16 * m + 8 * r + lane_ / 4;
          const uint32_t address = tile + C::ScoreTile::offset(row, chunk / 8 + n) + lane_ % 4 * 4;
          const uint32_t halves = pack_halves<T>(x[m][n][2 * r], x[m][n][2 * r + 1]);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(halves) : "memory");
        }
      }
    }
  }

  // dQ += dS K for the queries of step i, in turn with the other blocks of keys.
  __device__ void accumulate_dq(int i) const {
    const Visit v = visit(i);
    constexpr int kRowTiles = C::kDqRows / 16, kTiles = C::kDqCols / 8, kAcross = C::kDim / C::kDqCols;
    const int row0 = warp_ / kAcross * C::kDqRows, col0 = warp_ % kAcross * C::kDqCols;
    const int* const turns = counter(v);
    int turn = v.turn == 0 ? 0 : look_at(turns);  // looked at early: the answer is there when the sums are
    float dq[kRowTiles][kTiles][4] = {};
    const int lane = afresh(lane_);
    const uint32_t a_part = columns_first(lane), b_part = rows_first(lane);
    multiply<T, C::kKeys / 16>(
        dq,
        [&](auto& a, int k) {
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            load_matrix_x4_transposed(a[m],
                                      fragment<typename C::ScoreTile>(shared_ds(i), a_part, 16 * k, row0 / 16 + m));
          }
        },
        [&](auto& b, int k, int n) {
          load_matrix_x4_transposed(b, fragment<typename C::KeyTile>(shared_k_, b_part, 16 * k, col0 / 16 + n));
        });
    if constexpr (C::kWide) {
      while (turn < v.turn) turn = look_at(turns);
      add_dq(dq, v, row0, col0);
    } else if (v.turn == 0) {
      write_dq(dq, v, row0, col0, [](float4* at, float4 x) { *at = x; });
    } else {
      while (turn < v.turn) turn = look_at(turns);
      write_dq(dq, v, row0, col0, [](float4* at, float4 x) { add_global(at, x); });
    }
  }

  // Columns 16 c + {2t, 2t + 1, 2t + 8, 2t + 9} of a row stand together, at 16 c + 4 t: one 16-byte access for a
  // thread.
  template <int kRowTiles, int kTiles, class Write>
  __device__ void write_dq(const float (&dq)[kRowTiles][kTiles][4], Visit v, int row0, int col0, Write write) const {
    float* rows = params_.scratch.dq + (head_of(v) * p_.total_q + q_begin_) * C::kDim + col0 + lane_ % 4 * 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = v.block * C::kQueries + row0 + 16 * m + 8 * r + lane_ / 4;
        float4* row = reinterpret_cast<float4*>(rows + int64_t(query) * C::kDim);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          const float4 x = {dq[m][n][2 * r], dq[m][n][2 * r + 1], dq[m][n + 1][2 * r], dq[m][n + 1][2 * r + 1]};
          if (query < facts_.mask.len_q) write(row + 2 * n, x);
        }
      }
    }
  }

  // To what the call's dQ holds, in its own order: neighbours exchange a half of what they have of two tiles, so that
  // each has four columns of one.
  template <int kRowTiles, int kTiles>
  __device__ void add_dq(const float (&dq)[kRowTiles][kTiles][4], Visit v, int row0, int col0) const {
    const float scale = float(p_.scale);
    const bool odd = lane_ % 2;
    const int first = v.block * C::kQueries + row0 + lane_ / 4, col = col0 + lane_ % 2 * 8 + lane_ % 4 / 2 * 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = first + 16 * m + 8 * r;
        float* const row =
            static_cast<float*>(params_.call.dq) + ((int64_t(q_begin_) + query) * p_.heads + head_of(v)) * p_.dim + col;
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          const float2 low = {dq[m][n][2 * r] * scale, dq[m][n][2 * r + 1] * scale};
          const float2 high = {dq[m][n + 1][2 * r] * scale, dq[m][n + 1][2 * r + 1] * scale};
          const float2 gives = odd ? low : high, keeps = odd ? high : low;
          const float2 gets = {__shfl_xor_sync(~0u, gives.x, 1), __shfl_xor_sync(~0u, gives.y, 1)};
          const float4 x = odd ? float4{gets.x, gets.y, keeps.x, keeps.y} : float4{keeps.x, keeps.y, gets.x, gets.y};
          if (query < facts_.mask.len_q && col + 8 * n < p_.dim) add_global(reinterpret_cast<float4*>(row + 8 * n), x);
        }
      }
    }
  }

  // dK and dV through the keys' and values' shared memory, which nobody reads any more, to whole rows.
  __device__ void finish() const {
    if constexpr (C::kWide) {
      store_wide(dk_, float(p_.scale), params_.call.dk, p_.dim);
      store_wide(dv_, 1.0f, params_.call.dv, p_.dim_v);
    } else {
      stage(dk_, shared_k_, float(p_.scale));
      stage(dv_, shared_v(), 1.0f);
      __syncthreads();
      store(params_.call.dk, shared_k_, p_.dim);
      store(params_.call.dv, shared_v(), p_.dim_v);
    }
  }

  // In float32, to what other queries gave where the call says so: all of a row is asked for before it is written.
  __device__ void store_wide(const Accumulator& sum, float by, void* gradient, int dim) const {
    const int lane = afresh(lane_), first_col = half_ * kCols + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < C::kKeyTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = key_block_ * C::kKeys + warp_key_ + 16 * m + 8 * r + lane / 4;
        if (key >= facts_.mask.len_k) continue;
        float* const row =
            static_cast<float*>(gradient) + ((int64_t(k_begin_) + key) * p_.kv_heads + kv_head_) * dim + first_col;
        const auto at = [&](int n) { return reinterpret_cast<float2*>(row + 8 * n); };
        float2 x[kColTiles] = {};
        if (params_.call.add_to_keys) {
#pragma unroll
          for (int n = 0; n < kColTiles; ++n) {
            if (first_col + 8 * n < dim) x[n] = *at(n);
          }
        }
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
          const float2 y = {x[n].x + sum[m][n][2 * r] * by, x[n].y + sum[m][n][2 * r + 1] * by};
          if (first_col + 8 * n < dim) *at(n) = y;
        }
      }
    }
  }

  __device__ void stage(const Accumulator& sum, uint32_t tile, float by) const {
    const int first_col = half_ * kColTiles;
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
      T* to = static_cast<T*>(out) + ((int64_t(k_begin_) + key) * p_.kv_heads + kv_head_) * dim + chunk * 8;
      *reinterpret_cast<uint4*>(to) = x;
    }
  }

  const BackwardParams& params_;
  const AttentionProblem& p_;
  BackwardFacts& facts_;
  const int sequence_, kv_head_, key_block_;
  const int32_t q_begin_, k_begin_;
  const int lane_, warp_, half_, warp_key_;
  const uint32_t shared_k_;
  float* const statistics_;  // lse, then delta, of a step's queries; two buffers
  int first_block_, blocks_end_, table_begin_;
  int group_ = 0, block_;  // of the latest visit

  Accumulator dk_ = {}, dv_ = {};
};

// Zeros in the rows after the last sequence.
template <class T, class C>
__device__ void zero_slack_keys(const AttentionBackward& call, int block, int kv_head) {
  const AttentionProblem& p = call.problem;
  if (C::kWide) return;
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
    facts.mask = Mask(p, tile.sequence, span_of(p.cu_seqlens_q, p.sequences, p.total_q, tile.sequence).size(),
                      span_of(p.cu_seqlens_k, p.sequences, p.total_k, tile.sequence).size());
    facts.scores = Scores(p, kv_head * params.group);
  }
  __syncthreads();
  BackwardBlock<T, C>(params, facts, tile, kv_head, shared).run();
}

template <class T, class C>
void launch_backward(const BackwardParams& params, int64_t places, cudaStream_t stream) {
  launch("attention backward", backward_kernel<T, C>, places * params.call.problem.kv_heads, C::kThreads,
         C::kSharedBytes, stream, params);
}

template <class T, int kDim>
void backward(const AttentionBackward& call, const BackwardScratch& scratch, bool small, const Tile* key_tiles,
              int64_t places, cudaStream_t stream) {
  const BackwardParams params = {
      .call = call, .scratch = scratch, .tiles = key_tiles, .group = call.problem.heads / call.problem.kv_heads};
  dispatch<false, true>("small", small, [&](auto small_c) {
    dispatch<false, true>("wide", call.delta != nullptr, [&](auto wide) {
      using C = BackwardConfig<kDim, small_c && kDim != 64, wide>;
      static_assert(C::kKeys == backward_rows(kDim, small_c) && C::kQueries == turn_rows(kDim));
      static_assert(C::kSharedBytes <= (C::kSmall || kDim == 64 ? 99 * 1024 : kLargeShared));
      launch_backward<T, C>(params, places, stream);
    });
  });
}

}  // namespace packseq::sm80
