// Packing on the GPU, host side. Packing finds the tokens with two small kernels and copies them with a third;
// unpacking is the copy alone.
//
// All of it is bound by memory. With T tokens of B bytes in a batch of P rows, and a capacity of C, packing moves at
// the least (T + C) B bytes of rows, 8 C of indices twice, and the mask twice; unpacking moves (T + P) B.
#include <algorithm>
#include <type_traits>

#include "core/dispatch.h"
#include "core/divide_up.h"
#include "core/launch.h"
#include "packing/copy_rows.cuh"
#include "packing/packing.h"
#include "packing/place_tokens.cuh"

namespace packseq {
namespace {

// The widest unit, in bytes, at whose multiples all rows of both tensors begin.
int unit_bytes(const void* a, const void* b, int64_t row_bytes) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | uint64_t(row_bytes) | 16;
  return int(bits & -bits);
}

template <int kBytes>
using UnitOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

template <class Source>
void copy_rows(const char* what, const Source& source, int64_t rows, int64_t row_bytes, const void* from, void* to,
               const void* fill, cudaStream_t stream) {
  if (rows * row_bytes == 0) return;
  dispatch<16, 8, 4, 2, 1>("unit", unit_bytes(from, to, row_bytes), [&](auto bytes) {
    using Unit = UnitOf<bytes>;
    const int64_t row_units = row_bytes / int(bytes);
    const int64_t tile_rows = std::clamp<int64_t>(kTileUnits / row_units, 1, kTileRows);
    const int64_t segments = divide_up(row_units, kTileUnits);
    const CopyParams<Unit, Source> params = {.source = source,
                                             .rows = rows,
                                             .row_units = row_units,
                                             .tile_rows = int(tile_rows),
                                             .segments = int(segments),
                                             .segment_units = int(std::min<int64_t>(row_units, kTileUnits)),
                                             .from = static_cast<const Unit*>(from),
                                             .to = static_cast<Unit*>(to),
                                             .fill = fill};
    const int64_t tiles = divide_up(rows, tile_rows);
    launch(what, copy_rows_kernel<Unit, Source>, tiles * segments, kCopyThreads, 0, stream, params);
  });
}

// f(Keep): how a kernel sees which rows are tokens.
template <class F>
void with_keep(const TokenRows& keep, const F& f) {
  if (keep.lengths) {
    dispatch<4, 8>("length_bytes", keep.length_bytes, [&](auto bytes) {
      f(std::type_identity<Measured<std::conditional_t<bytes == 4, int32_t, int64_t>>>{});
    });
  } else {
    dispatch<1, 2, 4, 8>("mask_bytes", keep.mask_bytes, [&](auto bytes) {
      using Small = std::conditional_t<bytes == 1, uint8_t, uint16_t>;
      using Large = std::conditional_t<bytes == 4, uint32_t, uint64_t>;
      f(std::type_identity<Marked<std::conditional_t<(bytes <= 2), Small, Large>>>{});
    });
  }
}

void place_tokens(const Pack& p, cudaStream_t stream) {
  const int64_t rows = p.shape.rows();
  if (rows == 0) {
    check_cuda(cudaMemsetAsync(p.cu_seqlens, 0, size_t(p.shape.batch + 1) * sizeof(int32_t), stream), "pack");
    check_cuda(cudaMemsetAsync(p.indices, 0xff, size_t(p.capacity) * sizeof(int64_t), stream), "pack");
    return;
  }
  const int64_t steps = divide_up(rows, kStep), steps_of_part = divide_up(steps, kPartsMost);
  const PlaceParams params = {.call = p,
                              .parts = divide_up(steps, steps_of_part),
                              .part_rows = steps_of_part * kStep,
                              .counts = static_cast<int64_t*>(p.workspace)};
  with_keep(p.keep, [&](auto type) {
    using Keep = typename decltype(type)::type;
    launch("pack", count_tokens_kernel<Keep>, params.parts, kPlaceThreads, 0, stream, params);
    launch("pack", place_tokens_kernel<Keep>, params.parts, kPlaceThreads, 0, stream, params);
  });
}

}  // namespace

size_t pack_workspace(const Pack&) { return kPartsMost * sizeof(int64_t); }

void pack(const Pack& p, cudaStream_t stream) {
  place_tokens(p, stream);
  copy_rows("pack", ByIndices{p.indices, p.shape.rows()}, p.capacity, p.row_bytes, p.padded, p.tokens, nullptr, stream);
}

void unpack(const Unpack& p, cudaStream_t stream) {
  const auto copy = [&](const auto& source) {
    copy_rows("unpack", source, p.shape.rows(), p.row_bytes, p.tokens, p.padded, p.fill, stream);
  };
  p.places.cu_seqlens ? copy(ToBoundaries{p.places.cu_seqlens, p.shape, p.capacity})
                      : copy(ToIndices{p.places.indices, p.capacity});
}

void unpack_backward(const UnpackBackward& p, cudaStream_t stream) {
  const auto copy = [&](const auto& source) {
    copy_rows("unpack backward", source, p.capacity, p.row_bytes, p.padded, p.tokens, nullptr, stream);
  };
  p.places.cu_seqlens ? copy(ByBoundaries{p.places.cu_seqlens, p.shape, p.capacity})
                      : copy(ByIndices{p.places.indices, p.shape.rows()});
}

}  // namespace packseq
