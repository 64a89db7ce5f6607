// The packed layout: tokens first, sequence i owns rows cu_seqlens[i] : cu_seqlens[i + 1].
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PACKSEQ_HOST_DEVICE __host__ __device__ __forceinline__
#else  // inlined for certain, so that no copy made for one instruction set is shared with others (core/cpu/isa.h)
#define PACKSEQ_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace packseq {

// A packed tensor [total, heads, dim]: element (t, h, d) is data[t * token + h * head + d].
struct Packed {
  const void* data;
  int64_t token;  // elements from one token to the next
  int64_t head;   // elements from one head to the next
};

// A packed tensor [total, width]: element (t, c) is data[t * token + c].
struct Rows {
  const void* data;
  int64_t token;  // elements from one token to the next
};

struct Span {
  int64_t begin, end;
  PACKSEQ_HOST_DEVICE int64_t size() const { return end - begin; }
};

// Rows of sequence i. Whatever cu_seqlens holds, the span lies within [0, total): a malformed vector
// gives wrong rows, never rows of somebody else's memory. Sequence `sequences` is the slack after the last one.
PACKSEQ_HOST_DEVICE Span span_of(const int32_t* cu_seqlens, int64_t sequences, int64_t total, int64_t i) {
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  const int64_t begin = clamp(cu_seqlens[i], 0, total);
  const int64_t end = i == sequences ? total : clamp(cu_seqlens[i + 1], begin, total);
  return {begin, end};
}

}  // namespace packseq
