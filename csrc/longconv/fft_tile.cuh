// Fourier transforms of real signals by a team of threads, several neighbouring channels at a time.
//
// 2 kSize real numbers x are transformed as kSize complex ones, z[n] = x[2 n] + i x[2 n + 1]. Thread (j, channel) of a
// team holds 32 of them in registers, all of one channel; they change hands through shared memory, where the channel
// is the fastest index. With kSize = kFirst * kSecond * 16 and indices cut as
//
//   n = b + (kSize / kFirst) i            b = b2 + 16 i2
//   k = k1 + kFirst k2 + kColumns m       kColumns = kFirst * kSecond
//
// the forward transform goes over i (giving k1), over i2 (giving k2) and over b2 (giving m). The inverse goes the same
// way back and leaves every number where the forward one had it, so nothing is ever reordered, and a thread writes only
// to places that it was the last to read.
//
// Frequencies k and kSize - k belong together: from both come two values of the real signal's spectrum. They lie in the
// columns c = k mod kColumns and kColumns - c, so thread j's last transforms are of columns j and kColumns - j, and the
// spectrum needs no exchange. Thread 0's columns, 0 and kColumns / 2, are their own partners; it puts its values into
// the same order as the others'. A spectrum in registers is then
//
//   v[i] = 2 X[k], v[31 - i] = conj(2 X[kSize - k])      k = j + kColumns i, i < 16
//
// up to thread 0's own order and its v[0], which is two real numbers: 2 X[0] and 2 X[kSize]. Products of spectra are
// element by element.
#pragma once
#include "core/device/fft.cuh"
#include "core/device/named_barrier.cuh"
#include "core/device/opaque.cuh"

namespace packseq::longconv {

using fft::conjugate;
using fft::multiply_add;
using fft::operator+;
using fft::operator-;
using fft::operator*;

constexpr int kPoints = 32;  // complex numbers of a thread
constexpr int kLargestSize = 4096;
constexpr int kTableSize = 2 * kLargestSize;  // the table of roots: exp(-2 pi i m / kTableSize)

__device__ __forceinline__ float4 join(float2 a, float2 b) { return {a.x, a.y, b.x, b.y}; }

// The factors of each size. A second factor of 2 is worked together with the last one.
template <int kSize>
struct Factors;
template <>
struct Factors<128> {
  static constexpr int first = 8, second = 1;
};
template <>
struct Factors<256> {
  static constexpr int first = 16, second = 1;
};
template <>
struct Factors<512> {
  static constexpr int first = 32, second = 1;
};
template <>
struct Factors<1024> {
  static constexpr int first = 32, second = 2;
};
template <>
struct Factors<2048> {
  static constexpr int first = 16, second = 8;
};
template <>
struct Factors<4096> {
  static constexpr int first = 16, second = 16;
};

template <int kSize_, int kChannels_>
struct FftTile {
  static constexpr int kSize = kSize_, kChannels = kChannels_;
  static constexpr int kFirst = Factors<kSize>::first, kSecond = Factors<kSize>::second;
  static constexpr int kColumns = kFirst * kSecond, kLines = kSize / kPoints, kThreads = kLines * kChannels;
  static constexpr int kRest = kSize / kFirst, kStride = kRest + 1;  // odd, for the banks
  static constexpr int kShared = kFirst * kStride * kChannels;       // complex numbers
  static constexpr int kSlots = kPoints / 2;                         // pairs of complex numbers of a thread
  static_assert(kColumns * 16 == kSize && kThreads % 32 == 0);

  float4* shared;       // [teams, kFirst, kStride, kChannels] complex numbers, behind opaque()'s zero
  const float2* table;  // [kTableSize]
  int team, j, channel;

  __device__ FftTile(float4* shared_, const float2* table_) : shared(shared_), table(table_) {
    const int thread = opaque(int(threadIdx.x), shared);
    team = thread / kThreads, j = thread % kThreads / kChannels, channel = thread % kChannels;
  }
  // The same: every step of a transform finds its addresses by itself, or they would all be kept in registers.
  __device__ FftTile renewed() const { return FftTile(shared, table); }

  __device__ void wait() const { named_barrier(opaque(int(threadIdx.x), shared) / kThreads + 1, kThreads); }
  __device__ float2& at(int k1, int b) const {
    return reinterpret_cast<float2*>(shared)[team * kShared + (k1 * kStride + b) * kChannels + channel];
  }

  // The number of which element `place` of the registers is z[n], before the transform and after the inverse.
  __device__ int number(int place) const { return j + kLines * (place / kFirst) + kRest * (place % kFirst); }

  // From z to pairs of partners. kPadded: the upper half of z is zero, and not looked at.
  template <bool kPadded>
  __device__ void forward_to_pairs(float2 (&v)[kPoints]) const {
    renewed().template first_forward<kPadded>(v);
    wait();
    if constexpr (kSecond > 2) {
      renewed().template second<-1>(v);
      wait();
    }
    renewed().read_columns(v);
    if constexpr (kSecond == 2) wait();  // two threads read each column
    fft::transform<16, -1>(v);
    fft::transform<16, -1>(v + 16);
    renewed().to_pairs(v);
  }

