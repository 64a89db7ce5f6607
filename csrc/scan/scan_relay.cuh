// The forward over sequences that are long: a warp's lanes hold too few states for one warp a sequence to fill a GPU.
//
// Only h = a h + x has to wait for the token before. So warps of a block take turns over groups of tokens of the same
// channels: each computes a and x of its group, waits for the state that the warp before leaves in shared memory,
// goes over its tokens, hands the state on, and makes outputs of what it has kept. A group's arithmetic is what it
// would be with one warp, and so are its results.
//
// Segments of a sequence are tied the same way, through global memory: a block waits for the one that has the segment
// before. So more blocks than there are channels' worth share a sequence, wherever they run.
//
// Rows come 16 bytes at a time. Tensors that do not lie so take the other way over segments, with other roundings.
#pragma once
#include "core/device/named_barrier.cuh"
#include "core/device/turns.cuh"
#include "core/launch.h"
#include "scan/scan_walk.cuh"

namespace packseq {

inline constexpr int kRelayWarps = 8, kRelayThreads = 32 * kRelayWarps;

struct RelayParams {
  ScanForward call;
  ScanGrid grid;
  SegmentTies ties;
};

// A state as it goes from warp to warp, each lane's to the same lane.
template <class M>
class Baton {
  static constexpr int kStates = M::kC * M::kS, kRun = kStates < 4 ? kStates : 4;
  using Run = Few<float, kRun>;

 public:
  __device__ void put(const float (&h)[M::kC][M::kS]) {
#pragma unroll
    for (int i = 0; i < kStates / kRun; ++i) {
      Run run;
#pragma unroll
      for (int k = 0; k < kRun; ++k) run.x[k] = h[(i * kRun + k) / M::kS][(i * kRun + k) % M::kS];
      runs_[i][threadIdx.x % 32] = run;
    }
  }
  __device__ void get(float (&h)[M::kC][M::kS]) const {
#pragma unroll
    for (int i = 0; i < kStates / kRun; ++i) {
      const Run run = runs_[i][threadIdx.x % 32];
#pragma unroll
      for (int k = 0; k < kRun; ++k) h[(i * kRun + k) / M::kS][(i * kRun + k) % M::kS] = run.x[k];
    }
  }

 private:
  Run runs_[kStates / kRun][32];
};

// Inputs of a warp's groups of tokens: a lane copies, 16 bytes at a time, the same pieces of each group.
template <class M>
class RelayInputs {
  using T = typename M::T;
  using Bits = typename Element<T>::Bits;
  static constexpr int kRun = 16 / sizeof(Bits), kOfRow = M::kWarpChannels / kRun, kOfMatrix = M::kN / kRun;
  static constexpr int kRowRounds = (3 * M::kGroup * kOfRow + 31) / 32, kMatrixRounds = 2 * M::kGroup * kOfMatrix / 32;
  using Run = Few<Bits, kRun>;

 public:
  struct alignas(16) Slot {
    Run rows[kRowRounds][32];  // of u, delta and z, [3][kGroup][kWarpChannels]
    Run matrices[kMatrixRounds][32];
  };
  using Matrices = float[2][M::kGroup][M::kN];

  __device__ RelayInputs(const ScanProblem& p, const Position<M>& at, const Walk& walk, int group) {
    const int lane = threadIdx.x % 32;
    const auto begin = [&](const char* data, int64_t stride, int token, int64_t item, bool there) -> Source {
      constexpr int kBytes = sizeof(Bits);
      return {.from = data + (walk.row(group * M::kGroup + token) * stride + item) * kBytes,
              .step = kRelayWarps * M::kGroup * walk.direction * int32_t(stride) * kBytes,
              .tokens = there && data ? walk.count - token : 0};
    };
#pragma unroll
    for (int i = 0; i < kRowRounds; ++i) {
      const int piece = i * 32 + lane, tensor = piece / (M::kGroup * kOfRow), item = piece % kOfRow * kRun;
      const void* const data = tensor == 0 ? p.u.data : tensor == 1 ? p.delta.data : p.z.data;
      const int64_t stride = tensor == 0 ? p.u.token : tensor == 1 ? p.delta.token : p.z.token;
      rows_[i] = begin(static_cast<const char*>(data), stride, piece / kOfRow % M::kGroup,
                       at.channel - at.in_warp + item, tensor < 3 && item < at.of_warp);
    }
#pragma unroll
    for (int i = 0; i < kMatrixRounds; ++i) {
      const int piece = i * 32 + lane, item = piece % kOfMatrix * kRun;
      const bool is_B = piece < M::kGroup * kOfMatrix;
      matrices_[i] = begin(static_cast<const char*>(is_B ? p.B.tokens.data : p.C.tokens.data),
                           is_B ? p.B.tokens.token : p.C.tokens.token, piece / kOfMatrix % M::kGroup,
                           at.group * (is_B ? p.B.tokens.head : p.C.tokens.head) + item, true);
    }
  }

