// How the scan's kernels are laid over channels, states and tokens, and how tensors come to them.
//
// A thread owns kC neighbouring channels times kS neighbouring states, in registers, and walks its sequence's tokens
// one after the other. A warp is kL state lanes, which hold all states of their channels, times 32 / kL channel lanes.
// A block is four warps side by side over channels of one group, which share B and C of a tile of tokens; in a relay
// (scan_relay.cuh) its warps have the same channels and take turns over the tokens.
//
// What belongs to a token and a channel alone (steps, gates, loads and stores) is done for kGroup tokens at once, the
// state lanes having one token each.
#pragma once
#include <type_traits>

#include "core/device/async_copy.cuh"
#include "core/device/guarded_access.cuh"
#include "core/device/lane_sum.cuh"
#include "core/device/mma.cuh"
#include "core/packed.h"
#include "scan/scan_kernels.h"
#include "scan/scan_math.cuh"

namespace packseq {

// Lane bits: neighbouring lanes share states and lanes two apart share channels, so that 16-byte loads of B and C by
// states, and of steps by channels, both are one address for pairs of lanes, which shared memory serves at twice the
// rate.
template <int kL>
struct LaneLayout;
template <>
struct LaneLayout<4> {
  using States = LaneBits<1, 4>;
  using Channels = LaneBits<0, 2, 3>;
};
template <>
struct LaneLayout<8> {
  using States = LaneBits<1, 3, 4>;
  using Channels = LaneBits<0, 2>;
};
template <>
struct LaneLayout<32> {
  using States = LaneBits<0, 1, 2, 3, 4>;
  using Channels = LaneBits<>;
};

template <class M_>
struct ScanMapping : M_ {
  using States = typename LaneLayout<M_::kL>::States;
  using Channels = typename LaneLayout<M_::kL>::Channels;
  static constexpr bool kAny = std::is_same_v<typename M_::T, AnyType>;  // constant B and C, and any alignment, too
  static constexpr int kWarpChannels = 32 / M_::kL * M_::kC;
  static constexpr int kGroup = M_::kL == 8 ? 8 : 4;
  static constexpr int kTile = M_::kN <= 16 ? 32 : 8;  // tokens whose B and C the forward holds in shared memory
  // Tokens whose inputs are fetched at once: going forth, and back, where there is less room.
  static constexpr int kFetch = kTile / kGroup < 4 ? kTile : (kAny ? 2 : 4) * kGroup;
  static constexpr int kFetchBack = M_::kChunk * (std::is_same_v<typename M_::T, float> || kAny ? 1 : 2);
  static_assert(M_::kChunk % kGroup == 0 && kTile % kGroup == 0 && M_::kChannels == M_::kWarps * kWarpChannels);
};

// One segment of a sequence, walked in either direction.
struct Walk {
  int64_t sequence, begin, first;  // begin: the sequence's lowest row; first: the row that is walked first
  int32_t segment, count, direction;
  bool split, relayed;      // whether the sequence has several segments; whether it is long enough for a relay
  bool last, last_but_one;  // whether this is its last segment, or the one before

  __device__ Walk(const ScanProblem& p, Tile tile) : sequence(tile.sequence), segment(tile.block) {
    const Span span = span_of(p.cu_seqlens, p.sequences, p.total, sequence);
    const int64_t before = int64_t(segment) * kSegmentRows, rest = span.size() - before;
    begin = span.begin;
    count = int32_t(min(max(rest, int64_t(0)), int64_t(kSegmentRows)));
    direction = p.reverse ? -1 : 1;
    first = p.reverse ? span.end - 1 - before : span.begin + before;
    split = span.size() > kSegmentRows;
    last = rest <= kSegmentRows;
    last_but_one = !last && rest <= 2 * kSegmentRows;
    relayed = span.size() > kRelayRows;
  }
  __device__ int64_t row(int32_t t) const { return first + int64_t(t) * direction; }
  __device__ int64_t slot() const { return segment_slot(begin, segment, last); }

