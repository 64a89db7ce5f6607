// The scan backward, of one sequence in one block of channels.
//
// The states are not kept from the forward: a first walk over the sequence notes them at the begin of every tile. Then
// the tiles are gone through from the last to the first; in each the states and decays are computed again, a few states
// at a time, and the gradient h' of the states is carried back through them:
//
//   g = dh + C dy         dC = dy h, dB = d u g, summed over channels       d(d u) = sum of B g
//   dh before = conj(a) g         q = conj(h before) dh before              dA = sum of d q, d(d) = sum of A q
#pragma once
#include "scan/scan_tile_cpu.h"

namespace packseq::PACKSEQ_ISA {

// Carries states over a tile for what they are after it.
template <bool kBounded, class Real, int kParts, bool kConstantB, int kStates>
__attribute__((noinline)) void pass_states(int count, const Real* exponents, const Real* d, const Real* x,
                                           const Real* B, int64_t width, Real* states) {
  using N = Number<Real, kParts>;
  constexpr int row = kParts * kScanBlock, b = kConstantB ? row : kParts;
  N exponent[kStates], h[kStates];
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) {
    exponent[s] = load_number<Real, kParts>(exponents + s * row, kScanBlock);
    h[s] = load_number<Real, kParts>(states + s * row, kScanBlock);
  }
  for (int t = 0; t < count; ++t) {
    const Vec<Real> step = load(d), input = load(x);
    PACKSEQ_UNROLL
    for (int s = 0; s < kStates; ++s) {
      const N a = decay_of<kBounded, Real, kParts>(step, exponent[s]);
      advance<Real, kParts>(h[s], a, input, load_coefficient<kConstantB, Real, kParts>(B + s * b));
    }
    d += kScanBlock, x += kScanBlock;
    if (!kConstantB) B += width;
  }
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) store_number<Real, kParts>(states + s * row, kScanBlock, h[s]);
}

// The same, and every token's decay and state are kept: `history` of the state before the first token, then for each
// token its decay and the state after it.
template <bool kBounded, class Real, int kParts, bool kConstantB, int kStates>
__attribute__((noinline)) void recompute_states(int count, const Real* exponents, const Real* d, const Real* x,
                                                const Real* B, int64_t width, const Real* states, Real* decays,
                                                Real* history) {
  using N = Number<Real, kParts>;
  constexpr int row = kParts * kScanBlock, b = kConstantB ? row : kParts;
  constexpr int lanes = kLanes<Real>, number = kParts * lanes;
  N exponent[kStates], h[kStates];
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) {
    exponent[s] = load_number<Real, kParts>(exponents + s * row, kScanBlock);
    h[s] = load_number<Real, kParts>(states + s * row, kScanBlock);
    store_number<Real, kParts>(history + s * number, lanes, h[s]);
  }
  for (int t = 0; t < count; ++t) {
    const Vec<Real> step = load(d), input = load(x);
    history += kStates * number;
    PACKSEQ_UNROLL
    for (int s = 0; s < kStates; ++s) {
      const N a = decay_of<kBounded, Real, kParts>(step, exponent[s]);
      advance<Real, kParts>(h[s], a, input, load_coefficient<kConstantB, Real, kParts>(B + s * b));
      store_number<Real, kParts>(decays + s * number, lanes, a);
      store_number<Real, kParts>(history + s * number, lanes, h[s]);
    }
    decays += kStates * number;
    d += kScanBlock, x += kScanBlock;
    if (!kConstantB) B += width;
  }
}

// Pointers to the tile's last token, and to the first of the states.
template <class Real>
struct BackwardTile {
  const Real *d, *x, *dy, *B, *C;
  Real *y, *dx, *dd;           // added to: the states' parts of y and of the gradients of x and d
  const Real* A;               // of the block
  Real* dh;                    // of the block: after the tile's last token, then before its first
  Real *dB, *dC;               // of the tile's last token, where not constant: a vector for each number, added to
  double *dA, *sum_B, *sum_C;  // of the block, added to; dB and dC where constant
};

template <class Real>
PACKSEQ_INLINE void add_to_sums(double* sums, Vec<Real> x) {
  for (int i = 0; i < kLanes<Real>; ++i) sums[i] += double(x[i]);
}

