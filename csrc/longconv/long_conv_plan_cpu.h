// How the long convolution's work is laid out on the CPU: sequences in the order of their lengths, the transform that
// each length takes, and the transforms' factors.
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <deque>
#include <limits>
#include <numbers>
#include <utility>
#include <vector>

#include "core/cpu/memory.h"
#include "core/cpu/work_list.h"
#include "core/divide_up.h"
#include "longconv/long_conv_kernels_cpu.h"

namespace packseq {

// exp(2 pi i n / count) for whole n, by two tables and one product. count is a multiple of 8.
class RootsOfUnity {
 public:
  explicit RootsOfUnity(int64_t count) : count_(count) {
    while ((int64_t(1) << 2 * shift_) < count) ++shift_;
    for (int64_t n = 0; n < int64_t(1) << shift_; ++n) low_.push_back(root(n));
    for (int64_t n = 0; n < count; n += int64_t(1) << shift_) high_.push_back(root(n));
  }

  std::complex<double> operator()(int64_t n) const {
    const std::complex<double> a = high_[size_t(n >> shift_)], b = low_[size_t(n & ((int64_t(1) << shift_) - 1))];
    return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
  }

 private:
  // From an angle of at most pi / 4, which is as exact as a double can be.
  std::complex<double> root(int64_t n) const {
    n %= count_;
    const int64_t quarters = (n + count_ / 8) / (count_ / 4);
    const double angle = 2 * std::numbers::pi * double(n - quarters * (count_ / 4)) / double(count_);
    const double c = std::cos(angle), s = std::sin(angle);
    switch (quarters % 4) {
      case 0:
        return {c, s};
      case 1:
        return {-s, c};
      case 2:
        return {-c, -s};
      default:
        return {s, -c};
    }
  }

  int64_t count_;
  int shift_ = 0;
  std::vector<std::complex<double>> low_, high_;
};

// The number of points, `least` or more, that is cheapest to transform: 4 times powers of 2, 3 and 5. More than 4.
inline int64_t transform_points(int64_t least) {
  // Time of a pass for a point.
  constexpr double two = 0.8, three = 1, four = 1, five = 1.3;
  double best_cost = std::numeric_limits<double>::infinity();
  int64_t best = 0;
  int fives = 0;
  for (int64_t c = 1; c <= least; c *= 5, ++fives) {
    int threes = 0;
    for (int64_t b = c; b <= least; b *= 3, ++threes) {
      int64_t points = FftPlan::kLastRadix * b;
      int twos = 0;
      for (; points < least || points == FftPlan::kLastRadix; points *= 2) ++twos;
      const double passes = (1 + twos / 2) * four + twos % 2 * two + threes * three + fives * five;
      if (double(points) * passes < best_cost) best_cost = double(points) * passes, best = points;
    }
  }
  return best;
}

// The passes of a transform: large ones first, and the one by 2 where few points are left to go through.
inline FftPlan plan_of(int64_t points) {
  FftPlan plan{};
  plan.points = points;
  int64_t rest = points / FftPlan::kLastRadix;
  for (const int radix : {4, 5, 3, 2}) {
    for (; rest % radix == 0; rest /= radix) plan.radix[plan.levels++] = radix;
  }
  plan.radix[plan.levels++] = FftPlan::kLastRadix;
  return plan;
}

// Fills the factors of a plan, 2 `points` numbers, at which it then points. A block of roots exp(2 pi i t / (4 blocks))
// has parts exp(2 pi i (t + 4 blocks j) / (4 blocks radix)); the first block is that of i, t = 1.
template <class Real>
void make_factors(FftPlan& plan, void* memory) {
  Real* next = static_cast<Real*>(memory);
  const RootsOfUnity root(4 * plan.points);
  std::vector<int64_t> blocks = {1}, parts;
  for (int level = 0; level < plan.levels; ++level) {
    const int radix = plan.radix[level];
    const int64_t count = int64_t(blocks.size()), stride = plan.points / (count * radix);
    plan.factors[level] = next;
    parts.clear();
    for (const int64_t t : blocks) {
      for (int m = 1; m < radix; ++m) {
        const std::complex<double> factor = root(m * t * stride % (4 * plan.points));
        *next++ = Real(factor.real());
        *next++ = Real(factor.imag());
      }
      for (int j = 0; j < radix; ++j) parts.push_back(t + 4 * count * j);
    }
    blocks.swap(parts);
  }
}

// Everything that the kernels need to know about the sequences. Empty ones are left out.
class LongConvPlan {
 public:
  LongConvPlan(const LongConvProblem& p, const Executor& executor) : problem_(p) {
    std::vector<std::pair<int64_t, int64_t>> order;  // length, number
    for (int64_t i = 0; i < p.sequences; ++i) {
      const int64_t length = span_of(p.cu_seqlens, p.sequences, p.total, i).size();
      if (length > 0) order.emplace_back(length, i);
    }
    std::sort(order.begin(), order.end());
    for (const auto& [length, i] : order) {
      sequences_.push_back({span_of(p.cu_seqlens, p.sequences, p.total, i), size_for(length)});
    }
    make_all_factors(executor);
  }

