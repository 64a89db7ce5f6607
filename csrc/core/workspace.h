// Hands out pieces of a workspace; with a null base it only counts.
#pragma once
#include <cstddef>
#include <cstdint>

namespace packseq {

class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class X>
  X* take(int64_t count) {
    X* piece = base_ ? reinterpret_cast<X*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(X) + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace packseq