template <class Real, int kParts, bool kConstantB, bool kConstantC, int kStates>
__attribute__((noinline)) void backward_states(int count, BackwardTile<Real> p, int64_t width, const Real* decays,
                                               const Real* history) {
  using N = Number<Real, kParts>;
  constexpr int row = kParts * kScanBlock;
  constexpr int b = kConstantB ? row : kParts, c = kConstantC ? row : kParts;
  constexpr int lanes = kLanes<Real>, number = kParts * lanes;
  decays += int64_t(count - 1) * kStates * number;
  history += int64_t(count) * kStates * number;
  N dh[kStates], dA[kStates] = {}, dB[kStates] = {}, dC[kStates] = {};
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) dh[s] = load_number<Real, kParts>(p.dh + s * row, kScanBlock);
  for (int t = 0; t < count; ++t) {
    const Vec<Real> d = load(p.d), x = load(p.x), dy = load(p.dy);
    Vec<Real> y{}, dx{}, dd{};
    PACKSEQ_UNROLL
    for (int s = 0; s < kStates; ++s) {
      const N B = load_coefficient<kConstantB, Real, kParts>(p.B + s * b);
      const N C = load_coefficient<kConstantC, Real, kParts>(p.C + s * c);
      const N a = load_number<Real, kParts>(decays + s * number, lanes);
      const N h = load_number<Real, kParts>(history + s * number, lanes);
      const N before = load_number<Real, kParts>(history + (s - kStates) * number, lanes);
      y = add_products<Real, kParts>(y, C, h);
      N g;
      PACKSEQ_UNROLL
      for (int i = 0; i < kParts; ++i) {
        g.part[i] = dh[s].part[i] + dy * C.part[i];
        if constexpr (kConstantC) {
          dC[s].part[i] += dy * h.part[i];
        } else {
          Real* const at = p.dC + s * number + i * lanes;
          store(at, load(at) + dy * h.part[i]);
        }
        if constexpr (kConstantB) {
          dB[s].part[i] += x * g.part[i];
        } else {
          Real* const at = p.dB + s * number + i * lanes;
          store(at, load(at) + x * g.part[i]);
        }
      }
      dx = add_products<Real, kParts>(dx, B, g);
      dh[s] = conjugate_times<Real, kParts>(a, g);
      const N q = conjugate_times<Real, kParts>(before, dh[s]);
      PACKSEQ_UNROLL
      for (int i = 0; i < kParts; ++i) dA[s].part[i] += d * q.part[i];
      dd = add_products<Real, kParts>(dd, load_number<Real, kParts>(p.A + s * row, kScanBlock), q);
    }
    store(p.y, load(p.y) + y);
    store(p.dx, load(p.dx) + dx);
    store(p.dd, load(p.dd) + dd);
    p.d -= kScanBlock, p.x -= kScanBlock, p.dy -= kScanBlock;
    p.y -= kScanBlock, p.dx -= kScanBlock, p.dd -= kScanBlock;
    decays -= kStates * number, history -= kStates * number;
    if (!kConstantB) p.B -= width, p.dB -= kStates * number;
    if (!kConstantC) p.C -= width, p.dC -= kStates * number;
  }
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) {
    store_number<Real, kParts>(p.dh + s * row, kScanBlock, dh[s]);
    for (int i = 0; i < kParts; ++i) {
      const int at = s * row + i * kScanBlock;
      add_to_sums<Real>(p.dA + at, dA[s].part[i]);
      if (kConstantB) add_to_sums<Real>(p.sum_B + at, dB[s].part[i]);
      if (kConstantC) add_to_sums<Real>(p.sum_C + at, kParts == 2 ? dC[s].part[i] * Real(i ? -2 : 2) : dC[s].part[i]);
    }
  }
}

template <class T, int kParts>
class BackwardScan {
  using Tile = ScanTile<T, kParts>;
  using Real = typename Tile::Real;
  static constexpr int kStates = kParts == 2 ? 2 : 4;
  static constexpr int kGroup = kStates * kParts * kLanes<Real>;  // numbers of the states that go together

 public:
  BackwardScan(const ScanBackward& b, const typename Tile::Parameters& parameters, int64_t block, int64_t longest,
               Scratch& s)
      : b_(b), p_(b.problem), tile_(b.problem, parameters, block, s) {
    dy_ = s.take<Real>(kTileSize), y_ = s.take<Real>(kTileSize);
    dx_ = s.take<Real>(kTileSize), dd_ = s.take<Real>(kTileSize);
    z_ = s.take<Real>(kTileSize), dz_ = s.take<Real>(kTileSize);
    decays_ = s.take<Real>(kScanTile * kGroup);
    history_ = s.take<Real>((kScanTile + 1) * kGroup);
    dB_ = s.take<Real>(kScanTile * kGroup);
    dC_ = s.take<Real>(kScanTile * kGroup);
    dh_ = s.take<Real>(tile_.width * kScanBlock);
    noted_ = s.take<Real>((longest / kScanTile + 1) * tile_.width * kScanBlock);
  }

