// Finds the tokens of a padded batch: where each of them stands, and where the sequences begin. Two kernels.
//
//   count_tokens_kernel   tokens in each of at most 1,024 parts of the batch
//   place_tokens_kernel   adds up the parts before its own, looks at its rows again, and writes indices (-1 for the
//                         slack) and cu_seqlens
//
// The masks are read twice, which is little beside the rows, and saves what a single pass would need: a chain of
// blocks that wait for each other, and memory that is cleared before each call.
#pragma once
#include "packing/packing.h"

namespace packseq {
namespace {

constexpr int kPlaceThreads = 256, kPlaceWarps = kPlaceThreads / 32;
constexpr unsigned kAll = ~0u;                    // lanes of a warp
constexpr int kWords = 16;                        // of 32 rows, that a warp looks at in one step
constexpr int kStep = kPlaceWarps * kWords * 32;  // rows a block looks at in one step
constexpr int64_t kPartsMost = 1024;

struct PlaceParams {
  Pack call;
  int64_t parts, part_rows;  // rows of a part: a multiple of kStep
  int64_t* counts;           // [parts]
};

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

template <class T>
__device__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Rows first, first + 32, ... of a lane: which of them are tokens. The rows end at `end`.
template <class Integer>
struct Marked {
  const Pack& p;

  __device__ void look(int64_t first, int64_t end, bool (&token)[kWords]) const {
    const Integer* mask = static_cast<const Integer*>(p.keep.mask);
#pragma unroll
    for (int j = 0; j < kWords; ++j) token[j] = first + 32 * j < end && mask[first + 32 * j] != 0;
  }
};

template <class Integer>
struct Measured {
  const Pack& p;

  __device__ void look(int64_t first, int64_t end, bool (&token)[kWords]) const {
    const int64_t length = p.shape.length;
    int64_t b = first / length, l = first % length;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      token[j] = first + 32 * j < end && l < static_cast<const Integer*>(p.keep.lengths)[b];
      l += 32;
      if (l >= length) {
        b += l / length;
        l %= length;
      }
    }
  }
};

// The tokens among the warp's rows: lane j holds those of rows first + 32 j ..., one a bit. Lanes from kWords on: 0.
template <class Keep>
__device__ uint32_t token_words(const Keep& keep, int64_t first, int64_t end) {
  bool token[kWords];
  keep.look(first + lane(), end, token);
  uint32_t mine = 0;
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const uint32_t word = __ballot_sync(kAll, token[j]);
    if (lane() == j) mine = word;
  }
  return mine;
}

// Sum over the block, in all threads. `scratch` has kPlaceWarps elements, and is free afterwards.
__device__ int64_t block_sum(int64_t x, int64_t* scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll
  for (int w = 0; w < kPlaceWarps; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

template <class Keep>
__global__ void __launch_bounds__(kPlaceThreads) count_tokens_kernel(const __grid_constant__ PlaceParams p) {
  __shared__ int64_t scratch[kPlaceWarps];
  const Keep keep{p.call};
  const int64_t begin = blockIdx.x * p.part_rows, end = min(begin + p.part_rows, p.call.shape.rows());
  int64_t count = 0;
  for (int64_t first = begin + warp() * kWords * 32; first < end; first += kStep) {
    count += __popc(token_words(keep, first, end));
  }
  count = block_sum(count, scratch);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

// Writes what follows from the tokens of one warp's step: rows first ..., `before` tokens ahead of them.
__device__ void place(const Pack& p, int64_t first, int64_t end, uint32_t words, int64_t before) {
  uint32_t ahead = __popc(words);  // tokens in the words before this lane's
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, ahead, step);
    if (lane() >= step) ahead += other;
  }
  ahead -= __popc(words);
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const uint32_t word = __shfl_sync(kAll, words, j);
    const int64_t at = before + __shfl_sync(kAll, ahead, j) + __popc(word & ((1u << lane()) - 1));
    if ((word >> lane() & 1) && at < p.capacity) p.indices[at] = first + 32 * j + lane();
  }
  // The sequences that begin among these rows: usually one or none.
  end = min(end, first + kWords * 32);
  for (int64_t b0 = (first + p.shape.length - 1) / p.shape.length; b0 * p.shape.length < end; b0 += 32) {
    const int64_t row = (b0 + lane()) * p.shape.length - first;
    const bool here = row < end - first;
    const int word = here ? int(row / 32) : 0;
    const uint32_t bits = __shfl_sync(kAll, words, word) & ((1u << row % 32) - 1);
    const int64_t at = before + __shfl_sync(kAll, ahead, word) + __popc(bits);
    if (here) p.cu_seqlens[b0 + lane()] = int32_t(min(at, p.capacity));
  }
}

template <class Keep>
__global__ void __launch_bounds__(kPlaceThreads) place_tokens_kernel(const __grid_constant__ PlaceParams p) {
  __shared__ int64_t scratch[kPlaceWarps];
  const Keep keep{p.call};
  int64_t before = 0, total = 0;
  for (int64_t part = threadIdx.x; part < p.parts; part += kPlaceThreads) {
    const int64_t count = p.counts[part];
    total += count;
    before += part < blockIdx.x ? count : 0;
  }
  before = block_sum(before, scratch);
  total = block_sum(total, scratch);

  const int64_t begin = blockIdx.x * p.part_rows, end = min(begin + p.part_rows, p.call.shape.rows());
  for (int64_t step = begin; step < end; step += kStep) {  // by all warps together
    const int64_t first = step + warp() * kWords * 32;
    const uint32_t words = token_words(keep, first, end);
    const uint32_t count = warp_sum(uint32_t(__popc(words)));
    if (lane() == 0) scratch[warp()] = count;
    __syncthreads();
    int64_t ahead = before;  // of this warp's rows
#pragma unroll
    for (int w = 0; w < kPlaceWarps; ++w) {
      ahead += w < warp() ? scratch[w] : 0;
      before += scratch[w];
    }
    if (first < end) place(p.call, first, end, words, ahead);
    __syncthreads();
  }

  const int64_t threads = int64_t(kPlaceThreads) * gridDim.x;
  for (int64_t t = total + int64_t(kPlaceThreads) * blockIdx.x + threadIdx.x; t < p.call.capacity; t += threads) {
    p.call.indices[t] = -1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.call.cu_seqlens[p.call.shape.batch] = int32_t(min(total, p.call.capacity));
}

}  // namespace
}  // namespace packseq
