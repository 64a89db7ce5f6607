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

PACKSEQ_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace packseq::PACKSEQ_ISA
