// Memory on the host's side of the CPU operators.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "core/packed.h"

namespace packseq {

// Equal pieces of memory, each from the beginning of a page on, not cleared. The last one ends where it was asked to,
// so that a sanitizer sees who goes beyond.
class AlignedMemory {
 public:
  AlignedMemory(int64_t pieces, size_t bytes) : bytes_((bytes + kPageBytes - 1) / kPageBytes * kPageBytes) {
    const size_t all = pieces > 0 ? size_t(pieces - 1) * bytes_ + bytes : 0;
    memory_.reset(static_cast<char*>(::operator new(all, kPage)));
  }
  char* operator[](int64_t piece) const { return memory_.get() + size_t(piece) * bytes_; }

 private:
  static constexpr size_t kPageBytes = 4096;
  static constexpr std::align_val_t kPage{kPageBytes};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kPage); }
  };
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

// Rows of a contiguous tensor, which may be nullptr, become zeros: those that no sequence owns.
inline void zero_rows(void* x, const Span& rows, size_t row_bytes) {
  if (x && rows.size() > 0) std::memset(static_cast<char*>(x) + rows.begin * row_bytes, 0, rows.size() * row_bytes);
}

}  // namespace packseq
