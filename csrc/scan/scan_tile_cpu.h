// What the scan's CPU kernels share: the tokens of a tile and the states of a block of channels, one lane a channel.
//
// Numbers of a state lie in rows of kScanBlock channels: `width` rows, a real one for each state, or two (real,
// imaginary) where they are complex. C of a complex scan is kept as (2 re, -2 im): then a state's part of y is the sum
// of the products, number by number, and C times dy its gradient.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/cpu/convert.h"
#include "core/cpu/math.h"
#include "core/cpu/prefetch.h"
#include "core/cpu/scratch.h"
#include "core/cpu/transpose.h"
#include "scan/scan_kernels_cpu.h"

namespace packseq::PACKSEQ_ISA {

constexpr int kScanTile = 32;  // tokens
constexpr int kTileSize = kScanTile * kScanBlock;

// One number of a state, or one of something like it, for each lane.
template <class Real, int kParts>
struct Number {
  Vec<Real> part[kParts];
};

template <class Real, int kParts>
PACKSEQ_INLINE Number<Real, kParts> load_number(const Real* p, int64_t stride) {
  Number<Real, kParts> x;
  PACKSEQ_UNROLL
  for (int i = 0; i < kParts; ++i) x.part[i] = load(p + i * stride);
  return x;
}

template <class Real, int kParts>
PACKSEQ_INLINE void store_number(Real* p, int64_t stride, const Number<Real, kParts>& x) {
  PACKSEQ_UNROLL
  for (int i = 0; i < kParts; ++i) store(p + i * stride, x.part[i]);
}

// B or C of one state: rows of lanes where it is constant, else one number for all lanes.
template <bool kConstant, class Real, int kParts>
PACKSEQ_INLINE Number<Real, kParts> load_coefficient(const Real* p) {
  if constexpr (kConstant) return load_number<Real, kParts>(p, kScanBlock);
  Number<Real, kParts> x;
  PACKSEQ_UNROLL
  for (int i = 0; i < kParts; ++i) x.part[i] = splat(p[i]);
  return x;
}

// exp(d A); the real part of `exponent` is A's times log2(e).
template <bool kBounded, class Real, int kParts>
PACKSEQ_INLINE Number<Real, kParts> decay_of(Vec<Real> d, const Number<Real, kParts>& exponent) {
  const Vec<Real> size = exp2_of_product<Real>(d, exponent.part[0], kBounded);
  if constexpr (kParts == 1) {
    return {{size}};
  } else {
    const Circle<Real> circle(d * exponent.part[1]);
    return {{size * circle.cos, size * circle.sin}};
  }
}

// h = a h + x B
template <class Real, int kParts>
PACKSEQ_INLINE void advance(Number<Real, kParts>& h, const Number<Real, kParts>& a, Vec<Real> x,
                            const Number<Real, kParts>& B) {
  if constexpr (kParts == 1) {
    h.part[0] = a.part[0] * h.part[0] + x * B.part[0];
  } else {
    const Vec<Real> re = h.part[0], im = h.part[1];
    h.part[0] = a.part[0] * re - a.part[1] * im + x * B.part[0];
    h.part[1] = a.part[0] * im + a.part[1] * re + x * B.part[1];
  }
}

// conj(a) b
template <class Real, int kParts>
PACKSEQ_INLINE Number<Real, kParts> conjugate_times(const Number<Real, kParts>& a, const Number<Real, kParts>& b) {
  if constexpr (kParts == 1) {
    return {{a.part[0] * b.part[0]}};
  } else {
    return {{a.part[0] * b.part[0] + a.part[1] * b.part[1], a.part[0] * b.part[1] - a.part[1] * b.part[0]}};
  }
}

// sum + a b, number by number
template <class Real, int kParts>
PACKSEQ_INLINE Vec<Real> add_products(Vec<Real> sum, const Number<Real, kParts>& a, const Number<Real, kParts>& b) {
  PACKSEQ_UNROLL
  for (int i = 0; i < kParts; ++i) sum += a.part[i] * b.part[i];
  return sum;
}

// [channels, width] to width rows of kScanBlock lanes, zeros in those that are no channel.
template <class Real>
inline void load_states(const Real* from, int channels, int64_t width, Real* to) {
  constexpr int lanes = kLanes<Real>;
  if (channels < kScanBlock) __builtin_memset(to, 0, width * kScanBlock * sizeof(Real));
  for (int c = 0; c < channels; c += lanes) {
    int64_t n = 0;
    for (; c + lanes <= channels && n + lanes <= width; n += lanes) {
      transpose(from + c * width + n, width, to + n * kScanBlock + c, kScanBlock);
    }
    for (; n < width; ++n) {
      for (int i = c; i < c + lanes && i < channels; ++i) to[n * kScanBlock + i] = from[i * width + n];
    }
  }
}

template <class Real>
inline void store_states(const Real* from, int channels, int64_t width, Real* to) {
  constexpr int lanes = kLanes<Real>;
  for (int c = 0; c < channels; c += lanes) {
    int64_t n = 0;
    for (; c + lanes <= channels && n + lanes <= width; n += lanes) {
      transpose(from + n * kScanBlock + c, kScanBlock, to + c * width + n, width);
    }
    for (; n < width; ++n) {
      for (int i = c; i < c + lanes && i < channels; ++i) to[i * width + n] = from[n * kScanBlock + i];
    }
  }
}

// The same for all tokens: for every block its rows of lanes.
template <class Real, int kParts>
struct ScanParameters {
  Real *A, *exponent;  // [blocks, width, kScanBlock]; exponent: what decay_of() takes
  Real* room;          // [blocks, kScanBlock]: steps up to which no decay leaves the range of powers of two
  Real *B, *C;         // the same, where constant
  Real *D, *bias;      // [blocks, kScanBlock]; zeros where absent

