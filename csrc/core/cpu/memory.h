// Memory on the host's side of the CPU operators.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

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

}  // namespace packseq