  // The lane's own token of tensor 0, 1 or 2: u, delta or z.
  using Own = typename InputRows<M, M::kGroup>::Values;
  static __device__ Own own(const Slot& slot, int tensor, const Position<M>& at) {
    using Tensor = typename InputRows<M, M::kGroup>::Slot;
    return InputRows<M, M::kGroup>::at(reinterpret_cast<const Tensor*>(slot.rows)[tensor], at.token, at);
  }

  // Starts copying those of group `group`, and goes on to the warp's next; zeros beyond the last token or channel.
  __device__ void fetch(Slot& slot, int group) {
#pragma unroll
    for (int i = 0; i < kRowRounds; ++i) copy(slot.rows[i], rows_[i], group);
#pragma unroll
    for (int i = 0; i < kMatrixRounds; ++i) copy(slot.matrices[i], matrices_[i], group);
    copy_async_commit();
  }
  // Puts the lane's share of B and C, once it is there, where all lanes read them.
  static __device__ void put(const Slot& slot, Matrices& matrices) {
#pragma unroll
    for (int i = 0; i < kMatrixRounds; ++i) {
      const Run run = slot.matrices[i][threadIdx.x % 32];
      const Own* const pairs = reinterpret_cast<const Own*>(run.x);
      Few<float, kRun> states;
#pragma unroll
      for (int k = 0; k < kRun; ++k) states.x[k] = pairs[k / 2][k % 2];
      *reinterpret_cast<Few<float, kRun>*>(&matrices[0][0][0] + (i * 32 + threadIdx.x % 32) * kRun) = states;
    }
  }

 private:
  struct Source {
    const char* from;
    int32_t step;
    int32_t tokens;  // from the lane's first one on
  };
  static __device__ void copy(Run (&to)[32], Source& source, int group) {
    copy_async_16(uint32_t(__cvta_generic_to_shared(&to[threadIdx.x % 32])), source.from,
                  group * M::kGroup < source.tokens);
    source.from += source.step;
  }

  Source rows_[kRowRounds], matrices_[kMatrixRounds];
};

template <class M>
struct RelayShared {
  struct alignas(16) OfWarp {
    typename RelayInputs<M>::Slot inputs[2];
    typename RelayInputs<M>::Matrices matrices;
    float2 steps[M::kGroup][M::kWarpChannels];  // d, d u
    LaneSums<M> sums;
    Baton<M> baton;  // what the warp's next group starts from
  };
  OfWarp warps[kRelayWarps];
};

// The baton of warp `warp` is there, or is put there: a barrier of the two. Nobody is two turns ahead, since the state
// has to come round first.
__device__ __forceinline__ void take_baton(int warp) { named_barrier(1 + warp, 64); }
// The same in a loop that ends at once: the assembler would put what is to be ready by then, and could be while one
// waits, behind a mere barrier.
__device__ __forceinline__ void take_baton_in_a_loop(int warp, int positive) {
  int again;
  do {
    take_baton(warp);
    asm volatile("shr.u32 %0, %1, 31;" : "=r"(again) : "r"(positive));
  } while (again);
}
__device__ __forceinline__ void pass_baton(int warp) { arrive_at_named_barrier(1 + warp, 64); }

template <class M>
__device__ __forceinline__ void relay_segment(const RelayParams& params, const Walk& walk, int block,
                                              RelayShared<M>& shared) {
  static_assert(!M::kAny && M::kL == M::kGroup && M::kWarps == 1 && 1 + kRelayWarps <= 16);
  constexpr int kC = M::kC, kS = M::kS, kGroup = M::kGroup;
  using Steps = Few<float2, kC>;
  const ScanProblem& p = params.call.problem;
  const SegmentTies& ties = params.ties;
  const Position<M> at(p, block);
  const ChannelParameters<M> channel(p, at);
  const int warp = threadIdx.x / 32, next = (warp + 1) % kRelayWarps, groups = (walk.count + kGroup - 1) / kGroup;
  const bool has_z = p.z.data, soft = p.delta_softplus;
  const int own_rows = at.mine > 0 ? walk.count - at.token : 0;  // from the lane's first token on
  auto& own = shared.warps[warp];

  RelayInputs<M> inputs(p, at, walk, warp);
  OutputPlace<M, int32_t> to(p, at, walk, warp, kRelayWarps);
  // Whether the state that a segment starts from is in its slot.
  const auto passed = [&](int64_t slot) { return ties.passed + slot * params.grid.channel_blocks + block; };

  inputs.fetch(own.inputs[0], warp);
  if (next == 0) {
    const bool tied = walk.segment > 0;
    if (tied) await_turn(passed(walk.slot()), 1);
    float h[kC][kS];
    load_parameter<M>(h, tied ? ties.states : p.initial_states, (tied ? walk.slot() : walk.sequence) * p.channels, at,
                      p.states);
    shared.warps[0].baton.put(h);
    pass_baton(0);
  }
  int slot = 0;
  for (int group = warp; group < groups; group += kRelayWarps, slot ^= 1) {
    inputs.fetch(own.inputs[slot ^ 1], group + kRelayWarps);
    copy_async_wait<1>();
    __syncwarp();
    const auto& in = own.inputs[slot];
    const auto u_of = RelayInputs<M>::own(in, 0, at), delta_of = RelayInputs<M>::own(in, 1, at),
               z_of = RelayInputs<M>::own(in, 2, at);
    const bool valid = group * kGroup < own_rows;
    Steps steps;
    float gate[kC];
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const float step = softplus<Element<typename M::T>::kExact>(delta_of[c] + channel.delta_bias[c], soft),
                  d = select(valid, step, 0.0f);  // beyond the end: decay 1, input 0
      steps.x[c] = {d, d * u_of[c]};
      gate[c] = select(has_z, z_of[c] * sigmoid(z_of[c]), 1.0f);
    }
    *reinterpret_cast<Steps*>(&own.steps[at.token][at.in_warp]) = steps;
    RelayInputs<M>::put(in, own.matrices);
    __syncwarp();

    float a[kGroup][kC][kS], h[kGroup][kC][kS];
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      float B[kS];
      load_states<M>(B, own.matrices[0][t], at);
      const auto step = *reinterpret_cast<const Steps*>(&own.steps[t][at.in_warp]);
#pragma unroll
      for (int c = 0; c < kC; ++c)
#pragma unroll
        for (int j = 0; j < kS; ++j) {
          a[t][c][j] = decay(step.x[c].x, channel.A[c][j]);
          h[t][c][j] = scaled(step.x[c].y, B[j]);
        }
    }
    take_baton_in_a_loop(warp, p.channels);
    float before[kC][kS];
    own.baton.get(before);
#pragma unroll
    for (int t = 0; t < kGroup; ++t)
#pragma unroll
      for (int c = 0; c < kC; ++c)
#pragma unroll
        for (int j = 0; j < kS; ++j) {
          h[t][c][j] = multiply_add(a[t][c][j], t == 0 ? before[c][j] : h[t == 0 ? 0 : t - 1][c][j], h[t][c][j]);
        }
    shared.warps[next].baton.put(h[kGroup - 1]);
    pass_baton(next);

