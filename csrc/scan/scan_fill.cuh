// What the walks leave out: rows after the last sequence, and sequences without rows.
#pragma once
#include <cstdint>

#include "core/packed.h"
#include "scan/scan.h"

namespace packseq {

inline constexpr int kFillBlocks = 128;  // at the end of a kernel's grid

struct Fill {
  struct {
    void* data;         // [total, row_bytes], nullptr for none
    int64_t row_bytes;  // a multiple of 2
  } rows[3];            // slack rows become zeros
  void* states;         // [sequences, state_words] of 4 bytes: those of empty sequences are copied, may be nullptr
  const void* from;     // nullptr for zeros
  int64_t state_words;
};

// Zeros to bytes begin ... end, which are even.
__device__ inline void fill_zeros(char* data, int64_t begin, int64_t end, int64_t thread, int64_t threads) {
  const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(data) % 16);
  const int64_t body = min(end, (begin + offset + 15) / 16 * 16 - offset), units = (end - body) / 16;
  const int64_t tail = body + units * 16;
  for (int64_t i = thread; i < units; i += threads) reinterpret_cast<uint4*>(data + body)[i] = uint4{};
  if (thread < 8) {
    for (int64_t i = begin + 2 * thread; i < body; i += 16) *reinterpret_cast<uint16_t*>(data + i) = 0;
    for (int64_t i = tail + 2 * thread; i < end; i += 16) *reinterpret_cast<uint16_t*>(data + i) = 0;
  }
}

// By `kFillBlocks` blocks of which this is number `block`.
__device__ inline void fill(const Fill& f, const ScanProblem& p, int64_t block) {
  const int64_t thread = block * blockDim.x + threadIdx.x, threads = int64_t(kFillBlocks) * blockDim.x;
  const int64_t slack = span_of(p.cu_seqlens, p.sequences, p.total, p.sequences).begin;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (f.rows[i].data) {
      const int64_t row_bytes = f.rows[i].row_bytes;
      fill_zeros(static_cast<char*>(f.rows[i].data), slack * row_bytes, p.total * row_bytes, thread, threads);
    }
  }
  if (!f.states) return;
  for (int64_t i = block; i < p.sequences; i += kFillBlocks) {
    if (span_of(p.cu_seqlens, p.sequences, p.total, i).size() != 0) continue;
    for (int64_t k = i * f.state_words + threadIdx.x; k < (i + 1) * f.state_words; k += blockDim.x) {
      static_cast<uint32_t*>(f.states)[k] = f.from ? static_cast<const uint32_t*>(f.from)[k] : 0;
    }
  }
}

}  // namespace packseq
