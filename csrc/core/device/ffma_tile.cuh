// float32 products of 64-row tiles on the plain FMA units: operands in shared memory, sums in registers.
//
// The threads stand 16 across and kDown down. Of a 64 x 64 tile of scores a thread owns rows down + kDown * i and
// columns across + 16 * j; of a 64 x kDim tile of sums the same rows and columns 64 * j + 4 * across + (0 .. 3).
// A row of scores thus stays within one half of one warp.
//
// Operands arrive in stages of 4096 floats, by cp.async: two slices of 64 rows and 32 columns for a product along
// the columns, or a slice of whole rows for a product along the rows. All accesses are 16 bytes wide and meet no bank
// conflict: in a slice of columns the 16-byte chunk c of row r lies at chunk c ^ (r % 8), and in a tile of scores the
// odd rows have their 16-column groups swapped in pairs.
#pragma once
#include <cstdint>

#include "core/device/async_copy.cuh"
#include "core/device/shared_tile.cuh"
#include "core/packed.h"

namespace packseq {

// One head of one sequence: `length` rows of `cols` floats.
struct FloatRows {
  const float* data;
  int64_t stride;
  int32_t length;
  int cols;

  __device__ FloatRows(const Packed& x, Span rows, int64_t head, int cols)
      : data(static_cast<const float*>(x.data) + rows.begin * x.token + head * x.head),
        stride(x.token),
        length(int32_t(rows.size())),
        cols(cols) {}
};

template <int kDim_, int kThreads_>
struct FfmaTile {
  static constexpr int kDim = kDim_, kThreads = kThreads_;
  static constexpr int kSize = 64, kAcross = 16;
  static constexpr int kDown = kThreads / kAcross, kRows = kSize / kDown;  // kRows: of a thread
  static constexpr int kSliceCols = 32, kSlice = kSize * kSliceCols;       // floats of a slice of columns
  static constexpr int kStage = 2 * kSlice, kSliceRows = kStage / kDim;
  static constexpr int kRowSlices = kSize / kSliceRows;
  static constexpr int kScores = kSize * kSize;  // floats of a tile of scores
  static_assert(kDim % 64 == 0 && kDown % 8 == 0 && kSize % kSliceRows == 0);

  using Scores = float[kRows][4];
  using Sums = float[kRows][kDim / 16];

  __device__ static int across() { return threadIdx.x % kAcross; }
  __device__ static int down() { return threadIdx.x / kAcross; }
  __device__ static int row(int i) { return down() + kDown * i; }
  __device__ static int col(int j) { return across() + kAcross * j; }      // of scores
  __device__ static int sums_col(int j) { return 64 * j + 4 * across(); }  // first of four
  __device__ static int slices(int cols) { return (cols + kSliceCols - 1) / kSliceCols; }

  // Starts copying 64 rows and 32 columns; what lies outside `rows` becomes zeros and is not read.
  __device__ __forceinline__ static void load_columns(float* slice, const FloatRows& rows, int32_t first_row,
                                                      int first_col) {
    constexpr int kStep = kThreads / 8;
    static_assert(kStep % 8 == 0);
    const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const int32_t limit = first_col + 4 * chunk < rows.cols ? rows.length - first_row : 0;
    const float* from = rows.data + (int64_t(first_row) + row0) * rows.stride + first_col + 4 * chunk;
    const uint32_t to = shared_address(slice) + row0 * 128 + ((chunk ^ (row0 % 8)) << 4);
#pragma unroll
    for (int i = 0; i < kSize / kStep; ++i) {
      copy_async_16(to + i * kStep * 128, from, row0 + i * kStep < limit);
      from += kStep * rows.stride;
    }
  }