  ScanParameters(const ScanProblem& p, Scratch& s) {
    const int64_t blocks = int64_t(blocks_per_group(p)) * p.groups, states = blocks * state_width(p) * kScanBlock;
    A = s.take<Real>(states);
    exponent = s.take<Real>(states);
    room = s.take<Real>(blocks * kScanBlock);
    B = s.take<Real>(p.B.constants ? states : 0);
    C = s.take<Real>(p.C.constants ? states : 0);
    D = s.take<Real>(blocks * kScanBlock);
    bias = s.take<Real>(blocks * kScanBlock);
  }

  void prepare(const ScanProblem& p) const {
    const int64_t blocks = int64_t(blocks_per_group(p)) * p.groups, width = state_width(p);
    for (int64_t b = 0; b < blocks; ++b) {
      const ScanBlock block = block_of(p, b);
      const int64_t at = b * width * kScanBlock;
      load(p.A, block, width, A + at);
      if (p.B.constants) load(p.B.constants, block, width, B + at);
      if (p.C.constants) load(p.C.constants, block, width, C + at);
      if (p.C.constants && kParts == 2) double_conjugate(C + at, width, kScanBlock);
      for (int64_t n = 0; n < width; ++n) {
        const Real factor = n % kParts == 0 ? Real(kLog2e) : Real(1);
        for (int i = 0; i < kScanBlock; ++i) exponent[at + n * kScanBlock + i] = A[at + n * kScanBlock + i] * factor;
      }
      constexpr Real most = Exp2Polynomial<Real>::bias - 1;
      for (int i = 0; i < kScanBlock; ++i) {
        Real largest = 1;
        for (int64_t n = 0; n < width; n += kParts) {
          largest = std::max(largest, std::abs(exponent[at + n * kScanBlock + i]));
        }
        room[b * kScanBlock + i] = most / largest;
      }
      load(p.D, block, D + b * kScanBlock);
      load(p.delta_bias, block, bias + b * kScanBlock);
    }
  }

  // (re, im) to (2 re, -2 im) of `states` pairs of rows, or of single numbers.
  static void double_conjugate(Real* x, int64_t numbers, int64_t row) {
    for (int64_t n = 0; n < numbers; ++n) {
      for (int64_t i = 0; i < row; ++i) x[n * row + i] *= n % 2 ? Real(-2) : Real(2);
    }
  }

