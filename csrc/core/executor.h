// Who runs a CPU operator's loops. The torch layer passes torch's thread pool; C++ tests the serial one.
#pragma once
#include <cstdint>

namespace packseq {

class Executor {
 public:
  // Runs body(context, begin, end) over disjoint ranges that together cover [0, count).
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

  // `threads` is how many ranges can run at once: work is cut finely enough to feed that many.
  Executor(ParallelFor run, int threads) : run_(run), threads_(threads) {}

  static Executor serial() {
    return {[](int64_t count, int64_t, Body body, void* context) {
              if (count > 0) body(context, 0, count);
            },
            1};
  }

  int threads() const { return threads_; }

  // f(begin, end), over ranges of at least `grain` items where there are that many.
  template <class F>
  void parallel_for(int64_t count, int64_t grain, const F& f) const {
    run_(
        count, grain, [](void* c, int64_t b, int64_t e) { (*static_cast<const F*>(c))(b, e); }, const_cast<F*>(&f));
  }

 private:
  ParallelFor run_;
  int threads_;
};

}  // namespace packseq
