// Attention in true float32 on the GPU, host side.
#include <algorithm>

#include "attention/attention_f32.h"
#include "attention/backward_f32.cuh"
#include "attention/forward_f32.cuh"
#include "core/check.h"
#include "core/dispatch.h"
#include "core/launch.h"

namespace packseq {
namespace {

// f(padded head dim): head dims are padded with zeros that are never stored.
template <class F>
void dispatch_dim(const AttentionProblem& p, const F& f) {
  const int dim = std::max(p.dim, p.dim_v);
  check(dim <= 256, "attention: head dims must be at most 256, got ", p.dim, " and ", p.dim_v);
  dispatch<64, 128, 256>("padded head dim", dim <= 64 ? 64 : dim <= 128 ? 128 : 256, f);
}

// Threads of a block, and how many blocks a multiprocessor should hold. Wide sums leave room for fewer rows a thread.
struct Shape {
  int threads, blocks;
};
constexpr Shape query_shape(int dim) { return dim <= 128 ? Shape{128, 3} : Shape{256, 1}; }  // forward and dq
constexpr Shape key_shape(int dim) { return dim <= 128 ? Shape{128, 2} : Shape{256, 1}; }    // dk and dv

// Bytes of shared memory: tiles of scores, two stages, facts.
template <class T, class Facts>
constexpr size_t shared_bytes(int score_tiles) {
  return (score_tiles * T::kScores + 2 * T::kStage) * sizeof(float) + sizeof(Facts);
}

}  // namespace

void attention_forward_f32(const AttentionForward& call, const Tile* q_tiles, int64_t q_places, cudaStream_t stream) {
  dispatch_dim(call.problem, [&](auto dim) {
    constexpr Shape kShape = query_shape(dim);
    using T = FfmaTile<dim, kShape.threads>;
    launch("attention forward", f32::forward_kernel<T, kShape.blocks>, q_places * call.problem.heads, T::kThreads,
           shared_bytes<T, f32::Facts>(1), stream, {.call = call, .tiles = q_tiles});
  });
}

void attention_backward_f32(const AttentionBackward& call, const float* delta, const Tile* q_tiles, int64_t q_places,
                            const Tile* k_tiles, int64_t k_places, cudaStream_t stream) {
  const AttentionProblem& p = call.problem;
  dispatch_dim(p, [&](auto dim) {
    constexpr Shape kKeys = key_shape(dim), kQueries = query_shape(dim);
    using K = FfmaTile<dim, kKeys.threads>;
    using Q = FfmaTile<dim, kQueries.threads>;
    launch("attention backward, dk and dv", f32::dkv_kernel<K, kKeys.blocks>, k_places * p.kv_heads, K::kThreads,
           shared_bytes<K, f32::DkvFacts>(2), stream, {.call = call, .delta = delta, .tiles = k_tiles});
    launch("attention backward, dq", f32::dq_kernel<Q, kQueries.blocks>, q_places * p.heads, Q::kThreads,
           shared_bytes<Q, f32::DqFacts>(1), stream, {.call = call, .delta = delta, .tiles = q_tiles});
  });
}

}  // namespace packseq
