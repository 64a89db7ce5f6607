// Rows of one sequence and channel in the order of time, on their way into a transform and out of one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "longconv/long_conv_launch.h"
#include "longconv/long_conv_tiles.cuh"

namespace packseq::longconv {

// The part of a sequence that a transform covers, in one channel.
struct Piece {
  int64_t row;  // the first in the order of time
  int32_t channel;
  int32_t rows;  // none where the channel does not exist

  // A sequence, or a block of one.
  __device__ static Piece of(const Shape& shape, ListedRows listed, int64_t channel, bool reverse) {
    const int32_t rows = channel < shape.channels ? listed.end - listed.begin : 0;
    return {reverse ? listed.end - 1 : listed.begin, int32_t(channel), rows};
  }
};

// The filter's weights for a thread of a tile of channels.
template <class Tile>
__device__ FilterPlace filter_place(const Tile& tile, const float4* spectra, const Shape& shape, int c,
                                    uint32_t channel_tile) {
  const int64_t channel = min(int64_t(channel_tile) * Tile::kChannels + tile.channel, shape.channels - 1);
  return {spectra + ((spectrum_begin(c) / 2 + tile.j) * shape.channels + channel),
          int32_t(Tile::kLines * shape.channels)};
}

// Element t is row t of a piece.
template <class T>
struct Signal {
  T* first;
  int32_t step;

  __device__ Signal(const void* data, int64_t stride, const Piece& piece, bool reverse)
      : first(const_cast<T*>(static_cast<const T*>(data)) + piece.row * stride + piece.channel),
        step(int32_t(reverse ? -stride : stride)) {}
  __device__ Signal(const Rows& rows, const Piece& piece, bool reverse)
      : Signal(rows.data, rows.token, piece, reverse) {}
  __device__ float operator()(int32_t t) const { return float(__ldg(first + int64_t(t) * step)); }
};

// Walks through the rows of a thread's registers: f(place, address of row t, of row t + 1, rows from t on), t even.
// Addresses are multiples of the step from one base, an instruction each.
template <class Tile, class T, class F>
__device__ __forceinline__ void for_rows(const Tile& tile, const Signal<T>& signal, int rows, const F& f) {
  constexpr int kRuns = kPoints / Tile::kFirst, kHalf = Tile::kFirst / 2;
  const int j = tile.renewed().j;
  const int step = opaque(signal.step, tile.shared);
  T* const base = signal.first + int64_t(2 * j) * step;
#pragma unroll
  for (int s = 0; s < kRuns; ++s) {
    const int left = rows - 2 * (j + Tile::kLines * s);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      constexpr auto at = [](int s, int i) { return 2 * (Tile::kLines * s + Tile::kRest * i); };
      f(s * Tile::kFirst + i, base + int64_t(step) * at(s, i), base + int64_t(step) * (at(s, i) + 1),
        left - 2 * Tile::kRest * i);
    }
  }
}

template <class T>
__device__ __forceinline__ float load_or_zero(const T* at, bool exists) {
  return exists ? float(__ldg(at)) : 0.f;
}

template <class T, class Tile>
__device__ __forceinline__ void load_rows(const Tile& tile, const Rows& from, const ConvCall& call, const Piece& piece,
                                          float2 (&v)[kPoints]) {
  for_rows(tile, Signal<const T>(from, piece, call.reverse), piece.rows,
           [&](int place, const T* even, const T* odd, int left) {
             v[place] = {load_or_zero(even, left > 0), load_or_zero(odd, left > 1)};
           });
}

template <class T, class Tile>
__device__ __forceinline__ void multiply_rows(const Tile& tile, const Rows& by, const ConvCall& call,
                                              const Piece& piece, float2 (&v)[kPoints]) {
  if (!by.data) return;
  for_rows(tile, Signal<const T>(by, piece, call.reverse), piece.rows,
           [&](int place, const T* even, const T* odd, int left) {
             v[place].x *= load_or_zero(even, left > 0), v[place].y *= load_or_zero(odd, left > 1);
           });
}

// v becomes pre_gate input, and zero where there are no rows.
template <class T, class Tile>
__device__ __forceinline__ void load_input(const Tile& tile, const ConvCall& call, const Piece& piece,
                                           float2 (&v)[kPoints]) {
  load_rows<T>(tile, call.input, call, piece, v);
  multiply_rows<T>(tile, call.pre_gate, call, piece, v);
}

template <class T, class Tile, class F>
__device__ __forceinline__ void store_rows(const Tile& tile, void* to, const ConvCall& call, const Piece& piece,
                                           int64_t channels, const F& value) {
  for_rows(tile, Signal<T>(to, channels, piece, call.reverse), piece.rows, [&](int place, T* even, T* odd, int left) {
    const float2 y = value(place);
    if (left > 0) __stcs(even, T(y.x));
    if (left > 1) __stcs(odd, T(y.y));
  });
}

// Of y = v: D x is added, then everything that the call wants is written. load(x) makes x of the input, store() writes
// v, what goes to `out`.
template <class T, class Tile, class Load, class Store>
__device__ __forceinline__ void finish(const Tile& tile, const ConvCall& call, const Piece& piece, int64_t channels,
                                       float2 (&v)[kPoints], const Load& load, const Store& store) {
  constexpr auto wanted = [](int place) { return place % Tile::kFirst < Tile::kFirst / 2; };
  if (call.D) {
    const float D = piece.rows > 0 ? __ldg(call.D + piece.channel) : 0.f;
    float2 x[kPoints];
    load(x);
#pragma unroll
    for (int i = 0; i < kPoints; ++i) {
      if (wanted(i)) v[i] = {fmaf(D, x[i].x, v[i].x), fmaf(D, x[i].y, v[i].y)};
    }
  }
  if (call.out_other) {
    float2 other[kPoints];
    load_rows<T>(tile, call.other, call, piece, other);
    store_rows<T>(tile, call.out_other, call, piece, channels, [&](int place) {
      return float2{v[place].x * other[place].x, v[place].y * other[place].y};
    });
  }
  multiply_rows<T>(tile, call.gate, call, piece, v);
  store();
}

template <class T, class Tile>
__device__ __forceinline__ void finish_rows(const Tile& tile, const ConvCall& call, const Piece& piece,
                                            int64_t channels, float2 (&v)[kPoints]) {
  finish<T>(
      tile, call, piece, channels, v, [&](float2(&x)[kPoints]) { load_input<T>(tile, call, piece, x); },
      [&] { store_rows<T>(tile, call.out, call, piece, channels, [&](int place) { return v[place]; }); });
}

}  // namespace packseq::longconv