  void run(const ScanSequenceBackward& sequence, const ScanSums& sums, const ScanSlice& slice) {
    const int64_t size = tile_.width * kScanBlock;
    const Walk walk(sequence.rows, p_.reverse);
    start(sequence.initial, noted_);
    start(sequence.dfinal, dh_);
    const int64_t tiles = (walk.length + kScanTile - 1) / kScanTile;
    for (int64_t i = 0; i + 1 < tiles; ++i) {
      Real* const after = noted_ + (i + 1) * size;
      __builtin_memcpy(after, noted_ + i * size, size * sizeof(Real));
      tile_.load_inputs(walk, i * kScanTile);
      Prefetch prefetch;
      const int64_t next = (i + 1) * kScanTile;
      tile_.ask(prefetch, p_.u, walk, next), tile_.ask(prefetch, p_.delta, walk, next);
      prefetch.spread(tile_.prefetch_steps());
      if (p_.B.constants) {
        pass<true>(after, prefetch);
      } else {
        pass<false>(after, prefetch);
      }
    }
    for (int64_t i = tiles - 1; i >= 0; --i) {
      tile_.load_inputs(walk, i * kScanTile);
      tile_.load_C(walk);
      load_gradients(walk);
      Prefetch prefetch;
      if (i > 0) ask(prefetch, walk, (i - 1) * kScanTile);
      prefetch.spread(tile_.prefetch_steps());
      with_matrices(p_, [&]<bool kConstantB, bool kConstantC>() {
        walk_back<kConstantB, kConstantC>(noted_ + i * size, walk, sums, slice, prefetch);
      });
      finish(walk, sums);
    }
    if (sequence.dinitial) {
      store_states(dh_, tile_.block.channels, tile_.width,
                   static_cast<Real*>(sequence.dinitial) + tile_.block.first * tile_.width);
    }
  }

 private:
  void start(const void* states, Real* to) const {
    if (states) {
      load_states(static_cast<const Real*>(states) + tile_.block.first * tile_.width, tile_.block.channels, tile_.width,
                  to);
    } else {
      __builtin_memset(to, 0, tile_.width * kScanBlock * sizeof(Real));
    }
  }

  void ask(Prefetch& prefetch, const Walk& walk, int64_t next) const {
    tile_.ask(prefetch, p_.u, walk, next), tile_.ask(prefetch, p_.delta, walk, next);
    tile_.ask(prefetch, p_.z, walk, next), tile_.ask(prefetch, b_.dout, walk, next);
    tile_.ask(prefetch, tile_.contiguous(b_.du), walk, next),
        tile_.ask(prefetch, tile_.contiguous(b_.ddelta), walk, next);
    tile_.ask(prefetch, tile_.contiguous(b_.dz), walk, next);
  }

  template <bool kConstantB>
  void pass(Real* states, Prefetch& prefetch) {
    for (int c = 0; c < tile_.lanes; c += kLanes<Real>) {
      tile_.with_bounds(c, [&]<bool kBounded>() {
        for_states<kStates>(p_.states, [&]<int kCount>(int n) {
          const int64_t number = int64_t(n) * kParts, row = number * kScanBlock + c;
          prefetch.step();
          pass_states<kBounded, Real, kParts, kConstantB, kCount>(tile_.count, tile_.exponent + row, tile_.d + c,
                                                                  tile_.x + c, tile_.B + (kConstantB ? row : number),
                                                                  tile_.width, states + row);
        });
      });
    }
  }

  // dy, and what dz is besides y; y = D u to begin with.
  void load_gradients(const Walk& walk) {
    tile_.fetch(b_.dout, walk, dy_);
    if (p_.z.data) tile_.fetch(p_.z, walk, z_);
    tile_.for_vectors([&](int64_t i, int c) __attribute__((always_inline)) {
      if (p_.z.data) {
        const Vec<Real> z = load(z_ + i), s = sigmoid<Real>(z), dout = load(dy_ + i);
        store(dz_ + i, dout * (s * (Real(1) + z * (Real(1) - s))));
        store(dy_ + i, dout * (z * s));
      }
      store(y_ + i, load(tile_.D + c) * load(tile_.u + i));
      store(dx_ + i, Vec<Real>{});
      store(dd_ + i, Vec<Real>{});
    });
  }

