// Global memory under a predicate instead of a branch, so that what stands around an access can be moved past it.
#pragma once
#include <cstdint>

namespace packseq {

// kBytes is 2, 4 or 8, in the low bits of words; no access where `valid` is false.
template <int kBytes>
__device__ __forceinline__ void store_guarded(void* p, const uint32_t (&word)[(kBytes + 3) / 4], bool valid) {
  if constexpr (kBytes == 2) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u16 [%0], %1;}" ::"l"(p), "h"(uint16_t(word[0])),
                 "r"(uint32_t(valid))
                 : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.u32 [%0], %1;}" ::"l"(p), "r"(word[0]),
                 "r"(uint32_t(valid))
                 : "memory");
  } else {
    static_assert(kBytes == 8);
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2};}" ::"l"(p), "r"(word[0]),
                 "r"(word[1]), "r"(uint32_t(valid))
                 : "memory");
  }
}

// a where `first` holds, else b: never a branch.
__device__ __forceinline__ float select(bool first, float a, float b) {
  float x;
  asm("{.reg .pred p; setp.ne.u32 p, %3, 0; selp.f32 %0, %1, %2, p;}" : "=f"(x) : "f"(a), "f"(b), "r"(uint32_t(first)));
  return x;
}

}  // namespace packseq
