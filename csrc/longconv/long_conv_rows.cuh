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

  // Rows from time `begin` on, at most so many.
  __device__ static Piece of(const Shape& shape, int64_t sequence, int64_t channel, bool reverse, int64_t begin,
                             int64_t most) {
    const Span span = span_of(shape.cu_seqlens, shape.sequences, shape.total, sequence);
    const int64_t rows = channel < shape.channels ? min(span.size() - begin, most) : 0;
    return {reverse ? span.end - 1 - begin : span.begin + begin, int32_t(channel), int32_t(rows)};
  }
};

// Element t is row t of a piece.
template <class T>
struct Signal {
  T* first;
  int64_t step;

  __device__ Signal(const void* data, int64_t stride, const Piece& piece, bool reverse)
      : first(const_cast<T*>(static_cast<const T*>(data)) + piece.row * stride + piece.channel),
        step(reverse ? -stride : stride) {}
  __device__ Signal(const Rows& rows, const Piece& piece, bool reverse)
      : Signal(rows.data, rows.token, piece, reverse) {}
  __device__ float operator()(int32_t t) const { return float(__ldg(first + t * step)); }
};

// Walks through the rows of a thread's registers: f(place, address of row t, of row t + 1, rows from t on), t even.
// The address moves on from one row to the next, so that there is never more than one of them.
template <class Tile, class T, class F>
__device__ __forceinline__ void for_rows(const Tile& tile, const Signal<T>& signal, int rows, const F& f) {
  constexpr int kRuns = kPoints / Tile::kFirst, kHalf = Tile::kFirst / 2;
  const int j = tile.renewed().j;
  const int64_t step = opaque(signal.step, tile.shared);
  const int64_t next_run = 2 * Tile::kLines * step, next = 2 * Tile::kRest * step;
  T* run = signal.first + 2 * j * step;
#pragma unroll
  for (int s = 0; s < kRuns; ++s) {
    T* at = run;
    const int left = rows - 2 * (j + Tile::kLines * s);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      f(s * Tile::kFirst + i, at, at + step, left - 2 * Tile::kRest * i);
      at += next;
    }
    run += next_run;
  }
}

template <class T>
__device__ __forceinline__ float load_or_zero(const T* at, bool exists) {
  return exists ? float(__ldg(at)) : 0.f;
}

// v becomes pre_gate input, and zero where there are no rows.
template <class T, class Tile>
__device__ __forceinline__ void load_rows(const Tile& tile, const ConvCall& call, const Piece& piece,
                                          float2 (&v)[kPoints]) {
  for_rows(tile, Signal<const T>(call.input, piece, call.reverse), piece.rows,
           [&](int place, const T* even, const T* odd, int left) {
             v[place] = {load_or_zero(even, left > 0), load_or_zero(odd, left > 1)};
           });
  if (!call.pre_gate.data) return;
  for_rows(tile, Signal<const T>(call.pre_gate, piece, call.reverse), piece.rows,
           [&](int place, const T* even, const T* odd, int left) {
             v[place].x *= load_or_zero(even, left > 0), v[place].y *= load_or_zero(odd, left > 1);
           });
}

template <class T, class Tile, class F>
__device__ __forceinline__ void store_rows(const Tile& tile, void* to, const ConvCall& call, const Piece& piece,
                                           int64_t channels, const F& value) {
  for_rows(tile, Signal<T>(to, channels, piece, call.reverse), piece.rows, [&](int place, T* even, T* odd, int left) {
    const float2 y = value(place);
    if (left > 0) *even = T(y.x);
    if (left > 1) *odd = T(y.y);
  });
}

// Of y = v: D x is added, then everything that the call wants is written.
template <class T, class Tile>
__device__ __forceinline__ void finish_rows(const Tile& tile, const ConvCall& call, const Piece& piece,
                                            int64_t channels, float2 (&v)[kPoints]) {
  const auto signal = [&](const Rows& rows) { return Signal<const T>(rows, piece, call.reverse); };
  if (call.D) {
    const float D = piece.rows > 0 ? call.D[piece.channel] : 0.f;
    if (call.pre_gate.data) {
      float2 x[kPoints];
      load_rows<T>(tile, call, piece, x);
      for_rows(tile, signal(call.input), piece.rows, [&](int place, const T*, const T*, int) {
        v[place] = {fmaf(D, x[place].x, v[place].x), fmaf(D, x[place].y, v[place].y)};
      });
    } else {
      for_rows(tile, signal(call.input), piece.rows, [&](int place, const T* even, const T* odd, int left) {
        v[place].x = fmaf(D, load_or_zero(even, left > 0), v[place].x);
        v[place].y = fmaf(D, load_or_zero(odd, left > 1), v[place].y);
      });
    }
  }
  if (call.out_other) {
    float2 other[kPoints];
    for_rows(tile, signal(call.other), piece.rows, [&](int place, const T* even, const T* odd, int left) {
      other[place] = {load_or_zero(even, left > 0), load_or_zero(odd, left > 1)};
    });
    store_rows<T>(tile, call.out_other, call, piece, channels, [&](int place) {
      return float2{v[place].x * other[place].x, v[place].y * other[place].y};
    });
  }
  if (call.gate.data) {
    for_rows(tile, signal(call.gate), piece.rows, [&](int place, const T* even, const T* odd, int left) {
      v[place].x *= load_or_zero(even, left > 0), v[place].y *= load_or_zero(odd, left > 1);
    });
  }
  store_rows<T>(tile, call.out, call, piece, channels, [&](int place) { return v[place]; });
}

}  // namespace packseq::longconv