  // The same rows from the last one to the first.
  __device__ Walk backwards() const {
    Walk w = *this;
    w.first = row(count - 1);
    w.direction = -direction;
    return w;
  }
};

// A thread's place among channels and states.
template <class M>
struct Position {
  int block;  // of channels
  int block_of_group;
  int group;          // of B and C
  int channel;        // first of kC
  int mine;           // how many of them there are
  int of_warp;        // how many the warp has
  int state;          // first of kS
  int token;          // of a group: what this lane does for tokens
  int warp, in_warp;  // in_warp: first channel, counted within the warp

  __device__ Position(const ScanProblem& p, int block_) : block(block_) {
    const int of_group = p.channels / p.groups, blocks = (of_group + M::kChannels - 1) / M::kChannels;
    group = block / blocks;
    block_of_group = block % blocks;
    warp = M::kWarps == 1 ? 0 : threadIdx.x / 32;
    in_warp = M::Channels::index() * M::kC;
    const int within = block_of_group * M::kChannels + warp * M::kWarpChannels + in_warp;
    channel = group * of_group + within;
    mine = min(max(of_group - within, 0), M::kC);
    of_warp = min(max(of_group - within + in_warp, 0), M::kWarpChannels);
    state = M::States::index() * M::kS;
    token = M::States::index() % M::kGroup;
  }
};

// ---- Tensors of tokens and channels --------------------------------------------------------------------------------

// A warp's channels of a tensor [total, channels], fetched kRows tokens at a time into shared memory, where any of its
// lanes finds its own.
template <class M, int kRows>
class InputRows {
  using T = typename M::T;
  using Item = Element<T>;
  using Bits = typename Item::Bits;
  static constexpr int kWidth = M::kWarpChannels;

 public:
  using Slot = Bits[kRows][kWidth];
  struct Values {
    Few<Bits, M::kC> bits;
    __device__ float operator[](int c) const {
      if constexpr (M::kC == 2 && std::is_same_v<T, __nv_bfloat16>) {
        const uint32_t both = reinterpret_cast<const uint32_t&>(bits);
        return __uint_as_float(c == 0 ? both << 16 : both & 0xffff0000);
      } else {
        return Item::value(bits.x[c]);
      }
    }
  };
  static __device__ Values at(const Slot& slot, int token, const Position<M>& at) {
    return {*reinterpret_cast<const Few<Bits, M::kC>*>(&slot[token][at.in_warp])};
  }

  // Begins with run `run` of kRows tokens; `forth` is 1 or -1 as later or earlier runs come next. `wide`: rows can be
  // read 16 bytes at a time.
  __device__ InputRows(const Rows& x, Dtype dtype, const Position<M>& at, const Walk& walk, bool wide, int run,
                       int forth)
      : token_step_(int64_t(walk.direction) * x.token * Item::bytes(dtype)),
        run_step_(forth * kRows * token_step_),
        row_(static_cast<const char*>(x.data) +
             (walk.row(run * kRows + lane_token(wide)) * x.token + at.channel - at.in_warp + lane_item(wide)) *
                 Item::bytes(dtype)) {}

