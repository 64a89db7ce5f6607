// How the scan's kernels are laid over channels, states and tokens, and how tensors come to them.
//
// A thread owns kC neighbouring channels times kS neighbouring states, in registers, and walks its sequence's tokens
// one after the other. A warp is kL state lanes, which hold all states of their channels, times 32 / kL channel lanes.
// A block is four warps side by side over channels of one group; B and C of a tile of tokens are shared by them.
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
  static_assert(M_::kChunk % kGroup == 0 && kTile % kGroup == 0 && M_::kChannels == kScanWarps * kWarpChannels);
};

// One segment of a sequence, walked in either direction.
struct Walk {
  int64_t sequence, begin, first;  // begin: the sequence's lowest row; first: the row that is walked first
  int32_t segment, count, direction;
  bool split, last;  // whether the sequence has several segments; whether this is the last of it

  __device__ Walk(const ScanProblem& p, Tile tile) : sequence(tile.sequence), segment(tile.block) {
    const Span span = span_of(p.cu_seqlens, p.sequences, p.total, sequence);
    const int64_t before = int64_t(segment) * kSegmentRows, rest = span.size() - before;
    begin = span.begin;
    count = int32_t(min(max(rest, int64_t(0)), int64_t(kSegmentRows)));
    direction = p.reverse ? -1 : 1;
    first = p.reverse ? span.end - 1 - before : span.begin + before;
    split = span.size() > kSegmentRows;
    last = rest <= kSegmentRows;
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
  int state;          // first of kS
  int token;          // of a group: what this lane does for tokens
  int warp, in_warp;  // in_warp: first channel, counted within the warp

  __device__ Position(const ScanProblem& p, int block_) : block(block_) {
    const int of_group = p.channels / p.groups, blocks = (of_group + M::kChannels - 1) / M::kChannels;
    group = block / blocks;
    block_of_group = block % blocks;
    warp = threadIdx.x / 32;
    in_warp = M::Channels::index() * M::kC;
    const int within = block_of_group * M::kChannels + warp * M::kWarpChannels + in_warp;
    channel = group * of_group + within;
    mine = min(max(of_group - within, 0), M::kC);
    state = M::States::index() * M::kS;
    token = M::States::index() % M::kGroup;
  }
};

// ---- Tensors of tokens and channels --------------------------------------------------------------------------------

// This lane's channels of a tensor [total, channels], at every kGroup-th token.
template <class M>
class Column {
  using T = typename M::T;
  using Item = Element<T>;
  static constexpr int kBytes = M::kAny ? 4 : M::kC * int(sizeof(typename Item::Bits));

 public:
  struct alignas(kBytes < 4 ? 4 : kBytes) Values {
    uint32_t word[(kBytes + 3) / 4];

    __device__ float operator[](int c) const {
      if constexpr (sizeof(typename Item::Bits) == 4) return __uint_as_float(word[c]);
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __uint_as_float(c == 0 ? word[0] << 16 : word[0] & 0xffff0000);
      } else {
        return Item::value(uint16_t(word[0] >> 16 * c));
      }
    }
  };

  // Begins at the lane's token of group `group`; `forth` is 1 or -1 as later or earlier groups come next.
  __device__ Column(const Rows& x, Dtype dtype, const Position<M>& at, const Walk& walk, int group, int forth)
      : step_(int64_t(forth) * walk.direction * M::kGroup * x.token * Item::bytes(dtype)),
        row_(static_cast<const char*>(x.data) +
             (walk.row(group * M::kGroup + at.token) * x.token + at.channel) * Item::bytes(dtype)),
        dtype_(dtype) {}

  // Brings the lane's values to its place in shared memory, and goes on to the next group; zeros where the lane has no
  // channel or `valid` is false. They are there when the copies committed behind it are: unlike loads into registers,
  // the compiler cannot put these off until their use.
  __device__ void fetch(Values& place, bool valid, int mine) {
    const bool there = valid && mine > 0;
    if constexpr (!M::kAny && kBytes == 8) {
      copy_async_8(shared_place(place), row_, there);
    } else if constexpr (!M::kAny && kBytes == 4) {
      copy_async_4(shared_place(place), row_, there);
    } else {
      static_assert(M::kAny && M::kC == 1);
      Values v = {};
      if (there) v.word[0] = __float_as_uint(Item::load(row_, dtype_));
      place = v;
    }
    row_ += step_;
  }

  // And goes on to the next group.
  __device__ void store(const float (&x)[M::kC], bool valid, int mine) {
    char* const row = const_cast<char*>(row_);
    if constexpr (M::kAny) {
      if (valid && mine) Item::store(row, x[0], dtype_);
    } else {
      Values v;
      if constexpr (sizeof(typename Item::Bits) == 4) {
#pragma unroll
        for (int c = 0; c < M::kC; ++c) v.word[c] = __float_as_uint(x[c]);
      } else if constexpr (M::kC == 1) {
        v.word[0] = Item::bits(x[0]);
      } else {
        v.word[0] = pack_halves<T>(x[0], x[1]);
      }
      store_guarded<kBytes>(row, v.word, valid && mine);
    }
    row_ += step_;
  }

 private:
  static __device__ uint32_t shared_place(Values& place) { return uint32_t(__cvta_generic_to_shared(&place)); }

  const int64_t step_;
  const char* row_;
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
