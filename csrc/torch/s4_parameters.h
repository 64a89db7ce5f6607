// The parameters that S4's spectrum and its recurrence share, and what must hold of them.
#pragma once
#include "torch/checks.h"

namespace packseq {

struct S4Parameters {
  const char* op;
  Tensor w, B, C, dt;
  OptionalTensor P;

  Argument named(const char* name, const Tensor& t) const { return {op, name, t}; }
  int64_t channels() const { return w.size(0); }
  int64_t poles() const { return w.size(1); }
  int64_t rank() const { return P ? P->size(0) : 0; }
  bool has_filters() const { return C.dim() == 3; }
  int64_t filters() const { return has_filters() ? C.size(0) : 1; }

  // All of them `complex`, dt of its parts' type, beside `like`.
  void check_all(ScalarType complex, const Argument& like) const;
  void make_contiguous();
};

void check_poles(const Argument&, int64_t poles);

}  // namespace packseq
