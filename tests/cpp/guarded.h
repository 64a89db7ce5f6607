// Buffers between guard bands, and host copies of the half types.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/dtype.h"

namespace packseq::testing {

// Memory of `bytes` bytes filled with NaNs (all bits set), between bands that check() finds untouched or not.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kBand, kGuard) {
    std::memset(data(), 0xff, bytes);
  }
  char* data() { return memory_.data() + kBand; }
  const char* data() const { return memory_.data() + kBand; }
  size_t bytes() const { return bytes_; }

  bool intact() const {
    for (size_t i = 0; i < kBand; ++i) {
      if (memory_[i] != kGuard || memory_[kBand + bytes_ + i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBand = 4096;
  static constexpr char kGuard = 0x5a;
  size_t bytes_;
  std::vector<char> memory_;
};

inline float half_to_float(uint16_t h, Dtype t) {
  if (t == Dtype::bf16) {
    const uint32_t u = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? __builtin_nanf("") : sign * __builtin_inff();
  return sign * (exponent ? __builtin_ldexpf(1024.f + mantissa, exponent - 25) : __builtin_ldexpf(mantissa, -24));
}

// To the nearest value, ties to even, by looking at both neighbours; for finite values in range.
inline uint16_t float_to_half(double x, Dtype t) {
  const uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
  const double magnitude = x < 0 ? -x : x;
  uint16_t low = 0, high = t == Dtype::bf16 ? 0x7f80 : 0x7c00;  // value(low) <= magnitude < value(high)
  while (high - low > 1) {
    const uint16_t middle = uint16_t((low + high) / 2);
    (half_to_float(middle, t) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - half_to_float(low, t), above = half_to_float(high, t) - magnitude;
  const bool up = above < below || (above == below && (low & 1));
  return sign | (up ? high : low);
}

inline double read(const void* p, int64_t i, Dtype t) {
  switch (t) {
    case Dtype::f64:
      return static_cast<const double*>(p)[i];
    case Dtype::f32:
      return static_cast<const float*>(p)[i];
    default:
      return half_to_float(static_cast<const uint16_t*>(p)[i], t);
  }
}

inline void write(void* p, int64_t i, Dtype t, double x) {
  switch (t) {
    case Dtype::f64:
      static_cast<double*>(p)[i] = x;
      break;
    case Dtype::f32:
      static_cast<float*>(p)[i] = float(x);
      break;
    default:
      static_cast<uint16_t*>(p)[i] = x != x ? 0x7fff : float_to_half(x, t);
  }
}

}  // namespace packseq::testing