  // From pairs of partners back to z, kSize times as large. kLower: only the lower half of z is wanted.
  template <bool kLower>
  __device__ void inverse_of_pairs(float2 (&v)[kPoints]) const {
    renewed().from_pairs(v);
    fft::transform<16, 1>(v);
    fft::transform<16, 1>(v + 16);
    renewed().write_columns(v);
    wait();
    if constexpr (kSecond > 2) {
      renewed().template second<1>(v);
      wait();
    }
    renewed().template first_inverse<kLower>(v);
    if constexpr (kSecond == 2) wait();  // what others still read is written next
  }

  // From z to the spectrum, and from a spectrum to z, 4 kSize times as large.
  template <bool kPadded>
  __device__ void forward(float2 (&v)[kPoints]) const {
    forward_to_pairs<kPadded>(v);
    const FftTile tile = renewed();
    const Shifts shifts = tile.shifts();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) tile.unpack(v[i], v[kPoints - 1 - i], i, shifts(i));
  }
  template <bool kLower>
  __device__ void inverse(float2 (&v)[kPoints]) const {
    const FftTile tile = renewed();
    const Shifts shifts = tile.shifts();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) tile.pack(v[i], v[kPoints - 1 - i], i, shifts(i));
    inverse_of_pairs<kLower>(v);
  }

  // From z of x to z of the convolution of x with a filter, 4 kSize times as large. Upper halves are zero, and not
  // wanted. find_filter() says where the filter's spectrum [kSlots, kLines, channels] of this channel is, and how many
  // channels there are; a channel that does not exist has none.
  template <class FindFilter>
  __device__ void convolve(float2 (&v)[kPoints], bool exists, const FindFilter& find_filter) const {
    forward_to_pairs<true>(v);
    const FftTile tile = renewed();
    auto [filter, next] = find_filter();
    filter += int64_t(tile.j) * next, next *= kLines;
    const Shifts shifts = tile.shifts();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float4 k = exists ? *filter : float4{};
      filter += next;
      const float2 shift = shifts(i);
      float2 &a = v[i], &b = v[kPoints - 1 - i];
      tile.unpack(a, b, i, shift);
      a = tile.two_reals(i) ? float2{a.x * k.x, a.y * k.y} : a * float2{k.x, k.y};
      b = b * float2{k.z, k.w};
      tile.pack(a, b, i, shift);
    }
    inverse_of_pairs<true>(v);
  }

  // conj(a) b + c of places i and 31 - i.
  __device__ float4 correlate(const float2 (&a)[kPoints], const float2 (&b)[kPoints], float4 c, int i) const {
    const int last = kPoints - 1 - i;
    const float2 first = two_reals(i) ? float2{fmaf(a[i].x, b[i].x, c.x), fmaf(a[i].y, b[i].y, c.y)}
                                      : fft::conjugate_multiply_add(a[i], b[i], {c.x, c.y});
    return join(first, fft::conjugate_multiply_add(a[last], b[last], {c.z, c.w}));
  }

 private:
  template <bool kPadded>
  __device__ void first_forward(float2 (&v)[kPoints]) const {
#pragma unroll
    for (int s = 0; s < kPoints / kFirst; ++s) {
      const int b = j + kLines * s;
      float2* const w = v + s * kFirst;
      if constexpr (kPadded) {
        fft::transform_lower_half<kFirst, -1>(w);
      } else {
        fft::transform<kFirst, -1>(w);
      }
      fft::multiply_powers<kFirst, -1>(w, table, b * (kTableSize / kSize));
#pragma unroll
      for (int k1 = 0; k1 < kFirst; ++k1) at(k1, b) = w[k1];
    }
  }

  template <bool kLower>
  __device__ void first_inverse(float2 (&v)[kPoints]) const {
#pragma unroll
    for (int s = 0; s < kPoints / kFirst; ++s) {
      const int b = j + kLines * s;
      float2* const w = v + s * kFirst;
#pragma unroll
      for (int k1 = 0; k1 < kFirst; ++k1) {
        if constexpr (kSecond == 2) {
          const float2 even = at(k1, b % 16), odd = at(k1, b % 16 + 16);
          w[k1] = b < 16 ? even + odd : even - odd;
        } else {
          w[k1] = at(k1, b);
        }
      }
      fft::multiply_powers<kFirst, 1>(w, table, b * (kTableSize / kSize));
      if constexpr (kLower) {
        fft::transform_to_lower_half<kFirst, 1>(w);
      } else {
        fft::transform<kFirst, 1>(w);
      }
    }
  }

  __device__ bool two_reals(int place) const { return place == 0 && j == 0; }

  template <int kSign>
  __device__ void second(float2 (&v)[kPoints]) const {
#pragma unroll
    for (int s = 0; s < kPoints / kSecond; ++s) {
      // Two transforms of 16 share their powers, and there are no registers to keep them in.
      const int q = (kSecond == 16 ? renewed().j : j) + kLines * s, k1 = q / 16, b2 = q % 16;
      float2* const w = v + s * kSecond;
#pragma unroll
      for (int i = 0; i < kSecond; ++i) w[i] = at(k1, b2 + 16 * i);
      if constexpr (kSign > 0) fft::multiply_powers<kSecond, kSign>(w, table, b2 * (kTableSize / kRest));
      fft::transform<kSecond, kSign>(w);
      if constexpr (kSign < 0) fft::multiply_powers<kSecond, kSign>(w, table, b2 * (kTableSize / kRest));
#pragma unroll
      for (int i = 0; i < kSecond; ++i) at(k1, b2 + 16 * i) = w[i];
    }
  }

  __device__ int other_column() const { return j == 0 ? kColumns / 2 : kColumns - j; }

  __device__ void read_columns(float2 (&v)[kPoints]) const {
    if constexpr (kSecond == 2) {
      const int k1 = (kFirst - j) % kFirst;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        v[b] = at(j, b) + at(j, b + 16);
        v[16 + b] = fft::turn<-1>(at(k1, b) - at(k1, b + 16), b);
      }
    } else {
      const int other = other_column();
#pragma unroll
      for (int b = 0; b < 16; ++b) v[b] = at(j % kFirst, 16 * (j / kFirst) + b);
#pragma unroll
      for (int b = 0; b < 16; ++b) v[16 + b] = at(other % kFirst, 16 * (other / kFirst) + b);
    }
  }

  __device__ void write_columns(float2 (&v)[kPoints]) const {
    if constexpr (kSecond == 2) {
      const int k1 = (kFirst - j) % kFirst;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        at(j, b) = v[b];
        at(k1, b + 16) = fft::turn<1>(v[16 + b], b);
      }
    } else {
      const int other = other_column();
#pragma unroll
      for (int b = 0; b < 16; ++b) at(j % kFirst, 16 * (j / kFirst) + b) = v[b];
#pragma unroll
      for (int b = 0; b < 16; ++b) at(other % kFirst, 16 * (other / kFirst) + b) = v[16 + b];
    }
  }

  // Thread 0: v[i] and v[31 - i] become partners; places 0 and 31 frequencies 0 and kSize / 2.
  __device__ void to_pairs(float2 (&v)[kPoints]) const {
    if (j != 0) return;
    const float2 middle = v[8];
    float2 high[7];
#pragma unroll
    for (int i = 0; i < 7; ++i) high[i] = v[9 + i];
#pragma unroll
    for (int i = 8; i < 24; ++i) v[i] = v[i + 8];
#pragma unroll
    for (int i = 0; i < 7; ++i) v[24 + i] = high[i];
    v[31] = middle;
  }

  __device__ void from_pairs(float2 (&v)[kPoints]) const {
    if (j != 0) return;
    const float2 middle = v[31];
    float2 high[7];
#pragma unroll
    for (int i = 0; i < 7; ++i) high[i] = v[24 + i];
#pragma unroll
    for (int i = 31; i >= 16; --i) v[i] = v[i - 8];
    v[8] = middle;
#pragma unroll
    for (int i = 0; i < 7; ++i) v[9 + i] = high[i];
  }

  // -i exp(-pi i k / kSize) for the frequency k of places i and 31 - i.
  struct Shifts {
    float2 low, high;
    __device__ float2 operator()(int i) const { return fft::turn<-1>(i < 8 ? low : high, i); }
  };
  __device__ Shifts shifts() const {
    const float2 root = table[j * (kLargestSize / kSize)];
    const float2 low = {root.y, -root.x};
    // Thread 0's upper half is column kColumns / 2 from its beginning: 15 / 64 of a turn ahead.
    constexpr float kCosine = 0.0980171403295606020f, kSine = 0.995184726672196886f;
    return {low, j == 0 ? float2{kSine, -kCosine} : low};
  }

  // From partners Z[k], Z[kSize - k] of the complex transform to the real signal's spectrum, and back.
  __device__ void unpack(float2& a, float2& b, int i, float2 shift) const {
    if (two_reals(i)) {
      a = {2 * (a.x + a.y), 2 * (a.x - a.y)}, b = {2 * b.x, -2 * b.y};
      return;
    }
    const float2 partner = conjugate(b), sum = a + partner, turned = shift * (a - partner);
    a = sum + turned, b = sum - turned;
  }
  __device__ void pack(float2& a, float2& b, int i, float2 shift) const {
    if (two_reals(i)) {
      a = {a.x + a.y, a.x - a.y}, b = {2 * b.x, -2 * b.y};
      return;
    }
    const float2 sum = a + b, turned = conjugate(shift) * (a - b);
    a = sum + turned, b = conjugate(sum - turned);
  }
};

}  // namespace packseq::longconv
