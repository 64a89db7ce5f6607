// Element types of tensors as the core sees them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace packseq {

enum class Dtype : int { f16, bf16, f32, f64 };

constexpr size_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

constexpr const char* name_of(Dtype t) {
  return t == Dtype::f16 ? "float16" : t == Dtype::bf16 ? "bfloat16" : t == Dtype::f32 ? "float32" : "float64";
}

}  // namespace packseq
