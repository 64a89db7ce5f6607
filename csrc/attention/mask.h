// Which keys a query sees, on the CPU and on the GPU: the one place that knows the mask options.
#pragma once
#include <cstdint>

#include "attention/attention.h"
#include "core/packed.h"

namespace packseq {

// The mask of one sequence, in its own coordinates: queries 0 .. len_q, keys 0 .. len_k. Every limit is an offset
// from the query's number, so nothing here depends on where the sequence lies. A sequence has less than 2^31 rows.
struct Mask {
  int32_t len_q, len_k;
  int32_t shift;       // query i stands level with key i + shift
  int32_t left;        // keys from i + shift - left on are in the window
  int32_t right;       // keys up to i + shift + right are in the window
  int32_t hard_right;  // keys beyond i + shift + hard_right are hidden whatever else holds (causal: 0)
  int32_t sink;        // keys before this one are visible outside the window too

  static constexpr int32_t kFar = 1 << 30;

  PACKSEQ_HOST_DEVICE Mask(const AttentionProblem& p, int64_t sequence, int64_t len_q_, int64_t len_k_)
      : len_q(int32_t(len_q_)), len_k(int32_t(len_k_)) {
    const int32_t* const positions = p.positions ? p.positions + 2 * sequence : nullptr;
    shift = positions ? positions[0] - positions[1] : len_k - len_q;
    const auto limit = [](int64_t w) { return w < 0 || w > kFar ? kFar : int32_t(w); };
    left = limit(p.window_left);
    right = limit(p.window_right);
    hard_right = p.causal ? 0 : kFar;
    right = right < hard_right ? right : hard_right;
    const int64_t sinks = p.sink_tokens - (positions ? positions[1] : 0);
    sink = sinks < 0 ? 0 : limit(sinks);
  }

  // First key, and one past the last key, that the query's window holds (before clipping to 0 .. len_k).
  PACKSEQ_HOST_DEVICE int64_t window_begin(int32_t query) const { return int64_t(query) + shift - left; }
  PACKSEQ_HOST_DEVICE int64_t window_end(int32_t query) const { return int64_t(query) + shift + right + 1; }
  PACKSEQ_HOST_DEVICE int64_t hard_end(int32_t query) const { return int64_t(query) + shift + hard_right + 1; }

  PACKSEQ_HOST_DEVICE bool visible(int32_t query, int32_t key) const {
    const bool in_window = key >= window_begin(query) && key < window_end(query);
    return key < len_k && (in_window || (key < sink && key < hard_end(query)));
  }
};

// The keys that every query of [q0, q1) sees: the window's, and those before `sinks`.
struct VisibleKeys {
  int32_t begin, end, sinks;

  PACKSEQ_HOST_DEVICE VisibleKeys(const Mask& m, int32_t q0, int32_t q1) {
    const auto clamp = [&](int64_t x) { return int32_t(x < 0 ? 0 : x > m.len_k ? m.len_k : x); };
    const int32_t hard = clamp(m.hard_end(q0)), sink = clamp(m.sink);
    begin = clamp(m.window_begin(q1 - 1));
    end = clamp(m.window_end(q0));
    sinks = hard < sink ? hard : sink;
  }

  PACKSEQ_HOST_DEVICE bool hold(int32_t key) const { return (key >= begin && key < end) || key < sinks; }
  PACKSEQ_HOST_DEVICE bool hold(int32_t k0, int32_t k1) const { return (k0 >= begin && k1 <= end) || k1 <= sinks; }
};

// The blocks of `size` keys that some query of [q0, q1) may see: the sinks' blocks, then the window's.
struct KeyBlocks {
  int32_t sinks;  // blocks 0 .. sinks
  int32_t first;  // then blocks first .. first + count - sinks
  int32_t count;  // of both together

  PACKSEQ_HOST_DEVICE KeyBlocks(const Mask& m, int32_t q0, int32_t q1, int32_t size) {
    const auto clamp = [&](int64_t x) { return int32_t(x < 0 ? 0 : x > m.len_k ? m.len_k : x); };
    const auto ceil = [&](int32_t x) { return (x + size - 1) / size; };
    const int32_t hard = clamp(m.hard_end(q1 - 1));
    sinks = ceil(m.sink < hard ? m.sink : hard);
    first = clamp(m.window_begin(q0)) / size;
    if (first < sinks) first = sinks;
    const int32_t end = ceil(clamp(m.window_end(q1 - 1)));
    count = sinks + (end > first ? end - first : 0);
  }

  PACKSEQ_HOST_DEVICE int32_t operator[](int32_t i) const { return i < sinks ? i : first + i - sinks; }
};

// The blocks of `size` queries that may see some key of [k0, k1): one run of them.
struct QueryBlocks {
  int32_t begin, end;

  PACKSEQ_HOST_DEVICE QueryBlocks(const Mask& m, int32_t k0, int32_t k1, int32_t size) {
    const auto clamp = [&](int64_t x) { return int32_t(x < 0 ? 0 : x > m.len_q ? m.len_q : x); };
    const bool sink = k0 < m.sink;  // seen from everywhere but the hard limit
    const int64_t from = int64_t(k0) - m.shift - (sink ? m.hard_right : m.right);
    const int64_t to = sink ? m.len_q : int64_t(k1) - m.shift + m.left;
    begin = clamp(from) / size;
    end = (clamp(to) + size - 1) / size;
  }
};

}  // namespace packseq
