// The scan forward, of one sequence in one block of channels: tile by tile, and in a tile a few states at a time, which
// stay in registers while all the tile's tokens go by.
#pragma once
#include "scan/scan_tile_cpu.h"

namespace packseq::PACKSEQ_ISA {

// Carries kStates states of one vector of channels over the tokens of a tile. Pointers are to the first of these.
template <bool kBounded, class Real, int kParts, bool kConstantB, bool kConstantC, int kStates>
__attribute__((noinline)) void forward_states(int count, const Real* exponents, const Real* d, const Real* x,
                                              const Real* B, const Real* C, int64_t width, Real* states, Real* y) {
  using N = Number<Real, kParts>;
  constexpr int row = kParts * kScanBlock;
  constexpr int b = kConstantB ? row : kParts, c = kConstantC ? row : kParts;
  N exponent[kStates], h[kStates];
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) {
    exponent[s] = load_number<Real, kParts>(exponents + s * row, kScanBlock);
    h[s] = load_number<Real, kParts>(states + s * row, kScanBlock);
  }
  for (int t = 0; t < count; ++t) {
    const Vec<Real> step = load(d), input = load(x);
    Vec<Real> sum{};
    PACKSEQ_UNROLL
    for (int s = 0; s < kStates; ++s) {
      const N a = decay_of<kBounded, Real, kParts>(step, exponent[s]);
      advance<Real, kParts>(h[s], a, input, load_coefficient<kConstantB, Real, kParts>(B + s * b));
      sum = add_products<Real, kParts>(sum, load_coefficient<kConstantC, Real, kParts>(C + s * c), h[s]);
    }
    store(y, load(y) + sum);
    d += kScanBlock, x += kScanBlock, y += kScanBlock;
    if (!kConstantB) B += width;
    if (!kConstantC) C += width;
  }
  PACKSEQ_UNROLL
  for (int s = 0; s < kStates; ++s) store_number<Real, kParts>(states + s * row, kScanBlock, h[s]);
}

template <class T, int kParts>
class ForwardScan {
  using Tile = ScanTile<T, kParts>;
  using Real = typename Tile::Real;
  static constexpr int kStates = kParts == 2 ? 2 : 4;

 public:
  ForwardScan(const ScanProblem& p, const typename Tile::Parameters& parameters, int64_t block, Scratch& s)
      : p_(p), tile_(p, parameters, block, s), h_(s.take<Real>(tile_.width * kScanBlock)), y_(s.take<Real>(kTileSize)) {
    z_ = s.take<Real>(kTileSize);
  }

  void run(const ScanSequence& sequence, void* out) {
    const int64_t at = tile_.block.first * tile_.width;
    if (sequence.initial) {
      load_states(static_cast<const Real*>(sequence.initial) + at, tile_.block.channels, tile_.width, h_);
    } else {
      __builtin_memset(h_, 0, tile_.width * kScanBlock * sizeof(Real));
    }
    const Walk walk(sequence.rows, p_.reverse);
    for (int64_t begin = 0; begin < walk.length; begin += kScanTile) {
      tile_.load_inputs(walk, begin);
      tile_.load_C(walk);
      start_sums();
      Prefetch prefetch;
      const int64_t next = begin + kScanTile;
      tile_.ask(prefetch, p_.u, walk, next), tile_.ask(prefetch, p_.delta, walk, next);
      tile_.ask(prefetch, p_.z, walk, next), tile_.ask(prefetch, tile_.contiguous(out), walk, next);
      prefetch.spread(tile_.prefetch_steps());
      with_matrices(p_, [&]<bool kConstantB, bool kConstantC>() { walk_tile<kConstantB, kConstantC>(prefetch); });
      if (p_.z.data) gate(walk);
      tile_.save(y_, out, walk);
    }
    if (sequence.final) {
      store_states(h_, tile_.block.channels, tile_.width, static_cast<Real*>(sequence.final) + at);
    }
  }

 private:
  void start_sums() {  // y = D u, to which the states' parts are added
    tile_.for_vectors([&](int64_t i, int c)
                          __attribute__((always_inline)) { store(y_ + i, load(tile_.D + c) * load(tile_.u + i)); });
  }

  template <bool kConstantB, bool kConstantC>
  void walk_tile(Prefetch& prefetch) {
    for (int c = 0; c < tile_.lanes; c += kLanes<Real>) {
      tile_.with_bounds(c, [&]<bool kBounded>() {
        for_states<kStates>(p_.states, [&]<int kCount>(int n) {
          const int64_t number = int64_t(n) * kParts, row = number * kScanBlock + c;
          prefetch.step();
          forward_states<kBounded, Real, kParts, kConstantB, kConstantC, kCount>(
              tile_.count, tile_.exponent + row, tile_.d + c, tile_.x + c, tile_.B + (kConstantB ? row : number),
              tile_.C + (kConstantC ? row : number), tile_.width, h_ + row, y_ + c);
        });
      });
    }
  }

  void gate(const Walk& walk) {
    tile_.fetch(p_.z, walk, z_);
    tile_.for_vectors([&](int64_t i, int) __attribute__((always_inline)) {
      const Vec<Real> z = load(z_ + i);
      store(y_ + i, load(y_ + i) * (z * sigmoid<Real>(z)));
    });
  }

  const ScanProblem& p_;
  Tile tile_;
  Real *h_, *y_, *z_;
};

}  // namespace packseq::PACKSEQ_ISA
