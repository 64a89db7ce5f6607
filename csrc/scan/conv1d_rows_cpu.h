// The causal convolution over one vector of channels: a walk along the rows with the last `width` of them in registers.
//
// A range of rows may hold many sequences, or a piece of one: what stands before a piece is read again. A row's sum
// always runs over the taps in the same order, so its bits depend on its own sequence alone.
#pragma once
#include "core/cpu/lanes.h"
#include "core/cpu/math.h"
#include "scan/conv1d_kernels_cpu.h"

namespace packseq::PACKSEQ_ISA {

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

template <class F>
PACKSEQ_INLINE void with_width(int width, const F& f) {
  switch (width) {
    case 2:
      return f(Width<2>{});
    case 3:
      return f(Width<3>{});
    case 4:
      return f(Width<4>{});
    case 5:
      return f(Width<5>{});
    case 6:
      return f(Width<6>{});
    case 7:
      return f(Width<7>{});
    default:
      return f(Width<8>{});
  }
}

// A tile of rows, widened, near the processor: rows of a tensor lie far apart, often by a power of two, and a walk down
// one vector of channels would miss every cache.
template <class T, int kRows>
struct RowTile {
  using Real = typename RealOf<T>::type;

  PACKSEQ_INLINE RowTile(const Rows& x, const Span& rows_, const Span& channels_) : rows(rows_), channels(channels_) {
    const int64_t count = channels.size(), padded = round_up(count, kLanes<Real>);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* const from = static_cast<const T*>(x.data) + r * x.token + channels.begin;
      load_row(from, count, values + (r - rows.begin) * kConvTileChannels, padded);
    }
  }

  PACKSEQ_INLINE Real* at(int64_t row, const Lanes<T>& lanes) {
    return values + (row - rows.begin) * kConvTileChannels + (lanes.first - channels.begin);
  }

  // Some rows to a contiguous [total, columns] tensor.
  PACKSEQ_INLINE void store(const Span& some, T* to, int64_t columns) const {
    for (int64_t r = some.begin; r < some.end; ++r) {
      const Real* const from = values + (r - rows.begin) * kConvTileChannels;
      store_row(from, channels.size(), to + r * columns + channels.begin);
    }
  }

  alignas(64) Real values[kRows * kConvTileChannels];
  Span rows, channels;
};

// Rows of sequence i. Even of malformed boundaries, none lies in the slack.
PACKSEQ_INLINE Span sequence_of(const Conv1dProblem& p, int64_t i) {
  const int64_t end = span_of(p.cu_seqlens, p.sequences, p.total, p.sequences).begin;
  return span_of(p.cu_seqlens, p.sequences, end, i);
}

PACKSEQ_INLINE Timeline timeline_of(const Conv1dProblem& p, int64_t i) { return {sequence_of(p, i), p.reverse}; }

// f(sequence, timeline, t0, t1) for each sequence's part of the rows: its times t0 .. t1.
template <class F>
PACKSEQ_INLINE void for_pieces(const Conv1dProblem& p, const Span& rows, const F& f) {
  int64_t i = 0;  // the last sequence that begins at the first row or before
  for (int64_t low = 1, high = p.sequences; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle] <= rows.begin) {
      i = middle, low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (; i < p.sequences; ++i) {
    const Span span = sequence_of(p, i);
    if (span.begin >= rows.end) break;
    const int64_t begin = most(span.begin, rows.begin), end = least(span.end, rows.end);
    if (begin >= end) continue;
    const Timeline time(span, p.reverse);
    f(i, time, p.reverse ? span.end - end : begin - span.begin, p.reverse ? span.end - begin : end - span.begin);
  }
}

// The sequence's initial state, [channels, width - 1].
template <class T, int kWidth>
PACKSEQ_INLINE const T* state_of(const void* states, int64_t i, int64_t channels) {
  return states ? static_cast<const T*>(states) + i * channels * (kWidth - 1) : nullptr;
}

// The taps of a vector of channels.
template <int kWidth, class T>
struct Taps {
  using Real = typename RealOf<T>::type;
  static constexpr int kState = kWidth - 1;

  PACKSEQ_INLINE Taps(const Conv1dProblem& p, const Lanes<T>& lanes_) : lanes(lanes_), bias{} {
    PACKSEQ_UNROLL
    for (int k = 0; k < kWidth; ++k) weight[k] = lanes.gather(static_cast<const Real*>(p.weight), kWidth, k);
    if (p.bias) bias = lanes.gather(static_cast<const Real*>(p.bias), 1, 0);
  }

  // What stands at the times before t0; row(t) is the sequence's row.
  template <class Row>
  PACKSEQ_INLINE void start(Vec<Real> (&window)[kWidth], int64_t t0, const T* state, const Row& row) const {
    window[kState] = Vec<Real>{};
    PACKSEQ_UNROLL
    for (int k = 0; k < kState; ++k) {
      const int64_t t = t0 - kState + k;
      window[k] = t >= 0 ? row(t) : state ? lanes.gather(state, kState, t + kState) : Vec<Real>{};
    }
  }

