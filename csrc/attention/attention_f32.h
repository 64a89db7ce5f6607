// What the host needs of the float32 kernels.
#pragma once
#include <cuda_runtime_api.h>

#include "attention/attention.h"
#include "core/schedule.h"

namespace packseq {

// Rows of a tile of queries and of a tile of keys.
inline constexpr int kF32Rows = 64;

void attention_forward_f32(const AttentionForward&, const Tile* q_tiles, int64_t q_places, cudaStream_t);

// `delta` [heads, total_q] is rowsum(dout * out) - dlse.
void attention_backward_f32(const AttentionBackward&, const float* delta, const Tile* q_tiles, int64_t q_places,
                            const Tile* k_tiles, int64_t k_places, cudaStream_t);

}  // namespace packseq
