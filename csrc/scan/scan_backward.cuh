// The selective scan's backward: a block walks segments of sequences for its channels, forth for checkpoints and back
// for gradients. What many blocks share is summed afterwards, by scan_sums.cu.
#pragma once
#include <algorithm>

#include "core/launch.h"
#include "scan/scan_fill.cuh"
#include "scan/scan_reverse.cuh"
#include "scan/scan_ties.cuh"

namespace packseq {

struct BackwardParams {
  ScanBackward call;
  ScanGrid grid;
  SegmentTies ties;
  BackwardScratch scratch;
};

// One segment; adds to the thread's shares of the parameters' gradients.
template <class M>
__device__ __forceinline__ void scan_segment_gradients(const BackwardParams& params, Tile tile, const Position<M>& at,
                                                       const ChannelParameters<M>& channel, ParameterGradients<M>& sums,
                                                       char* memory) {
  using X = typename M::X;
  const ScanBackward& call = params.call;
  const ScanProblem& p = call.problem;
  const Walk walk(p, tile);
  const Checkpoints<M> checkpoints(static_cast<X*>(params.scratch.checkpoints), params.scratch.checkpoint_width, walk,
                                   at.block);
  X h[M::kC][M::kS], carry[M::kC][M::kS];
  load_initial_states<M>(h, p, params.ties, walk, at);
  float steps[M::kC] = {};
  walk_states<M, Walking::checkpoints>(p, params.grid, p.u, at, walk, channel,
                                       *reinterpret_cast<WalkShared<M>*>(memory), h, nullptr, &checkpoints, steps);
  load_final_gradients<M>(carry, p, call.dfinal_states, params.ties, walk, at);
  const int64_t share = int64_t(2) * M::kN * p.total * p.groups;
  X* const matrices = static_cast<X*>(params.scratch.matrices);
  const ReverseTargets<M> to = {.du = call.du,
                                .ddelta = call.ddelta,
                                .dz = call.dz,
                                .matrices = matrices ? matrices + at.block_of_group * share : nullptr};
  walk_gradients<M>(p, call.dout, params.grid, at, walk, channel, checkpoints,
                    *reinterpret_cast<ReverseShared<M>*>(memory), carry, to, sums);
  if (call.dinitial_states && walk.segment == 0) {
    store_parameter<M>(carry, call.dinitial_states, walk.sequence * p.channels, at, p.states);
  }
}

// One block's share: a slot's places.
template <class M>
__device__ __forceinline__ void scan_slot(const BackwardParams& params, int32_t slot, int block, char* memory) {
  const ScanProblem& p = params.call.problem;
  const ScanGrid& grid = params.grid;
  const BackwardScratch& scratch = params.scratch;
  const Position<M> at(p, block);
  const ChannelParameters<M> channel(p, at);
  ParameterGradients<M> sums;
  for (int32_t place = slot; place < grid.places; place += grid.slots) {
    const Tile tile = grid.segment(p, place);
    if (tile.sequence >= 0) scan_segment_gradients<M>(params, tile, at, channel, sums, memory);
  }
  const int64_t row0 = int64_t(slot) * p.channels;
  store_parameter<M>(sums.A, scratch.dA, row0, at, p.states);
  if constexpr (M::kAny) {
    if (scratch.dB) store_parameter<M>(sums.B, scratch.dB, row0, at, p.states);
    if (scratch.dC) store_parameter<M>(sums.C, scratch.dC, row0, at, p.states);
  }
#pragma unroll
  for (int c = 0; c < M::kC; ++c) {
    const bool own_token = M::States::index() < M::kGroup;
    float D[1] = {own_token ? sums.D[c] : 0.0f}, delta_bias[1] = {own_token ? sums.delta_bias[c] : 0.0f};
    sum_over_lanes<typename M::States>(D);
    sum_over_lanes<typename M::States>(delta_bias);
    if (at.state == 0 && c < at.mine) {
      scratch.dD[row0 + at.channel + c] = D[0];
      scratch.ddelta_bias[row0 + at.channel + c] = delta_bias[0];
    }
  }
}

__device__ inline Fill fill_of(const ScanBackward& call) {
  const ScanProblem& p = call.problem;
  const int64_t row_bytes = p.channels * int64_t(p.dtype == Dtype::f32 ? 4 : 2);
  return {.rows = {{call.du, row_bytes}, {call.ddelta, row_bytes}, {call.dz, row_bytes}},
          .states = call.dinitial_states,
          .from = call.dfinal_states,
          .state_words = int64_t(p.channels) * p.states * (p.complex ? 2 : 1)};
}

template <class Mapping>
__global__ void __launch_bounds__(kScanThreads, 2) scan_backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(16) char memory[];
  const ScanGrid& grid = params.grid;
  if (blockIdx.x >= grid.blocks()) {
    return fill(fill_of(params.call), params.call.problem, blockIdx.x - grid.blocks());
  }
  scan_slot<ScanMapping<Mapping>>(params, int32_t(blockIdx.x / grid.channel_blocks),
                                  int(blockIdx.x % grid.channel_blocks), memory);
}

template <class Mapping>
void launch_scan_backward(const ScanBackward& call, const ScanGrid& grid, const SegmentTies& ties,
                          const BackwardScratch& scratch, cudaStream_t stream) {
  using M = ScanMapping<Mapping>;
  tie_states<Mapping>(call.problem, grid, ties, stream);
  tie_gradients<Mapping>(call, grid, ties, stream);
  launch("scan backward", scan_backward_kernel<Mapping>, grid.blocks() + kFillBlocks, kScanThreads,
         std::max(sizeof(WalkShared<M>), sizeof(ReverseShared<M>)), stream,
         {.call = call, .grid = grid, .ties = ties, .scratch = scratch});
}

}  // namespace packseq