  // Starts copying kSliceRows whole rows, `skip` after the tile's first, padded with zeros to kDim columns.
  __device__ __forceinline__ static void load_rows(float* slice, const FloatRows& rows, int32_t first_row, int skip) {
    constexpr int kChunks = kDim / 4, kStep = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kSliceRows % kStep == 0);
    const int row0 = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const int32_t limit = 4 * chunk < rows.cols ? rows.length - first_row - skip : 0;
    const float* from = rows.data + (int64_t(first_row) + skip + row0) * rows.stride + 4 * chunk;
    const uint32_t to = shared_address(slice) + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kSliceRows / kStep; ++i) {
      copy_async_16(to + i * kStep * kDim * 4, from, row0 + i * kStep < limit);
      from += kStep * rows.stride;
    }
  }

  // s += A B^T over the 32 columns of two slices.
  __device__ __forceinline__ static void multiply_transposed(Scores& s, const float* a_slice, const float* b_slice) {
    const float4* a_rows = reinterpret_cast<const float4*>(a_slice) + down() * 8;
    const float4* b_rows = reinterpret_cast<const float4*>(b_slice) + across() * 8;
#pragma unroll 1
    for (int c = 0; c < 8; ++c) {
      const int a_chunk = c ^ (down() % 8), b_chunk = c ^ (across() % 8);
      float4 b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = b_rows[j * kAcross * 8 + b_chunk];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 a = a_rows[i * kDown * 8 + a_chunk];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[i][j] = fmaf(a.w, b[j].w, fmaf(a.z, b[j].z, fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, s[i][j]))));
        }
      }
    }
  }

  // sums += A B, where A is columns `first` ... + kSliceRows of a tile of scores and B a slice of rows. A slice is
  // summed by itself first: over long sequences that rounds far less than one sum over all rows.
  __device__ __forceinline__ static void multiply(Sums& sums, const float* scores, int first, const float* slice) {
    constexpr int kGroups = 32 / (4 * kRows);  // groups of four columns that are summed at once
    const float4* a_rows = reinterpret_cast<const float4*>(scores) + down() * (kSize / 4);
    const float4* b_rows = reinterpret_cast<const float4*>(slice) + across();
#pragma unroll
    for (int j = 0; j < kDim / 64; j += kGroups) {
      float part[kRows][4 * kGroups] = {};
#pragma unroll 1
      for (int k = 0; k < kSliceRows / 4; ++k) {
        const int chunk = (first / 4 + k) ^ (down() % 2 * 4);
        float4 a[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) a[i] = a_rows[i * kDown * (kSize / 4) + chunk];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            const float4 b = b_rows[(4 * k + r) * (kDim / 4) + 16 * (j + g)];
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const float x = r == 0 ? a[i].x : r == 1 ? a[i].y : r == 2 ? a[i].z : a[i].w;
              float* sum = part[i] + 4 * g;
              sum[0] = fmaf(x, b.x, sum[0]);
              sum[1] = fmaf(x, b.y, sum[1]);
              sum[2] = fmaf(x, b.z, sum[2]);
              sum[3] = fmaf(x, b.w, sum[3]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int c = 0; c < 4 * kGroups; ++c) sums[i][4 * j + c] += part[i][c];
      }
    }
  }

  // The place of this thread's score (i, j) in a tile of scores.
  __device__ static float& score(float* scores, int i, int j) {
    return scores[row(i) * kSize + across() + kAcross * (j ^ (down() % 2))];
  }

  // f(i, j) for each score that this thread owns.
  template <class F>
  __device__ __forceinline__ static void for_each(const F& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) f(i, j);
    }
  }

  // Writes by(i) times this thread's sums to the first `rows` rows of a tile of a tensor, `stride` floats apart.
  template <class F>
  __device__ __forceinline__ static void store(const Sums& sums, const F& by, float* out, int64_t stride, int32_t rows,
                                               int cols) {
    for_each_chunk(sums, by, out, stride, rows, cols, [](int, float4* to, float4 x) { *to = x; });
  }

  // Adds them to keep(i) times what is there, which is not read where that is 0.
  template <class F, class G>
  __device__ __forceinline__ static void add(const Sums& sums, const F& by, const G& keep, float* out, int64_t stride,
                                             int32_t rows, int cols) {
    for_each_chunk(sums, by, out, stride, rows, cols, [&](int i, float4* to, float4 x) {
      const float factor = keep(i);
      const float4 y = factor == 0.0f ? float4{} : *to;
      *to = {y.x * factor + x.x, y.y * factor + x.y, y.z * factor + x.z, y.w * factor + x.w};
    });
  }

  // Zeros in the first `rows` rows of a tile.
  __device__ static void store_zeros(float* out, int64_t stride, int64_t rows, int cols) {
    store(
        Sums{}, [](int) { return 0.0f; }, out, stride, int32_t(rows < kSize ? rows : kSize), cols);
  }

 private:
  // f(i, place, by(i) * sums) for every four columns of this thread's that the tensor has.
  template <class By, class F>
  __device__ __forceinline__ static void for_each_chunk(const Sums& sums, const By& by, float* out, int64_t stride,
                                                        int32_t rows, int cols, const F& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row(i) >= rows) continue;
      const float factor = by(i);
#pragma unroll
      for (int j = 0; j < kDim / 64; ++j) {
        if (sums_col(j) >= cols) continue;
        const float* x = sums[i] + 4 * j;
        f(i, reinterpret_cast<float4*>(out + row(i) * stride + sums_col(j)),
          float4{x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor});
      }
    }
  }
};

// A walk of `steps` steps of `per_step` stages each, one stage loaded while the one before is computed with.
// load(memory, stage) starts the copies of a step's stage, in order; every thread of the block takes part.
template <class Tile, class Load>
class FfmaStages {
 public:
  __device__ __forceinline__ FfmaStages(float* memory, int steps, int per_step, const Load& load)
      : memory_(memory), per_step_(per_step), steps_left_(steps), load_(load) {
    if (steps > 0) load_(memory_, 0);
    copy_async_commit();
  }

  // The next stage's memory. Also a barrier, after which the stage before may no longer be read.
  __device__ __forceinline__ const float* next() {
    copy_async_wait<0>();
    __syncthreads();
    const float* now = memory_ + odd_ * Tile::kStage;
    odd_ ^= 1;
    if (++stage_ == per_step_) {
      stage_ = 0;
      --steps_left_;
    }
    if (steps_left_ > 0) load_(memory_ + odd_ * Tile::kStage, stage_);
    copy_async_commit();
    return now;
  }

 private:
  float* const memory_;
  const int per_step_;
  int steps_left_, stage_ = 0, odd_ = 0;
  const Load& load_;
};

}  // namespace packseq
