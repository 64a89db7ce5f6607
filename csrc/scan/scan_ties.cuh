// What ties the segments of a long sequence: each is walked for the state that it makes of zeros (backwards, for the
// gradient), and for the sum of its steps d, whose decay exp(A sum) it multiplies what comes in with. One thread a
// state then carries states from segment to segment.
#pragma once
#include "core/divide_up.h"
#include "core/launch.h"
#include "core/shared_memory.h"
#include "scan/scan_walk.cuh"

namespace packseq {

// The state that a segment starts from.
template <class M>
__device__ __forceinline__ void load_initial_states(typename M::X (&h)[M::kC][M::kS], const ScanProblem& p,
                                                    const SegmentTies& ties, const Walk& walk, const Position<M>& at) {
  load_parameter<M>(h, walk.split ? ties.states : p.initial_states,
                    (walk.split ? walk.slot() : walk.sequence) * p.channels, at, p.states);
}

// The gradient of the state that a segment ends as.
template <class M>
__device__ __forceinline__ void load_final_gradients(typename M::X (&carry)[M::kC][M::kS], const ScanProblem& p,
                                                     const void* dfinal_states, const SegmentTies& ties,
                                                     const Walk& walk, const Position<M>& at) {
  load_parameter<M>(carry, walk.split ? ties.gradients : dfinal_states,
                    (walk.split ? walk.slot() : walk.sequence) * p.channels, at, p.states);
}

struct TieParams {
  ScanProblem problem;
  ScanGrid grid;
  Rows dout;           // for gradients
  const void* given;   // what the first segment starts from, [sequences, channels, states]; may be nullptr
  void* states;        // of SegmentTies, or its gradients
  float* decay_steps;  // or decay_steps_back
};

// kFor: state or gradient.
template <class Mapping, Walking kFor>
__global__ void __launch_bounds__(kScanThreads, std::is_same_v<typename Mapping::T, AnyType> ? 2 : 4)
    walk_segments_kernel(const __grid_constant__ TieParams params) {
  using M = ScanMapping<Mapping>;
  constexpr bool kGradient = kFor == Walking::gradient;
  extern __shared__ __align__(16) char memory[];
  const ScanProblem& p = params.problem;
  const ScanGrid& grid = params.grid;
  const Tile tile = grid.segment(p, int32_t(blockIdx.x / grid.channel_blocks));
  if (tile.sequence < 0) return;
  const Walk walk(p, tile);
  if (!walk.split || (kGradient ? walk.segment == 0 : walk.last)) return;
  const Position<M> at(p, int(blockIdx.x % grid.channel_blocks));
  const ChannelParameters<M> channel(p, at);
  typename M::X h[M::kC][M::kS] = {};
  float steps[M::kC] = {};
  walk_states<M, kFor>(p, grid, kGradient ? params.dout : p.u, at, kGradient ? walk.backwards() : walk, channel,
                       *reinterpret_cast<WalkShared<M>*>(memory), h, nullptr, nullptr, steps);
  const int64_t row0 = walk.slot() * p.channels;
  store_parameter<M>(h, params.states, row0, at, p.states);
#pragma unroll
  for (int c = 0; c < M::kC; ++c) {
    float sum[1] = {steps[c]};
    sum_over_lanes<typename M::States>(sum);
    if (at.state == 0 && c < at.mine) params.decay_steps[row0 + at.channel + c] = sum[0];
  }
}

inline constexpr int kCombineThreads = 128;

// A thread carries one state of one channel through a sequence's segments: from the first on, for gradients from the
// last back. In place of what a segment adds it leaves what the segment starts from.
template <class X, bool kGradient>
__global__ void __launch_bounds__(kCombineThreads) combine_segments_kernel(const __grid_constant__ TieParams params) {
  const ScanProblem& p = params.problem;
  const int64_t states = int64_t(p.channels) * p.states, blocks = divide_up(states, kCombineThreads);
  const int64_t item = blockIdx.x % blocks * kCombineThreads + threadIdx.x;
  const Tile tile = params.grid.segment(p, int32_t(blockIdx.x / blocks));
  if (tile.sequence < 0 || tile.block != 0 || item >= states) return;
  const Walk walk(p, tile);
  if (!walk.split) return;
  const Span span = span_of(p.cu_seqlens, p.sequences, p.total, walk.sequence);
  const int32_t segments = int32_t(divide_up(span.size(), kSegmentRows));
  const X A = to_exponent(static_cast<const X*>(p.A)[item]);
  X carry = {};
  if (params.given) carry = static_cast<const X*>(params.given)[walk.sequence * states + item];
  for (int32_t i = 0; i < segments; ++i) {
    const int32_t segment = kGradient ? segments - 1 - i : i;
    const int64_t slot = segment_slot(span.begin, segment, segment == segments - 1);
    X& place = static_cast<X*>(params.states)[slot * states + item];
    const X added = place;
    place = carry;
    if (i == segments - 1) break;  // what comes out of it is not needed
    const X a = decay(params.decay_steps[slot * p.channels + item / p.states], A);
    carry = multiply_add(kGradient ? conjugate(a) : a, carry, added);
  }
}

template <class Mapping, Walking kFor>
void tie_segments(const TieParams& params, cudaStream_t stream) {
  const ScanGrid& grid = params.grid;
  if (grid.split_places == 0) return;
  launch("scan: segments", walk_segments_kernel<Mapping, kFor>, int64_t(grid.split_places) * grid.channel_blocks,
         kScanThreads,
         shared_for_even_load("scan: segments", sizeof(WalkShared<ScanMapping<Mapping>>),
                              params.problem.total / kSegmentRows * grid.channel_blocks),
         stream, params);
  const int64_t states = int64_t(params.problem.channels) * params.problem.states;
  launch("scan: tying segments", combine_segments_kernel<typename Mapping::X, kFor == Walking::gradient>,
         grid.split_places * divide_up(states, kCombineThreads), kCombineThreads, 0, stream, params);
}

template <class Mapping>
void tie_states(const ScanProblem& p, const ScanGrid& grid, const SegmentTies& ties, cudaStream_t stream) {
  tie_segments<Mapping, Walking::state>({.problem = p,
                                         .grid = grid,
                                         .dout = {},
                                         .given = p.initial_states,
                                         .states = ties.states,
                                         .decay_steps = ties.decay_steps},
                                        stream);
}

template <class Mapping>
void tie_gradients(const ScanBackward& call, const ScanGrid& grid, const SegmentTies& ties, cudaStream_t stream) {
  tie_segments<Mapping, Walking::gradient>({.problem = call.problem,
                                            .grid = grid,
                                            .dout = call.dout,
                                            .given = call.dfinal_states,
                                            .states = ties.gradients,
                                            .decay_steps = ties.decay_steps_back},
                                           stream);
}

}  // namespace packseq
