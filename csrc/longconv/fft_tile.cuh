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
//
// The roots of unity that a size takes lie in shared memory in the order in which threads take them, before what the
// teams exchange.
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

// Where a thread's weights of the filter (FftTile::weights()) begin, and how far apart they are.
struct FilterPlace {
  const float4* at;
  int32_t step;
};

// A thread's weights in their order, some of them under way ahead of their use.
template <class Tile>
struct Weights {
  static constexpr int kAhead = 4;
  FilterPlace place;
  float4 under_way[kAhead];

  __device__ void begin(const FilterPlace& of) {
    place = of;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) under_way[i] = __ldg(place.at + int64_t(i) * place.step);
  }
  __device__ float4 take(int i) {
    const float4 weights = under_way[i % kAhead];
    if (i + kAhead < Tile::kSlots) under_way[i % kAhead] = __ldg(place.at + int64_t(i + kAhead) * place.step);
    return weights;
  }
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

  // Tables of roots, in complex numbers. The largest size has room for some powers only, and makes the others of them.
  static constexpr bool kWhole = kSize <= 2048;
  static constexpr int kFirstPowers = kWhole ? kFirst - 1 : fft::kept_powers(kFirst);
  static constexpr int kSecondPowers = kSecond > 2 ? kSecond - 1 : 0;
  static constexpr int kSecondTable = kFirstPowers * kRest, kShiftTable = kSecondTable + kSecondPowers * 16;
  static constexpr int kTables = kShiftTable + (kWhole ? kSlots : 1) * kLines;
  static_assert(kTables % 2 == 0);

  float4* shared;  // behind opaque()'s zero: tables, then [teams, kFirst, kStride, kChannels] complex numbers
  int team, j, channel;

  __device__ explicit FftTile(float4* shared_) : shared(shared_) {
    const int thread = opaque(int(threadIdx.x), shared);
    team = thread / kThreads, j = thread % kThreads / kChannels, channel = thread % kChannels;
  }
  // The same: every step of a transform finds its addresses by itself, or they would all be kept in registers.
  __device__ FftTile renewed() const { return FftTile(shared); }

  // By all threads of the block, between two barriers. table: [kTableSize]
  __device__ static void fill_tables(float4* shared, const float2* table) {
    float2* const to = reinterpret_cast<float2*>(shared);
    for (int i = threadIdx.x; i < kTables; i += blockDim.x) {
      if (i < kSecondTable) {
        const int power = kWhole ? i / kRest + 1 : fft::kept_power(i / kRest);
        to[i] = table[power * (i % kRest) * (kTableSize / kSize)];
      } else if (i < kShiftTable) {
        const int at = i - kSecondTable;
        to[i] = table[(at / 16 + 1) * (at % 16) * (kTableSize / kRest)];
      } else {
        const int at = i - kShiftTable, line = at % kLines, slot = at / kLines;
        const int k = line > 0 || slot < kSlots / 2 ? line + kColumns * slot : kColumns * (slot - 8) + kColumns / 2;
        const float2 root = table[k * (kLargestSize / kSize)];
        to[i] = {root.y, -root.x};
      }
    }
  }
  // The same between barriers of its own.
  __device__ static void begin(float4* shared, const float2* table) {
    __syncthreads();  // what came before laid the shared memory out otherwise
    fill_tables(shared, table);
    __syncthreads();
  }
  // What the teams of a block of so many threads take of the shared memory, in units of its type.
  PACKSEQ_HOST_DEVICE static constexpr int used(int threads) { return (kTables + threads / kThreads * kShared) / 2; }

  __device__ void wait() const {
    if constexpr (kThreads == 32) {
      __syncwarp();
    } else {
      named_barrier(opaque(int(threadIdx.x), shared) / kThreads + 1, kThreads);
    }
  }
  __device__ const float2* tables() const { return reinterpret_cast<const float2*>(shared); }
  __device__ float2& at(int k1, int b) const {
    return reinterpret_cast<float2*>(shared)[kTables + team * kShared + (k1 * kStride + b) * kChannels + channel];
  }

  // The number of which element `place` of the registers is z[n], before the transform and after the inverse.
  __device__ int number(int place) const { return j + kLines * (place / kFirst) + kRest * (place % kFirst); }

  // From z to pairs of partners. kPadded: the upper half of z is zero, and not looked at. before_columns(tile): what
  // can be under way during the last transforms.
  template <bool kPadded, class F>
  __device__ void forward_to_pairs(float2 (&v)[kPoints], const F& before_columns) const {
    renewed().template first_forward<kPadded>(v);
    wait();
    if constexpr (kSecond > 2) {
      renewed().template second<-1>(v);
      wait();
    }
    before_columns(renewed());
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
  template <bool kPadded, class F>
  __device__ void forward(float2 (&v)[kPoints], const F& before_columns) const {
    forward_to_pairs<kPadded>(v, before_columns);
    const FftTile tile = renewed();
    const Shifts shifts(tile);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) tile.unpack(v[i], v[kPoints - 1 - i], i, shifts(i));
  }
  template <bool kPadded>
  __device__ void forward(float2 (&v)[kPoints]) const {
    forward<kPadded>(v, [](const FftTile&) {});
  }
  template <bool kLower>
  __device__ void inverse(float2 (&v)[kPoints]) const {
    const FftTile tile = renewed();
    const Shifts shifts(tile);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) tile.pack(v[i], v[kPoints - 1 - i], i, shifts(i));
    inverse_of_pairs<kLower>(v);
  }

  // From z of x to z of the convolution of x with a filter, 4 kSize times as large. Upper halves are zero, and not
  // wanted. find_filter(tile) says where this thread's weights are.
  template <class FindFilter>
  __device__ void convolve(float2 (&v)[kPoints], const FindFilter& find_filter) const {
    Weights<FftTile> weights;
    forward_to_pairs<true>(v, [&](const FftTile& tile) { weights.begin(find_filter(tile)); });
    const FftTile tile = renewed();
    const Shifts shifts(tile);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) tile.multiply(v[i], v[kPoints - 1 - i], weights.take(i), i, shifts(i));
    inverse_of_pairs<true>(v);
  }

  // What multiply() takes for the filter's spectrum, a and b its places i and 31 - i.
  __device__ float4 weights(float2 a, float2 b, int i) const {
    return two_reals(i) ? float4{2 * (a.x + a.y), 2 * (a.x - a.y), 4 * b.x, 4 * b.y} : join(2 * (a + b), 2 * (a - b));
  }

  // The product of places i and 31 - i with the conjugate of the filter that weights() were made of.
  __device__ void multiply_by_conjugate(float2& a, float2& b, float4 k, int i) const {
    const float2 sum = {0.25f * k.x, 0.25f * k.y}, difference = {0.25f * k.z, 0.25f * k.w};
    if (two_reals(i)) {
      a = {(sum.x + sum.y) * a.x, (sum.x - sum.y) * a.y}, b = b * conjugate(difference);
    } else {
      a = a * conjugate(sum + difference), b = b * conjugate(sum - difference);
    }
  }

  // conj(a) b + c of places i and 31 - i.
  __device__ float4 correlate(const float2 (&a)[kPoints], const float2 (&b)[kPoints], float4 c, int i) const {
    const int last = kPoints - 1 - i;
    const float2 first = two_reals(i) ? float2{fmaf(a[i].x, b[i].x, c.x), fmaf(a[i].y, b[i].y, c.y)}
                                      : fft::conjugate_multiply_add(a[i], b[i], {c.x, c.y});
    return join(first, fft::conjugate_multiply_add(a[last], b[last], {c.z, c.w}));
  }

 private:
  template <int kSign>
  __device__ void multiply_first_powers(float2* w, int b) const {
    if constexpr (kWhole) {
      fft::multiply_powers<kFirst, kSign>(w, tables() + b, kRest);
    } else {
      fft::multiply_products_of_powers<kFirst, kSign>(w, tables() + b, kRest);
    }
  }

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
      multiply_first_powers<-1>(w, b);
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
      multiply_first_powers<1>(w, b);
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
      if constexpr (kSign > 0) fft::multiply_powers<kSecond, kSign>(w, tables() + kSecondTable + b2, 16);
      fft::transform<kSecond, kSign>(w);
      if constexpr (kSign < 0) fft::multiply_powers<kSecond, kSign>(w, tables() + kSecondTable + b2, 16);
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
    const float2* at;
    float2 low, high;

    __device__ explicit Shifts(const FftTile& tile) : at(tile.tables() + kShiftTable + tile.j) {
      if constexpr (!kWhole) {
        low = *at;
        // Thread 0's upper half is column kColumns / 2 from its beginning: 15 / 64 of a turn ahead.
        constexpr float kCosine = 0.0980171403295606020f, kSine = 0.995184726672196886f;
        high = tile.j == 0 ? float2{kSine, -kCosine} : low;
      }
    }
    __device__ float2 operator()(int i) const { return kWhole ? at[i * kLines] : fft::turn<-1>(i < 8 ? low : high, i); }
  };

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

  // unpack(), the product with a filter, pack(), in one: with K and L the filter at both frequencies,
  //   a' = (2 (K + L) + 2 Re(shift) (K - L)) a - 2 i Im(shift) (K - L) conj(b)
  //   b' = conj(2 i Im(shift) (K - L) a + (2 (K + L) - 2 Re(shift) (K - L)) conj(b))
  __device__ void multiply(float2& a, float2& b, float4 k, int i, float2 shift) const {
    const float2 sum = {k.x, k.y}, difference = {k.z, k.w};
    if (two_reals(i)) {
      a = {fmaf(sum.x, a.x, sum.y * a.y), fmaf(sum.y, a.x, sum.x * a.y)};
      b = b * conjugate(difference);
      return;
    }
    const float2 p = {fmaf(shift.x, difference.x, sum.x), fmaf(shift.x, difference.y, sum.y)};
    const float2 r = {fmaf(-shift.x, difference.x, sum.x), fmaf(-shift.x, difference.y, sum.y)};
    const float2 q = {shift.y * difference.y, -shift.y * difference.x};
    const float2 partner = conjugate(b), before = a;
    a = multiply_add(p, before, q * partner);
    b = conjugate(
        multiply_add(r, partner, {-fmaf(q.x, before.x, -q.y * before.y), -fmaf(q.x, before.y, q.y * before.x)}));
  }
};

}  // namespace packseq::longconv
