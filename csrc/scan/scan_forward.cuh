// The selective scan's forward: a block walks one segment of a sequence for its channels, but for sequences that are
// relayed (scan_relay.cuh).
#pragma once
#include <algorithm>

#include "core/launch.h"
#include "core/shared_memory.h"
#include "scan/scan_fill.cuh"
#include "scan/scan_relay.cuh"
#include "scan/scan_ties.cuh"

namespace packseq {

struct ForwardParams {
  ScanForward call;
  ScanGrid grid;
  SegmentTies ties;
};

template <class M>
__device__ __forceinline__ void scan_segment(const ForwardParams& params, Tile tile, int block, char* memory) {
  const ScanProblem& p = params.call.problem;
  const Position<M> at(p, block);
  const Walk walk(p, tile);
  if (kHasRelay<M> && walk.relayed && params.grid.relay_places > 0) return;
  const ChannelParameters<M> channel(p, at);
  typename M::X h[M::kC][M::kS];
  load_initial_states<M>(h, p, params.ties, walk, at);
  float steps[M::kC] = {};
  walk_states<M, Walking::outputs>(p, params.grid, p.u, at, walk, channel, *reinterpret_cast<WalkShared<M>*>(memory), h,
                                   params.call.out, nullptr, steps);
  if (params.call.final_states && walk.last) {
    store_parameter<M>(h, params.call.final_states, walk.sequence * p.channels, at, p.states);
  }
}

__device__ inline Fill fill_of(const ScanForward& call) {
  const ScanProblem& p = call.problem;
  const int64_t row_bytes = p.channels * int64_t(p.dtype == Dtype::f32 ? 4 : 2);
  return {.rows = {{call.out, row_bytes}},
          .states = call.final_states,
          .from = p.initial_states,
          .state_words = int64_t(p.channels) * p.states * (p.complex ? 2 : 1)};
}

template <class Mapping>
__global__ void __launch_bounds__(kScanThreads, std::is_same_v<typename Mapping::T, AnyType> ? 2 : 4)
    scan_forward_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(16) char memory[];
  const ScanProblem& p = params.call.problem;
  const ScanGrid& grid = params.grid;
  if (blockIdx.x >= grid.blocks()) return fill(fill_of(params.call), p, blockIdx.x - grid.blocks());
  const Tile tile = grid.segment(p, int32_t(blockIdx.x / grid.channel_blocks));
  if (tile.sequence < 0) return;
  scan_segment<ScanMapping<Mapping>>(params, tile, int(blockIdx.x % grid.channel_blocks), memory);
}

template <class Mapping>
void launch_scan_forward(const ScanForward& call, const ScanGrid& grid, const SegmentTies& ties, cudaStream_t stream) {
  const ScanProblem& p = call.problem;
  if constexpr (kHasRelay<Mapping>) {
    if (grid.relay_places > 0) launch_scan_relay<RelayMapping<typename Mapping::T>>(call, grid, ties, stream);
  }
  if (grid.relay_places == 0) tie_states<Mapping>(p, grid, ties, stream);
  const int64_t segments = std::max(p.sequences, p.total / kSegmentRows);  // about
  launch("scan forward", scan_forward_kernel<Mapping>, grid.blocks() + kFillBlocks, kScanThreads,
         shared_for_even_load("scan forward", sizeof(WalkShared<ScanMapping<Mapping>>), segments * grid.channel_blocks),
         stream, {.call = call, .grid = grid, .ties = ties});
}

}  // namespace packseq
