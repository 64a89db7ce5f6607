// Rows of packed tensors lie far apart, where the hardware does not see them coming. This asks for the rows that are
// needed next, a few at a time while something else is computed.
#pragma once
#include "core/cpu/vector.h"

namespace packseq::PACKSEQ_ISA {

class Prefetch {
 public:
  // count rows of row_bytes each, stride bytes apart.
  void add(const void* first, int64_t stride, int64_t count, int64_t row_bytes) {
    if (count <= 0 || used_ == kMost) return;
    rows_[used_++] = {static_cast<const char*>(first), stride, count, row_bytes};
    total_ += count;
  }

  // Spreads what was added over that many steps.
  void spread(int64_t steps) { rate_ = steps > 0 ? (total_ + steps - 1) / steps : 0; }

  PACKSEQ_INLINE void step() {
    for (int64_t i = 0; i < rate_ && at_ < used_; ++i) one_row();
  }

 private:
  static constexpr int kMost = 8, kLine = 64;
  struct Rows {
    const char* first;
    int64_t stride, count, bytes;
  };

  PACKSEQ_INLINE void one_row() {
    Rows& r = rows_[at_];
    for (int64_t b = 0; b < r.bytes; b += kLine) __builtin_prefetch(r.first + b, 0, 2);
    r.first += r.stride;
    if (--r.count == 0) ++at_;
  }

  Rows rows_[kMost];
  int used_ = 0, at_ = 0;
  int64_t total_ = 0, rate_ = 0;
};

}  // namespace packseq::PACKSEQ_ISA