  // Starts copying, and goes on to the next run; zeros beyond the last token or channel. rest: tokens left; width: the
  // warp's channels that there are.
  __device__ void fetch(Slot& slot, int rest, int width, bool wide, Dtype dtype) {
    const char* row = row_;
    const int token = lane_token(wide), item = lane_item(wide);
    Bits* const to = &slot[token][item];
    const auto copy = [&]<int kItems>(std::integral_constant<int, kItems>) {
      constexpr int kTokens = 32 * kItems / kWidth;  // of all lanes at once
#pragma unroll
      for (int i = 0; i < (kRows + kTokens - 1) / kTokens; ++i) {
        const bool there = token + i * kTokens < rest && item < width;
        if (kRows % kTokens != 0 && token + i * kTokens >= kRows) break;
        if constexpr (M::kAny) {
          Bits x = {};
          if (there) x = Item::load(row, dtype);
          to[i * kTokens * kWidth] = x;
        } else {
          const uint32_t place = uint32_t(__cvta_generic_to_shared(to + i * kTokens * kWidth));
          if constexpr (kItems * sizeof(Bits) == 16) copy_async_16(place, row, there);
          if constexpr (kItems * sizeof(Bits) == 8) copy_async_8(place, row, there);
          if constexpr (kItems * sizeof(Bits) == 4) copy_async_4(place, row, there);
        }
        row += kTokens * token_step_;
      }
    };
    if (!M::kAny && wide) {
      copy(std::integral_constant<int, kWide>{});
    } else {
      copy(std::integral_constant<int, kNarrow>{});
    }
    row_ += run_step_;
  }

 private:
  static constexpr int kWide = 16 / sizeof(Bits), kNarrow = M::kC;  // items of a copy
  static __device__ int lane_token(bool wide) {
    return threadIdx.x % 32 * (!M::kAny && wide ? kWide : kNarrow) / kWidth;
  }
  static __device__ int lane_item(bool wide) {
    return threadIdx.x % 32 * (!M::kAny && wide ? kWide : kNarrow) % kWidth;
  }

  const int64_t token_step_, run_step_;
  const char* row_;
};

// Sums over all states of a channel, of a group's tokens and the lane's channels: the state lanes leave their parts in
// shared memory and the lane whose token it is adds them up, when it likes. That takes fewer instructions than
// shuffles, and nothing waits for it.
template <class M>
class LaneSums {
  static constexpr bool kShuffled = M::kL > 8;  // too many parts to read
  static constexpr int kItems = M::kC * (kShuffled ? 1 : M::kGroup), kRun = kItems < 4 ? kItems : 4;
  using Run = Few<float, kRun>;

 public:
  __device__ void put(float (&x)[M::kC][M::kGroup]) {
    if constexpr (kShuffled) {
#pragma unroll
      for (int c = 0; c < M::kC; ++c) sum_over_lanes<typename M::States>(x[c]);
    }
#pragma unroll
    for (int i = 0; i < kItems / kRun; ++i) {
      Run run;
#pragma unroll
      for (int k = 0; k < kRun; ++k) run.x[k] = x[(i * kRun + k) % M::kC][(i * kRun + k) / M::kC];
      runs_[i][place(M::States::index())] = run;
    }
  }
  // Of the lane's own token.
  __device__ void get(float (&x)[M::kC], int token) const {
    constexpr int kParts = kShuffled ? 1 : M::kL;
    const int item = kShuffled ? 0 : token * M::kC;
    Few<float, M::kC> part[kParts];
#pragma unroll
    for (int s = 0; s < kParts; ++s) {
      const Run& run = runs_[item / kRun][place(kShuffled ? M::States::index() : s)];
      part[s] = *reinterpret_cast<const Few<float, M::kC>*>(&run.x[item % kRun]);
    }
#pragma unroll
    for (int width = kParts / 2; width > 0; width /= 2)
#pragma unroll
      for (int s = 0; s < width; ++s)
#pragma unroll
        for (int c = 0; c < M::kC; ++c) part[s].x[c] += part[s + width].x[c];
#pragma unroll
    for (int c = 0; c < M::kC; ++c) x[c] = part[0].x[c];
  }

 private:
  // Lanes that write or read at once have different banks.
  static __device__ int place(int state_lane) {
    const int channel = M::Channels::index();
    if constexpr (M::kL == 4) return state_lane * 8 + (channel ^ (state_lane & 1) * 4);
    return state_lane * M::Channels::kCount + channel;
  }