 private:
  static void load(const void* from, const ScanBlock& block, int64_t width, Real* to) {
    load_states(static_cast<const Real*>(from) + block.first * width, block.channels, width, to);
  }
  static void load(const void* from, const ScanBlock& block, Real* to) {
    __builtin_memset(to, 0, kScanBlock * sizeof(Real));
    if (from) __builtin_memcpy(to, static_cast<const Real*>(from) + block.first, block.channels * sizeof(Real));
  }
};

// A sequence's rows in the order in which the scan goes over them.
struct Walk {
  int64_t first, step, length;

  PACKSEQ_INLINE Walk(const Span& rows, bool reverse)
      : first(reverse ? rows.end - 1 : rows.begin), step(reverse ? -1 : 1), length(rows.size()) {}
  PACKSEQ_INLINE int64_t row(int64_t i) const { return first + i * step; }
};

// A tile of one sequence's tokens in one block of channels.
template <class T, int kParts>
class ScanTile {
 public:
  using Real = typename RealOf<T>::type;
  using Parameters = ScanParameters<Real, kParts>;

  const ScanBlock block;
  const int lanes;  // channels and what fills their last vector
  const int64_t width;
  const Real *A, *exponent, *room, *D, *bias;
  const Real *B, *C;        // [kScanTile, width], or where constant [width, kScanBlock]
  Real *u, *d, *x, *slope;  // [kScanTile, kScanBlock]: the input, the step, their product; the step's slope by delta
  int64_t begin = 0;        // the first of the tile's tokens, counted along the walk
  int count = 0;

  ScanTile(const ScanProblem& p, const Parameters& parameters, int64_t index, Scratch& s)
      : block(block_of(p, index)),
        lanes(int(round_up(block.channels, kLanes<Real>))),
        width(state_width(p)),
        A(parameters.A + index * width * kScanBlock),
        exponent(parameters.exponent + index * width * kScanBlock),
        room(parameters.room + index * kScanBlock),
        D(parameters.D + index * kScanBlock),
        bias(parameters.bias + index * kScanBlock),
        u(s.take<Real>(kTileSize)),
        d(s.take<Real>(kTileSize)),
        x(s.take<Real>(kTileSize)),
        slope(s.take<Real>(kTileSize)),
        p_(p),
        token_B_(p.B.constants ? nullptr : s.take<Real>(kScanTile * width)),
        token_C_(p.C.constants ? nullptr : s.take<Real>(kScanTile * width)) {
    B = p.B.constants ? parameters.B + index * width * kScanBlock : token_B_;
    C = p.C.constants ? parameters.C + index * width * kScanBlock : token_C_;
  }

  // Steps, inputs and B of the tokens from `begin_` on.
  void load_inputs(const Walk& walk, int64_t begin_) {
    begin = begin_;
    count = int(least(kScanTile, walk.length - begin));
    fetch(p_.u, walk, u);
    fetch(p_.delta, walk, d);
    for_vectors([&](int64_t i, int c) __attribute__((always_inline)) {
      Vec<Real> step = load(d + i) + load(bias + c);
      Vec<Real> by_delta = splat(Real(1));
      if (p_.delta_softplus) {
        const Softplus<Real> softplus(step);
        step = softplus.value, by_delta = softplus.slope;
      }
      store(d + i, step);
      store(slope + i, by_delta);
      store(x + i, step * load(u + i));
    });
    for (int c = 0; c < lanes; c += kLanes<Real>) {
      Vec<Int<Real>> beyond{};
      for (int t = 0; t < count; ++t) beyond |= ~(abs<Real>(load(d + t * kScanBlock + c)) <= load(room + c));
      bounded_[c / kLanes<Real>] = !any<Real>(beyond);
    }
    if (token_B_) fetch(p_.B.tokens, walk, token_B_);
  }

