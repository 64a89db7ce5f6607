// Cuts one piece of memory into aligned arrays. Without memory it only counts, which gives the size to ask for.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/cpu/vector.h"

namespace packseq::PACKSEQ_ISA {

class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    char* const p = memory_ ? memory_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

PACKSEQ_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PACKSEQ_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
PACKSEQ_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Elements from one row to the next: an odd number of cache lines, so that rows read together do not compete for the
// same places of the first-level cache.
template <class T>
PACKSEQ_INLINE int64_t row_stride(int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((dim + line - 1) / line | 1) * line;
}

}  // namespace packseq::PACKSEQ_ISA