  Run runs_[kItems / kRun][32 + (M::kL == 8 ? 4 : 0)];  // the padding is for lanes of neighbouring tokens
};

// A lane's place in contiguous tensors [total, channels] of which it writes a token of every `forth`-th group.
template <class M, class Step = int64_t>
class OutputPlace {
  using Item = Element<typename M::T>;

 public:
  __device__ OutputPlace(const ScanProblem& p, const Position<M>& at, const Walk& walk, int group, int forth)
      : step_(Step(forth) * walk.direction * M::kGroup * p.channels * Item::bytes(p.dtype)),
        at_((walk.row(group * M::kGroup + at.token) * p.channels + at.channel) * Item::bytes(p.dtype)),
        dtype_(p.dtype) {}

  __device__ void store(void* data, const float (&x)[M::kC], bool valid) const {
    char* const to = static_cast<char*>(data) + at_;
    if constexpr (M::kAny) {
      if (valid) Item::store(to, x[0], dtype_);
    } else if constexpr (sizeof(typename Item::Bits) == 4) {
      const uint32_t words[2] = {__float_as_uint(x[0]), __float_as_uint(x[1])};
      store_guarded<8>(to, words, valid);
    } else {
      const uint32_t words[1] = {pack_halves<typename M::T>(x[0], x[1])};
      store_guarded<4>(to, words, valid);
    }
  }
  __device__ void next() { at_ += step_; }

 private:
  const Step step_;
  int64_t at_;
  const Dtype dtype_;
};

// ---- B and C -------------------------------------------------------------------------------------------------------

// One thread's share of B and C of tiles of kRows tokens: fetched as they are ahead of their use, into the thread's
// place in shared memory, then put where all threads read them, as states. Tokens and states beyond the last are zeros.
template <class M, int kRows>
class MatrixTiles {
  using X = typename M::X;
  using Source = std::conditional_t<M::kAny, X, typename Element<typename M::T>::Bits>;
  static constexpr int kItems = 2 * kRows * M::kN / kScanThreads, kRun = kItems < 8 ? kItems : 8;
  static constexpr int kRuns = kItems / kRun;
  using Run = Few<Source, kRun>;

 public:
  struct Buffer {
    alignas(16) X matrix[2][kRows][M::kN];  // B, then C times kOutputFactor
  };

  // Begins at tokens first ... first + kRows of the walk; `forth` is 1 or -1 as later or earlier tiles come next.
  __device__ MatrixTiles(const ScanProblem& p, int group, const Walk& walk, bool wide, int first, int forth)
      : p_(p), first_(first), count_(walk.count), forth_(forth), wide_(wide) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Place at = place(i);
      const StateMatrix& m = at.matrix ? p.C : p.B;
      const int64_t row = walk.row(first + at.row);
      from_[i] = static_cast<const char*>(m.tokens.data);
      if (from_[i]) from_[i] += (row * m.tokens.token + group * m.tokens.head + at.state) * bytes();
      step_[i] = int64_t(forth) * walk.direction * kRows * m.tokens.token * bytes();
    }
  }

  // They are there when the copies committed behind it are.
  using Stage = Run[kRuns][kScanThreads];
  __device__ void fetch(Stage& stage) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Place at = place(i);
      Run& run = stage[i][threadIdx.x];
      const bool there = first_ + at.row < count_ && from_[i];
      if (!M::kAny && wide_) {
        copy_run(run, from_[i], there);
      } else {
        Run loaded = {};
        if (there) {
#pragma unroll
          for (int k = 0; k < kRun; ++k) {
            if (at.state + k < p_.states) loaded.x[k] = load(from_[i] + k * bytes());
          }
        }
        run = loaded;
      }
      if (from_[i]) from_[i] += step_[i];
    }
    first_ += forth_ * kRows;
  }

  __device__ void put(const Stage& stage, Buffer& buffer) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const Place at = place(i);
      const Run run = stage[i][threadIdx.x];
      Few<X, kRun> states;