  PACKSEQ_INLINE Vec<Real> apply(const Vec<Real> (&window)[kWidth]) const {
    Vec<Real> pre = bias;
    PACKSEQ_UNROLL
    for (int k = 0; k < kWidth; ++k) pre += weight[k] * window[k];
    return pre;
  }

  PACKSEQ_INLINE static void advance(Vec<Real> (&window)[kWidth]) {
    PACKSEQ_UNROLL
    for (int k = 0; k < kState; ++k) window[k] = window[k + 1];
  }

  // put(t, out) for the times t0 .. t1 of a sequence.
  template <class Row, class Put>
  PACKSEQ_INLINE void run(int64_t t0, int64_t t1, const T* state, bool silu, const Row& row, const Put& put) const {
    Vec<Real> window[kWidth];
    start(window, t0, state, row);
    for (int64_t t = t0; t < t1; ++t, advance(window)) {
      window[kState] = row(t);
      const Vec<Real> pre = apply(window);
      put(t, silu ? pre * sigmoid<Real>(pre) : pre);
    }
  }

  // The gradient of pre.
  PACKSEQ_INLINE static Vec<Real> through_silu(Vec<Real> dout, Vec<Real> pre) {
    const Vec<Real> s = sigmoid<Real>(pre);
    return dout * (s * (Real(1) + pre * (Real(1) - s)));
  }

  Lanes<T> lanes;
  Vec<Real> weight[kWidth], bias;
};

// The tile's rows and `before` and `after` more, as far as there are rows of sequences.
PACKSEQ_INLINE Span rows_around(const Conv1dProblem& p, const Span& rows, int64_t before, int64_t after) {
  const int64_t end = sequence_of(p, p.sequences).begin;
  return {least(most(rows.begin - before, 0), end), least(rows.end + after, end)};
}

template <int kWidth, class T>
void forward_rows(const Conv1dForward& f, const ConvTile& tile) {
  using Real = typename RealOf<T>::type;
  constexpr int kState = kWidth - 1;
  const Conv1dProblem& p = f.problem;
  RowTile<T, kConvTileRows + kState> x(p.x, rows_around(p, tile.items, p.reverse ? 0 : kState, p.reverse ? kState : 0),
                                       tile.channels);
  for_lanes<T>(tile.channels, [&](int64_t, const Lanes<T>& lanes) {
    const Taps<kWidth, T> taps(p, lanes);
    for_pieces(p, tile.items, [&](int64_t i, const Timeline& time, int64_t t0, int64_t t1) {
      const T* const state = state_of<T, kWidth>(p.initial_states, i, p.channels);
      taps.run(
          t0, t1, state, p.silu, [&](int64_t t) { return load(x.at(time.row(t), lanes)); },
          [&](int64_t t, Vec<Real> y) { store(x.at(time.row(t), lanes), y); });
    });
  });
  x.store({tile.items.begin, least(tile.items.end, x.rows.end)}, static_cast<T*>(f.out), p.channels);
}

// The last width - 1 values of a sequence, from a state (nullptr: zeros) that may be the same memory.
template <class T>
void next_state(const Conv1dProblem& p, const Timeline& time, const Span& channels, const T* from, T* to) {
  const int64_t length = time.length, state = p.width - 1, kept = length < state ? state - length : 0;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    T* const row = to + c * state;
    for (int64_t j = 0; j < kept; ++j) row[j] = from ? from[c * state + length + j] : T{};
    for (int64_t j = kept; j < state; ++j) {
      row[j] = static_cast<const T*>(p.x.data)[time.row(length - state + j) * p.x.token + c];
    }
  }
}

template <class T>
void final_states(const Conv1dForward& f, const ConvTile& tile) {
  const Conv1dProblem& p = f.problem;
  for (int64_t i = tile.items.begin; i < tile.items.end; ++i) {
    const int64_t at = i * p.channels * (p.width - 1);
    const T* const from = p.initial_states ? static_cast<const T*>(p.initial_states) + at : nullptr;
    next_state(p, timeline_of(p, i), tile.channels, from, static_cast<T*>(f.final_states) + at);
  }
}

