// What the forward and the backward CPU kernels share: rows of queries as vector lanes, the mask and the scores.
//
// Scores are kept transposed, one row a key and one lane a query: then the softmax runs down the rows, without
// reductions across lanes, and keys and values are used as they lie, one element broadcast at a time.
#pragma once
#include "attention/kernels_cpu.h"
#include "attention/mask.h"
#include "core/cpu/convert.h"
#include "core/cpu/gemm.h"
#include "core/cpu/math.h"
#include "core/cpu/prefetch.h"
#include "core/cpu/scratch.h"
#include "core/cpu/transpose.h"

namespace packseq::PACKSEQ_ISA {

constexpr int32_t kKeyBlock = 128;

struct Range {
  int32_t begin, end;
  PACKSEQ_INLINE int32_t size() const { return end > begin ? end - begin : 0; }
};

// The keys of [k0, k1) that queries of [q0, q1) may see: one run that holds them all.
PACKSEQ_INLINE Range visible_keys(const Mask& mask, int32_t q0, int32_t q1, int32_t k0, int32_t k1) {
  const auto clamp = [&](int64_t x) __attribute__((always_inline)) { return int32_t(x < k0 ? k0 : x > k1 ? k1 : x); };
  const int32_t begin = clamp(mask.window_begin(q0)), end = clamp(mask.window_end(q1 - 1));
  const int64_t hard_end = mask.hard_end(q1 - 1);
  const int32_t sinks = clamp(hard_end < mask.sink ? hard_end : mask.sink);
  if (sinks == k0) return {begin, end};
  return {k0, end > sinks && begin < end ? end : sinks};
}

// Whether every query of [q0, q1) sees every one of the keys, which lie within the sequence.
PACKSEQ_INLINE bool all_visible(const Mask& mask, int32_t q0, int32_t q1, Range keys) {
  if (keys.begin >= mask.window_begin(q1 - 1) && keys.end <= mask.window_end(q0)) return true;
  return keys.end <= mask.sink && keys.end <= mask.hard_end(q0);
}

// The rows of a query tile: row r is query q0 + r % queries of head `first_head + r / queries`.
template <class Real>
struct TileRows {
  int32_t rows, queries, q0;
  int64_t first_head;

  TileRows(const AttentionProblem& p, const QueryTile& t)
      : queries(t.q1 - t.q0), q0(t.q0), first_head(int64_t(t.kv_head) * (p.heads / p.kv_heads)) {
    rows = queries * (p.heads / p.kv_heads);
  }

  PACKSEQ_INLINE int32_t query(int32_t row) const { return q0 + row % queries; }
  PACKSEQ_INLINE int64_t head(int32_t row) const { return first_head + row / queries; }

  // The queries of rows [r0, r1): all of the tile's where the rows belong to several heads.
  PACKSEQ_INLINE Range queries_of(int32_t r0, int32_t r1) const {
    if (r0 / queries != (r1 - 1) / queries) return {q0, q0 + queries};
    return {query(r0), query(r1 - 1) + 1};
  }
};

// What the mask and the bias need to know of each lane.
template <class Real>
struct LaneLimits {
  Int<Real>*begin, *end, *sink;  // visible keys: begin .. end, and those before sink
  Real *place, *slope;           // ALiBi: the query's place among the keys, the head's slope

  LaneLimits(Scratch& s, int64_t lanes)
      : begin(s.take<Int<Real>>(lanes)),
        end(s.take<Int<Real>>(lanes)),
        sink(s.take<Int<Real>>(lanes)),
        place(s.take<Real>(lanes)),
        slope(s.take<Real>(lanes)) {}

  void set(const AttentionProblem& p, const Mask& mask, const TileRows<Real>& tile, int64_t lanes) const {
    const auto clamp = [&](int64_t x) __attribute__((always_inline)) {
      return Int<Real>(x < 0 ? 0 : x > mask.len_k ? mask.len_k : x);
    };
    const Real* slopes = static_cast<const Real*>(p.alibi_slopes);
    for (int32_t r = 0; r < lanes; ++r) {
      const bool real = r < tile.rows;
      const int32_t query = real ? tile.query(r) : 0;
      begin[r] = real ? clamp(mask.window_begin(query)) : 0;
      end[r] = real ? clamp(mask.window_end(query)) : 0;
      const int64_t hard_end = mask.hard_end(query);
      sink[r] = real ? clamp(hard_end < mask.sink ? hard_end : mask.sink) : 0;
      place[r] = Real(int64_t(query) + mask.shift);
      slope[r] = real && slopes ? slopes[tile.head(r)] : Real(0);
    }
  }

  PACKSEQ_INLINE Vec<Int<Real>> visible(int64_t lane, int32_t key) const {
    const Vec<Int<Real>> k = splat(Int<Real>(key));
    return ((k >= load(begin + lane)) & (k < load(end + lane))) | (k < load(sink + lane));
  }
};

// From q . k to the score: scale, softcap, ALiBi.
template <class Real>
struct ScoreTransform {
  Real scale, cap, inverse_cap;
  bool capped, biased;

  explicit ScoreTransform(const AttentionProblem& p)
      : scale(Real(p.scale)),
        cap(Real(p.softcap)),
        inverse_cap(p.softcap > 0 ? Real(1 / p.softcap) : Real(0)),
        capped(p.softcap > 0),
        biased(p.alibi_slopes != nullptr) {}

  // slope: what the score's gradient is multiplied by on its way to scale * q . k
  PACKSEQ_INLINE Vec<Real> operator()(Vec<Real> product, const LaneLimits<Real>& lanes, int64_t lane, int32_t key,
                                      Vec<Real>& slope) const {
    Vec<Real> score = product * scale;
    slope = splat(Real(1));
    if (capped) {
      const Vec<Real> t = tanh<Real>(score * inverse_cap);
      score = t * cap;
      slope = Real(1) - t * t;
    }
    if (biased) score = score - load(lanes.slope + lane) * abs<Real>(load(lanes.place + lane) - Real(key));
    return score;
  }
};

// Rows of a packed tensor into rows of Real that are `stride` apart.
template <class T, class Real = typename RealOf<T>::type>
inline void load_rows(const Packed& x, int64_t row, int64_t count, int64_t head, int64_t dim, Real* to, int64_t padded,
                      int64_t stride) {
  const T* from = static_cast<const T*>(x.data) + row * x.token + head * x.head;
  for (int64_t i = 0; i < count; ++i) load_row(from + i * x.token, dim, to + i * stride, padded);
}

// Asks for rows of one head of a packed tensor, or of a contiguous [.., heads, dim] one.
template <class T>
inline void prefetch_rows(Prefetch& prefetch, const Packed& x, int64_t row, int64_t count, int64_t head, int64_t dim) {
  const T* from = static_cast<const T*>(x.data) + row * x.token + head * x.head;
  prefetch.add(from, x.token * int64_t(sizeof(T)), count, dim * int64_t(sizeof(T)));
}

PACKSEQ_INLINE Packed contiguous(const void* data, int64_t heads, int64_t dim) { return {data, heads * dim, dim}; }

}  // namespace packseq::PACKSEQ_ISA
