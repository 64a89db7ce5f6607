// Pieces of work of very different size, shared out among threads: the largest first, to whoever is free. Which thread
// does what varies from run to run, so every piece must own what it writes.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/executor.h"

namespace packseq {

template <class Item>
class WorkList {
 public:
  // cost: about the number of multiply-adds
  void add(const Item& item, double cost) { entries_.push_back({item, cost}); }

  // How many workers run() will start: no more than the work is worth.
  int workers(const Executor& executor, int64_t copies) const {
    double total = 0;
    for (const Entry& e : entries_) total += e.cost * copies;
    const int64_t worth = 1 + int64_t(std::min(total / kWorkerCost, 1e6));
    return int(std::min<int64_t>({executor.threads(), worth, std::max<int64_t>(1, int64_t(entries_.size()) * copies)}));
  }

  // Piece `copy` of `item`.
  struct Piece {
    const Item* item = nullptr;  // nullptr: none
    int64_t copy = 0;
  };

  // f(piece, next, worker) once for every item and every copy in 0 .. copies; worker is in 0 .. workers, and `next` is
  // what the worker does after this, so that it can fetch the data early.
  template <class F>
  void run(const Executor& executor, int workers, int64_t copies, const F& f) {
    sort();
    const std::vector<int64_t> ends = chunk_ends(workers, copies);
    std::atomic<int64_t> next = 0;
    const auto piece = [&](int64_t i) {
      return i < int64_t(entries_.size()) * copies ? Piece{&entries_[i / copies].item, i % copies} : Piece{};
    };
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    const int64_t chunks = int64_t(ends.size());
    const auto work = [&](int64_t worker) {
      for (int64_t chunk = take(), following; chunk < chunks; chunk = following) {
        following = take();
        for (int64_t i = chunk ? ends[chunk - 1] : 0; i < ends[chunk]; ++i) {
          const bool last = i + 1 == ends[chunk];
          f(piece(i), !last ? piece(i + 1) : following < chunks ? piece(ends[following - 1]) : Piece{}, worker);
        }
      }
    };
    if (workers == 1) {
      work(0);
    } else {
      executor.parallel_for(workers, 1, [&](int64_t begin, int64_t) { work(begin); });
    }
  }

 private:
  struct Entry {
    Item item;
    double cost;
  };

  static constexpr double kWorkerCost = 1 << 20;  // below this, waking a thread costs more than it saves
  static constexpr double kChunkCost = 1 << 18;
  static constexpr int kChunksPerWorker = 64;

  // Largest first, to the nearest power of two: one pass over the list, in whatever order it came.
  void sort() {
    constexpr int kClasses = 64;
    const auto size_class = [](double cost) { return kClasses - 1 - std::clamp(std::ilogb(cost), 0, kClasses - 1); };
    std::vector<int64_t> at(kClasses + 1);
    for (const Entry& e : entries_) ++at[size_class(e.cost) + 1];
    for (int c = 0; c < kClasses; ++c) at[c + 1] += at[c];
    std::vector<Entry> sorted(entries_.size());
    for (const Entry& e : entries_) sorted[at[size_class(e.cost)]++] = e;
    entries_.swap(sorted);
  }

  // Small pieces are taken many at a time.
  std::vector<int64_t> chunk_ends(int workers, int64_t copies) const {
    double total = 0;
    for (const Entry& e : entries_) total += e.cost * copies;
    const double chunk = std::max(kChunkCost, total / (double(workers) * kChunksPerWorker));
    std::vector<int64_t> ends;
    double cost = 0;
    const int64_t count = int64_t(entries_.size()) * copies;
    for (int64_t i = 0; i < count; ++i) {
      cost += entries_[i / copies].cost;
      if (cost < chunk && i + 1 < count) continue;
      ends.push_back(i + 1);
      cost = 0;
    }
    return ends;
  }

  std::vector<Entry> entries_;
};

}  // namespace packseq