  template <bool kConstantB, bool kConstantC>
  void walk_back(const Real* before, const Walk& walk, const ScanSums& sums, const ScanSlice& slice,
                 Prefetch& prefetch) {
    const int64_t last = int64_t(tile_.count - 1) * kScanBlock, width = tile_.width;
    for_states<kStates>(p_.states, [&]<int kCount>(int n) {
      constexpr int group = kCount * kParts * kLanes<Real>;
      const int64_t number = int64_t(n) * kParts, last_number = number + (tile_.count - 1) * width;
      if (!kConstantB) __builtin_memset(dB_, 0, tile_.count * group * sizeof(Real));
      if (!kConstantC) __builtin_memset(dC_, 0, tile_.count * group * sizeof(Real));
      for (int c = 0; c < tile_.lanes; c += kLanes<Real>) {
        const int64_t row = number * kScanBlock + c;
        prefetch.step();
        tile_.with_bounds(c, [&]<bool kBounded>() {
          recompute_states<kBounded, Real, kParts, kConstantB, kCount>(
              tile_.count, tile_.exponent + row, tile_.d + c, tile_.x + c, tile_.B + (kConstantB ? row : number), width,
              before + row, decays_, history_);
        });
        backward_states<Real, kParts, kConstantB, kConstantC, kCount>(
            tile_.count,
            {.d = tile_.d + last + c,
             .x = tile_.x + last + c,
             .dy = dy_ + last + c,
             .B = tile_.B + (kConstantB ? row : last_number),
             .C = tile_.C + (kConstantC ? row : last_number),
             .y = y_ + last + c,
             .dx = dx_ + last + c,
             .dd = dd_ + last + c,
             .A = tile_.A + row,
             .dh = dh_ + row,
             .dB = dB_ + (tile_.count - 1) * group,
             .dC = dC_ + (tile_.count - 1) * group,
             .dA = sums.rows + row,
             .sum_B = sums.rows + ScanSums::dB(p_) * kScanBlock + row,
             .sum_C = sums.rows + ScanSums::dC(p_) * kScanBlock + row},
            width, decays_, history_);
      }
      if (!kConstantB) add_to_slice<kCount>(dB_, walk, number, static_cast<Real*>(slice.dB), slice.first, false);
      if (!kConstantC) add_to_slice<kCount>(dC_, walk, number, static_cast<Real*>(slice.dC), slice.first, kParts == 2);
    });
  }

  // Sums over the lanes, for every token the numbers of kCount states.
  template <int kCount>
  void add_to_slice(Real* vectors, const Walk& walk, int64_t number, Real* slice, bool first, bool double_conjugate) {
    constexpr int lanes = kLanes<Real>, numbers = kCount * kParts;
    const int all = tile_.count * numbers;
    Real* const sums = vectors;  // written behind what has been read
    for (int i = 0; i < all; i += lanes) {
      Vec<Real> rows[lanes];
      for (int j = 0; j < lanes; ++j) rows[j] = i + j < all ? load(vectors + int64_t(i + j) * lanes) : Vec<Real>{};
      transpose_rows<Real>(rows);
      Vec<Real> sum = rows[0];
      for (int j = 1; j < lanes; ++j) sum += rows[j];
      store(sums + i, sum);
    }
    if (double_conjugate) Tile::Parameters::double_conjugate(sums, all, 1);
    Real* to = slice + walk.row(tile_.begin) * tile_.width + number;
    for (int t = 0; t < tile_.count; ++t, to += walk.step * tile_.width) {
      for (int i = 0; i < numbers; ++i) to[i] = first ? sums[t * numbers + i] : to[i] + sums[t * numbers + i];
    }
  }

  void finish(const Walk& walk, const ScanSums& sums) {
    for (int c = 0; c < tile_.lanes; c += kLanes<Real>) {
      const Vec<Real> D = load(tile_.D + c);
      Vec<Real> dD{}, dbias{};
      for (int t = 0; t < tile_.count; ++t) {
        const int64_t i = t * kScanBlock + c;
        const Vec<Real> dy = load(dy_ + i), dx = load(dx_ + i), u = load(tile_.u + i);
        const Vec<Real> ddelta = (load(dd_ + i) + dx * u) * load(tile_.slope + i);
        dD += dy * u;
        dbias += ddelta;
        store(dx_ + i, dx * load(tile_.d + i) + D * dy);
        store(dd_ + i, ddelta);
        if (p_.z.data) store(dz_ + i, load(dz_ + i) * load(y_ + i));
      }
      add_to_sums<Real>(sums.rows + ScanSums::dD(p_) * kScanBlock + c, dD);
      add_to_sums<Real>(sums.rows + ScanSums::ddelta_bias(p_) * kScanBlock + c, dbias);
    }
    tile_.save(dx_, b_.du, walk);
    tile_.save(dd_, b_.ddelta, walk);
    if (p_.z.data) tile_.save(dz_, b_.dz, walk);
  }

  const ScanBackward& b_;
  const ScanProblem& p_;
  Tile tile_;
  Real *dy_, *y_, *dx_, *dd_, *z_, *dz_;
  Real *decays_, *history_;  // of the states that go together, for every token
  Real *dB_, *dC_;           // the same, not yet summed over the lanes
  Real* dh_;
  Real* noted_;  // states before each tile
};

}  // namespace packseq::PACKSEQ_ISA
