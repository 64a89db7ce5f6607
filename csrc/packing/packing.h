// Padded batches to packed tokens and back: the C++ API. A token is a number of bytes; its dtype does not matter here.
//
// A padded batch has batch * length rows of row_bytes bytes, row l of sequence b at place b * length + l. Packing keeps
// the rows that are tokens, in that order, and drops the padding. The tokens have room for `capacity` rows, whatever
// the number of tokens: rows after the last token are slack.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/executor.h"
#include "core/packed.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {

struct PaddedShape {
  int64_t batch, length;
  PACKSEQ_HOST_DEVICE int64_t rows() const { return batch * length; }
};

// Which rows are tokens: those the mask marks, or the first lengths[b] of sequence b. One of the two is nullptr.
struct TokenRows {
  const void* mask;     // [batch, length], integers of mask_bytes (1, 2, 4 or 8); not zero marks a token
  const void* lengths;  // [batch], integers of length_bytes (4 or 8), taken as if within 0 .. length
  int mask_bytes, length_bytes;
};

struct Pack {
  PaddedShape shape;
  int64_t row_bytes;
  int64_t capacity;  // less than 2^31
  TokenRows keep;
  const void* padded;   // [batch, length, row_bytes]
  void* tokens;         // [capacity, row_bytes]; slack becomes zeros
  int32_t* cu_seqlens;  // [batch + 1]; on a GPU cut to the capacity
  int64_t* indices;     // [capacity], each token's place in the padded batch; slack: -1
  void* workspace;      // pack_workspace() bytes, CUDA only
};

// Where tokens stand in the padded batch: by boundaries, or, where those are nullptr, by indices.
struct TokenPlaces {
  const int64_t* indices;     // [capacity], increasing, then -1: any other number is a row of no token
  const int32_t* cu_seqlens;  // [batch + 1]: token cu_seqlens[b] + l stands in row l of sequence b
};

// Tokens to their places; the other rows are filled. What stands outside the batch is dropped.
struct Unpack {
  PaddedShape shape;
  int64_t row_bytes;
  int64_t capacity;
  TokenPlaces places;
  const void* tokens;  // [capacity, row_bytes]
  void* padded;        // [batch, length, row_bytes], all written
  const void* fill;    // 16 bytes beside the tokens, repeated from each row's start on; nullptr: zeros
};

// The other direction, with known places; it is the gradient of Unpack. Tokens without a place become zeros.
struct UnpackBackward {
  PaddedShape shape;
  int64_t row_bytes;
  int64_t capacity;
  TokenPlaces places;
  const void* padded;  // [batch, length, row_bytes]
  void* tokens;        // [capacity, row_bytes], all written
};

// Throws where a length is outside 0 .. length, or there are more tokens than the capacity. Reads memory of the host.
void check_tokens(const PaddedShape&, const TokenRows&, int64_t capacity, Executor);

// pack calls check_tokens.
void pack(const Pack&, Executor);
void unpack(const Unpack&, Executor);
void unpack_backward(const UnpackBackward&, Executor);

#if PACKSEQ_HAS_CUDA
size_t pack_workspace(const Pack&);
void pack(const Pack&, cudaStream_t);
void unpack(const Unpack&, cudaStream_t);
void unpack_backward(const UnpackBackward&, cudaStream_t);
#endif

}  // namespace packseq