  void load_C(const Walk& walk) {
    if (!token_C_) return;
    fetch(p_.C.tokens, walk, token_C_);
    if (kParts == 2) Parameters::double_conjugate(token_C_, count * width, 1);
  }

  // f(whether all decays of the vector of channels from c on are within the range of powers of two), as a template
  // argument.
  template <class F>
  PACKSEQ_INLINE void with_bounds(int c, const F& f) const {
    bounded_[c / kLanes<Real>] ? f.template operator()<true>() : f.template operator()<false>();
  }

  // f(i, c) for every vector of a [kScanTile, kScanBlock] array that holds something: its place, its first channel.
  template <class F>
  PACKSEQ_INLINE void for_vectors(const F& f) const {
    for (int t = 0; t < count; ++t) {
      for (int c = 0; c < lanes; c += kLanes<Real>) f(int64_t(t) * kScanBlock + c, c);
    }
  }

  // The tile's part of a [total, channels] tensor.
  void fetch(const Rows& rows, const Walk& walk, Real* to) const {
    const T* from = static_cast<const T*>(rows.data) + walk.row(begin) * rows.token + block.first;
    for (int t = 0; t < count; ++t, from += walk.step * rows.token) {
      load_row(from, block.channels, to + t * kScanBlock, lanes);
    }
  }

  // Asks for the rows of a [total, channels] tensor that the tile from `next` on will need. Beyond the sequence's end
  // these are the next sequence's.
  void ask(Prefetch& prefetch, const Rows& rows, const Walk& walk, int64_t next) const {
    if (!rows.data) return;
    const int64_t row = walk.row(next), stop = row + walk.step * kScanTile;
    const int64_t low = most(0, walk.step > 0 ? row : stop + 1), high = least(p_.total, walk.step > 0 ? stop : row + 1);
    const T* const from = static_cast<const T*>(rows.data) + low * rows.token + block.first;
    prefetch.add(from, rows.token * int64_t(sizeof(T)), high - low, block.channels * int64_t(sizeof(T)));
  }
  Rows contiguous(const void* data) const { return {data, p_.channels}; }

  // How often walking over the tile calls step().
  int64_t prefetch_steps() const { return int64_t(lanes / kLanes<Real>) * ((p_.states + 3) / 4); }

  void save(const Real* from, void* rows, const Walk& walk) const {
    T* to = static_cast<T*>(rows) + walk.row(begin) * p_.channels + block.first;
    for (int t = 0; t < count; ++t, to += walk.step * p_.channels) {
      store_row(from + t * kScanBlock, block.channels, to);
    }
  }

 private:
  void fetch(const Packed& matrix, const Walk& walk, Real* to) const {
    using Element = std::conditional_t<kParts == 2, Real, T>;
    const int64_t token = matrix.token * kParts;
    const Element* from =
        static_cast<const Element*>(matrix.data) + walk.row(begin) * token + block.group * matrix.head * kParts;
    for (int t = 0; t < count; ++t, from += walk.step * token) load_row(from, width, to + t * width, width);
  }

  const ScanProblem& p_;
  Real *token_B_, *token_C_;
  bool bounded_[kScanBlock / kLanes<Real>];
};

// f(constant B, constant C) as template arguments.
template <class F>
PACKSEQ_INLINE void with_matrices(const ScanProblem& p, const F& f) {
  if (p.B.constants) {
    p.C.constants ? f.template operator()<true, true>() : f.template operator()<true, false>();
  } else {
    p.C.constants ? f.template operator()<false, true>() : f.template operator()<false, false>();
  }
}

// f(first of them) for all the states, as many at a time as stay in registers.
template <int kMost, class F>
PACKSEQ_INLINE void for_states(int states, const F& f) {
  int n = 0;
  for (; n + kMost <= states; n += kMost) f.template operator()<kMost>(n);
  if constexpr (kMost > 2) {
    for (; n + 2 <= states; n += 2) f.template operator()<2>(n);
  }
  if constexpr (kMost > 1) {
    for (; n < states; ++n) f.template operator()<1>(n);
  }
}

}  // namespace packseq::PACKSEQ_ISA