  const std::vector<LongConvSequence>& sequences() const { return sequences_; }
  int64_t tile() const { return long_conv_tile(problem_.dtype); }
  int64_t tiles() const { return divide_up(problem_.channels, tile()); }

  // Sequences first .. last in the order of their lengths.
  struct Run {
    int64_t first, last, number;
    double cost;  // multiply-adds for a tile
  };

  // About `count` runs of nearly equal cost.
  std::vector<Run> runs(int64_t count) const {
    double total = 0;
    for (const LongConvSequence& s : sequences_) total += cost(s);
    const double enough = std::max(total / double(count), double(1 << 20));
    std::vector<Run> runs;
    Run run = {};
    for (int64_t i = 0; i < int64_t(sequences_.size()); ++i) {
      run.cost += cost(sequences_[size_t(i)]);
      run.last = i + 1;
      if (run.cost < enough && run.last < int64_t(sequences_.size())) continue;
      runs.push_back(run);
      run = {.first = run.last, .last = run.last, .number = run.number + 1, .cost = 0};
    }
    return runs;
  }

  // Of the run's largest transform.
  int64_t points(const Run& run) const { return sequences_[size_t(run.last - 1)].size->plan.points; }

  LongConvPiece piece(const Run& run, int64_t tile_number) const {
    const int64_t channel = tile_number * tile();
    return {sequences_.data() + run.first,
            sequences_.data() + run.last,
            {channel, std::min(channel + tile(), problem_.channels)}};
  }

 private:
  int64_t taps_after() const { return problem_.k_after ? problem_.taps_after : 0; }

  // Lengths come in ascending order. So that nothing wraps around into the sequence, twice the points must be its
  // length and the taps that reach from one of its rows to another.
  const LongConvSize* size_for(int64_t length) {
    const int64_t reach = std::max(std::min(problem_.taps - 1, length - 1), std::min(taps_after(), length - 1));
    const int64_t least = length <= kDirectRows ? 0 : (length + reach + 1) / 2;
    if (!sizes_.empty() && sizes_.back().plan.points >= least) return &sizes_.back();
    LongConvSize& size = sizes_.emplace_back();
    if (least > 0) size.plan = plan_of(transform_points(least));
    const int64_t points = least > 0 ? size.plan.points : kDirectRows;
    size.taps = std::min(problem_.taps, points);
    size.taps_after = std::min(taps_after(), points);
    return &size;
  }

  void make_all_factors(const Executor& executor) {
    constexpr double point_cost = 2048;  // in the kernels' multiply-adds: about 50 ns, one by one
    const bool f64 = problem_.dtype == Dtype::f64;
    struct Place {
      FftPlan* plan;
      char* memory;
    };
    WorkList<Place> work;
    for (LongConvSize& size : sizes_) {
      const int64_t points = size.plan.points;
      if (points == 0) continue;
      factors_.emplace_back(1, size_t(2 * points) * (f64 ? sizeof(double) : sizeof(float)));
      work.add({&size.plan, factors_.back()[0]}, point_cost * double(points));
    }
    using Piece = WorkList<Place>::Piece;
    work.run(executor, work.workers(executor, 1), 1, [&](const Piece& piece, const Piece&, int64_t) {
      const auto& [plan, memory] = *piece.item;
      f64 ? make_factors<double>(*plan, memory) : make_factors<float>(*plan, memory);
    });
  }

  double cost(const LongConvSequence& s) const {
    const double length = double(s.rows.size()), points = double(s.size->plan.points);
    const double row = points > 0 ? 8 * points / length * (2 + s.size->plan.levels) : 16 + length / 2;
    return row * length * double(tile());
  }

  LongConvProblem problem_;
  std::vector<LongConvSequence> sequences_;
  std::deque<LongConvSize> sizes_;
  std::vector<AlignedMemory> factors_;
};

}  // namespace packseq