#pragma unroll
      for (int k = 0; k < kRun; ++k) states.x[k] = scaled(at.matrix ? kOutputFactor<X> : 1.0f, convert(run.x[k]));
      *reinterpret_cast<Few<X, kRun>*>(&buffer.matrix[at.matrix][at.row][at.state]) = states;
    }
  }

 private:
  struct Place {
    int matrix, row, state;
  };
  static __device__ Place place(int i) {
    const int item = (i * kScanThreads + threadIdx.x) * kRun;
    return {item / (kRows * M::kN), item / M::kN % kRows, item % M::kN};
  }
  static __device__ void copy_run(Run& run, const char* from, bool there) {
    const uint32_t to = uint32_t(__cvta_generic_to_shared(&run));
    if constexpr (sizeof(Run) == 4) {
      copy_async_4(to, from, there);
    } else if constexpr (sizeof(Run) == 8) {
      copy_async_8(to, from, there);
    } else {
#pragma unroll
      for (int byte = 0; byte < int(sizeof(Run)); byte += 16) copy_async_16(to + byte, from + byte, there);
    }
  }
  static __device__ X convert(Source x) {
    if constexpr (M::kAny) {
      return x;
    } else {
      return Element<typename M::T>::value(x);
    }
  }
  __device__ int bytes() const {
    return M::kAny ? int(std::is_same_v<X, Complex> ? 8 : (p_.dtype == Dtype::f32 ? 4 : 2)) : int(sizeof(Source));
  }
  __device__ Source load(const char* at) const {
    if constexpr (M::kAny && std::is_same_v<X, float>) {
      return Element<AnyType>::load(at, p_.dtype);
    } else {
      return *reinterpret_cast<const Source*>(at);
    }
  }

  const ScanProblem& p_;
  int32_t first_;
  const int32_t count_;
  const int forth_;
  const bool wide_;
  const char* from_[kRuns];
  int64_t step_[kRuns];
};

// This thread's states of one parameter [channels, states]; zeros where there are none.
template <class M>
__device__ __forceinline__ void load_parameter(typename M::X (&x)[M::kC][M::kS], const void* data, int64_t row0,
                                               const Position<M>& at, int states) {
#pragma unroll
  for (int c = 0; c < M::kC; ++c)
#pragma unroll
    for (int j = 0; j < M::kS; ++j) {
      x[c][j] = {};
      if (data && c < at.mine && at.state + j < states) {
        x[c][j] = static_cast<const typename M::X*>(data)[(row0 + at.channel + c) * states + at.state + j];
      }
    }
}

template <class M>
__device__ __forceinline__ void store_parameter(const typename M::X (&x)[M::kC][M::kS], void* data, int64_t row0,
                                                const Position<M>& at, int states) {
#pragma unroll
  for (int c = 0; c < M::kC; ++c)
#pragma unroll
    for (int j = 0; j < M::kS; ++j) {
      if (c < at.mine && at.state + j < states) {
        static_cast<typename M::X*>(data)[(row0 + at.channel + c) * states + at.state + j] = x[c][j];
      }
    }
}

// This lane's channels of a vector [channels]; zeros where it is absent.
template <class M>
__device__ __forceinline__ void load_vector(float (&x)[M::kC], const void* data, const Position<M>& at) {
#pragma unroll
  for (int c = 0; c < M::kC; ++c) x[c] = data && c < at.mine ? static_cast<const float*>(data)[at.channel + c] : 0.0f;
}

// B or C of a token: from its tile, or the constant one.
template <class M>
__device__ __forceinline__ void load_states(typename M::X (&x)[M::kS], const typename M::X* row,
                                            const Position<M>& at) {
  using States = Few<typename M::X, M::kS>;
  const States states = *reinterpret_cast<const States*>(row + at.state);
#pragma unroll
  for (int j = 0; j < M::kS; ++j) x[j] = states.x[j];
}

}  // namespace packseq
