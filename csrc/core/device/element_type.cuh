// From a tensor's dtype to the type that its elements have on the GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "core/dispatch.h"
#include "core/dtype.h"

namespace packseq {

// f(std::type_identity<T>{}); float64 is for the CPU only.
template <class F>
void with_element_type(Dtype dtype, const F& f) {
  dispatch<Dtype::f16, Dtype::bf16, Dtype::f32>("dtype", dtype, [&](auto t) {
    using Half = std::conditional_t<t == Dtype::f16, __half, __nv_bfloat16>;
    f(std::type_identity<std::conditional_t<t == Dtype::f32, float, Half>>{});
  });
}

}  // namespace packseq
