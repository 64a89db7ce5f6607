// What the host needs of the Ampere kernels; one instantiation a file, written into the build folder by CMake.
#pragma once
#include <cuda_runtime_api.h>

#include "attention/attention.h"
#include "core/schedule.h"

namespace packseq::sm80 {

// Head dims are padded to the next of these, with zeros that are never stored.
inline constexpr int kDims[] = {64, 96, 128, 192, 256};

// Rows of a query tile of the forward, and of a key tile of the backward, which has a variant for chips with less
// than kLargeShared bytes of shared memory a block.
inline constexpr int kLargeShared = 227 * 1024;
constexpr int forward_rows(int dim) { return dim <= 128 ? 128 : 64; }
constexpr int backward_rows(int dim, bool small) {
  return dim == 64 ? 128 : dim <= 128 ? (small ? 64 : 128) : small && dim == 256 ? 32 : 64;
}
// Queries that share a turn counter in the backward.
constexpr int turn_rows(int dim) { return dim <= 128 ? 64 : 32; }

template <class T, int kDim>
void forward(const AttentionForward&, const Tile* tiles, int64_t places, cudaStream_t);

// What lives between the backward's kernels.
struct BackwardScratch {
  const float* lse;    // [heads, total_q], times log2(e); +inf for rows that see no key
  const float* delta;  // [heads, total_q], rowsum(dout * out) - dlse
  float* dq;           // [heads, total_q, kDim], float32, a row's columns as write_dq() orders them; not with a delta
  int* turns;          // [heads, turn_slots()], zeros: key blocks that have added to a query block of dq
};

// Counters of a head: sequence i's are at cu_seqlens_q[i] / turn_rows + i and on, one for each block of its queries.
PACKSEQ_HOST_DEVICE int64_t turn_slots(const AttentionProblem& p, int dim) {
  return p.total_q / turn_rows(dim) + p.sequences;
}

template <class T, int kDim>
void backward(const AttentionBackward&, const BackwardScratch&, bool small, const Tile* key_tiles, int64_t places,
              cudaStream_t);

}  // namespace packseq::sm80