    float y[kC][kGroup] = {}, out[kC];
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      float C[kS];
      load_states<M>(C, own.matrices[1][t], at);
#pragma unroll
      for (int c = 0; c < kC; ++c)
#pragma unroll
        for (int j = 0; j < kS; ++j) y[c][t] = add_product(C[j], h[t][c][j], y[c][t]);
    }
    own.sums.put(y);
    __syncwarp();
    own.sums.get(out, at.token);
#pragma unroll
    for (int c = 0; c < kC; ++c) out[c] = fmaf(channel.D[c], u_of[c], out[c]) * gate[c];
    to.store(params.call.out, out, valid);
    to.next();
  }
  copy_async_wait<0>();
  if (warp == groups % kRelayWarps) {
    take_baton(warp);
    float h[kC][kS];
    own.baton.get(h);
    if (walk.last) {
      if (params.call.final_states) {
        store_parameter<M>(h, params.call.final_states, walk.sequence * p.channels, at, p.states);
      }
    } else {
      const int64_t slot_behind = segment_slot(walk.begin, walk.segment + 1, walk.last_but_one);
      store_parameter<M>(h, ties.states, slot_behind * p.channels, at, p.states);
      settle_additions();
      pass_turn(passed(slot_behind), 1);
    }
  }
}

template <class Mapping>
__global__ void __launch_bounds__(kRelayThreads, 2) scan_relay_kernel(const __grid_constant__ RelayParams params) {
  using M = ScanMapping<Mapping>;
  extern __shared__ __align__(16) char memory[];
  const ScanProblem& p = params.call.problem;
  const ScanGrid& grid = params.grid;
  const Tile tile = grid.segment(p, int32_t(blockIdx.x / grid.channel_blocks));
  if (tile.sequence < 0) return;
  const Walk walk(p, tile);
  if (!walk.relayed) return;
  relay_segment<M>(params, walk, int(blockIdx.x % grid.channel_blocks), *reinterpret_cast<RelayShared<M>*>(memory));
}

template <class Mapping>
void launch_scan_relay(const ScanForward& call, const ScanGrid& grid, const SegmentTies& ties, cudaStream_t stream) {
  const ScanProblem& p = call.problem;
  ScanGrid of_relay = grid;
  of_relay.channel_blocks = channel_blocks<Mapping>(p);
  const size_t bytes = size_t(segment_slots(p.total)) * of_relay.channel_blocks * sizeof(int);
  check_cuda(cudaMemsetAsync(ties.passed, 0, bytes, stream), "scan relay");
  launch("scan relay", scan_relay_kernel<Mapping>, int64_t(grid.relay_places) * of_relay.channel_blocks, kRelayThreads,
         sizeof(RelayShared<ScanMapping<Mapping>>), stream, {.call = call, .grid = of_relay, .ties = ties});
}

}  // namespace packseq