// Walking on in time, the gradient of pre at t completes that of x at t - (width - 1), so the walk goes on beyond t1.
template <int kWidth, class T>
void backward_rows(const Conv1dBackward& b, const ConvTile& tile, double* sums) {
  using Real = typename RealOf<T>::type;
  constexpr int kState = kWidth - 1;
  const Conv1dProblem& p = b.problem;
  RowTile<T, kConvTileRows + 2 * kState> x(p.x, rows_around(p, tile.items, kState, kState), tile.channels);
  RowTile<T, kConvTileRows + 2 * kState> dout(b.dout, x.rows, tile.channels);  // becomes dx
  for_lanes<T>(tile.channels, [&](int64_t, const Lanes<T>& lanes) {
    const Taps<kWidth, T> taps(p, lanes);
    Vec<Real> dweight[kWidth] = {}, dbias = {};
    for_pieces(p, tile.items, [&](int64_t i, const Timeline& time, int64_t t0, int64_t t1) {
      const auto row = [&](int64_t t) { return load(x.at(time.row(t), lanes)); };
      const T* const dfinal = state_of<T, kWidth>(b.dfinal_states, i, p.channels);
      Vec<Real> window[kWidth], dpre[kWidth] = {};
      taps.start(window, t0, state_of<T, kWidth>(p.initial_states, i, p.channels), row);
      for (int64_t t = t0; t < t1 + kState; ++t, taps.advance(window), taps.advance(dpre)) {
        dpre[kState] = Vec<Real>{};
        if (t < time.length) {
          window[kState] = row(t);
          const Vec<Real> d = load(dout.at(time.row(t), lanes));
          dpre[kState] = p.silu ? taps.through_silu(d, taps.apply(window)) : d;
        }
        if (t < t1) {
          PACKSEQ_UNROLL
          for (int k = 0; k < kWidth; ++k) dweight[k] += dpre[kState] * window[k];
          dbias += dpre[kState];
        }
        const int64_t complete = t - kState, in_final = complete - (time.length - kState);
        if (complete < t0) continue;
        Vec<Real> sum = {};
        PACKSEQ_UNROLL
        for (int k = 0; k < kWidth; ++k) sum += taps.weight[k] * dpre[kState - k];
        if (dfinal && in_final >= 0) sum += lanes.gather(dfinal, kState, in_final);
        store(dout.at(time.row(complete), lanes), sum);
      }
    });
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      double* const sum = sums + lanes.first + lane;
      PACKSEQ_UNROLL
      for (int k = 0; k < kWidth; ++k) sum[k * p.channels] += dweight[k][lane];
      sum[kWidth * p.channels] += dbias[lane];
    }
  });
  dout.store({tile.items.begin, least(tile.items.end, x.rows.end)}, static_cast<T*>(b.dx), p.channels);
}

// As dx, at the times before the first row. Where the sequence is shorter than its state, part of the final state is
// the initial one.
template <int kWidth, class T>
void backward_initial_states(const Conv1dBackward& b, const Span& sequences, const Lanes<T>& lanes) {
  using Real = typename RealOf<T>::type;
  constexpr int kState = kWidth - 1;
  const Conv1dProblem& p = b.problem;
  const Taps<kWidth, T> taps(p, lanes);
  for (int64_t i = sequences.begin; i < sequences.end; ++i) {
    const Timeline time = timeline_of(p, i);
    const T* const dfinal = state_of<T, kWidth>(b.dfinal_states, i, p.channels);
    T* const dinitial = static_cast<T*>(b.dinitial_states) + i * p.channels * kState;
    Vec<Real> window[kWidth], dpre[kState] = {};
    const auto row = [&](int64_t t) { return lanes.load(p.x, time.row(t)); };
    taps.start(window, 0, state_of<T, kWidth>(p.initial_states, i, p.channels), row);
    PACKSEQ_UNROLL
    for (int t = 0; t < kState; ++t) {
      if (t >= time.length) continue;
      window[kState] = row(t);
      const Vec<Real> d = lanes.load(b.dout, time.row(t));
      dpre[t] = p.silu ? taps.through_silu(d, taps.apply(window)) : d;
      taps.advance(window);
    }
    PACKSEQ_UNROLL
    for (int j = 0; j < kState; ++j) {
      Vec<Real> sum = {};
      PACKSEQ_UNROLL
      for (int k = 0; k <= j; ++k) sum += taps.weight[k] * dpre[j - k];
      if (dfinal && j >= time.length) sum += lanes.gather(dfinal, kState, j - time.length);
      lanes.scatter(dinitial, kState, j, sum);
    }
  }
}

// The sequence's slot of the pool; nullptr where its index is none.
template <class T>
PACKSEQ_INLINE T* slot_of(const Conv1dStep& s, int64_t i) {
  const int64_t slot = s.indices ? s.indices[i] : i;
  if (slot < 0 || slot >= s.slots) return nullptr;
  return static_cast<T*>(s.pool) + slot * s.problem.channels * (s.problem.width - 1);
}

template <int kWidth, class T>
void step_rows(const Conv1dStep& s, const Span& sequences, const Lanes<T>& lanes) {
  using Real = typename RealOf<T>::type;
  const Conv1dProblem& p = s.problem;
  const Taps<kWidth, T> taps(p, lanes);
  for (int64_t i = sequences.begin; i < sequences.end; ++i) {
    const Timeline time = timeline_of(p, i);
    const auto row = [&](int64_t t) { return lanes.load(p.x, time.row(t)); };
    const auto put = [&](int64_t t, Vec<Real> y) { lanes.store(s.out, time.row(t), p.channels, y); };
    if (const T* const state = slot_of<T>(s, i)) {
      taps.run(0, time.length, state, p.silu, row, put);
    } else {
      for (int64_t t = 0; t < time.length; ++t) put(t, Vec<Real>{});
    }
  }
}

template <class T>
void update_pool(const Conv1dStep& s, const ConvTile& tile) {
  for (int64_t i = tile.items.begin; i < tile.items.end; ++i) {
    T* const state = slot_of<T>(s, i);
    if (state) next_state(s.problem, timeline_of(s.problem, i), tile.channels, state, state);
  }
}

}  // namespace packseq::PACKSEQ_ISA
