// The recurrence over one sequence, in the order of its tokens: what the forward does, and the first half of the
// backward, which wants the state every kChunk tokens instead of outputs.
//
// B and C come through shared memory a tile of tokens at a time, fetched one tile ahead. Everything else
// is a warp's own affair: its lanes load u, delta and z some groups of tokens ahead, make steps (d, d u) of the next
// group while the states of this one are computed, and gate and store the outputs they end up with. Decays do not wait
// for the state, so a group's special functions are all ready to go.
#pragma once
#include "core/device/async_copy.cuh"
#include "scan/scan_tile.cuh"

namespace packseq {

inline constexpr int kInputSlots = 8;  // groups of tokens whose u, delta and z are there or under way

template <class M>
struct alignas(16) WalkShared {
  typename MatrixTiles<M, M::kTile>::Buffer matrices[2];
  typename MatrixTiles<M, M::kTile>::Stage matrix_stage;
  float2 steps[kScanWarps][2][M::kGroup][M::kWarpChannels];  // d, d u
  typename Column<M>::Values u[kInputSlots][kScanThreads], delta[kInputSlots][kScanThreads],
      z[kInputSlots][kScanThreads];
};

// B and C where they are the same for all tokens, C times kOutputFactor.
template <class M>
struct ConstantMatrices {
  using X = typename M::X;
  bool has_B = false, has_C = false;
  X B[M::kC][M::kS], C[M::kC][M::kS];

  __device__ ConstantMatrices(const ScanProblem& p, const Position<M>& at) {
    if constexpr (M::kAny) {
      static_assert(M::kC == 1);
      has_B = p.B.constants, has_C = p.C.constants;
      load_parameter<M>(B, p.B.constants, 0, at, p.states);
      load_parameter<M>(C, p.C.constants, 0, at, p.states);
#pragma unroll
      for (int j = 0; j < M::kS; ++j) C[0][j] = scaled(kOutputFactor<X>, C[0][j]);
    }
  }

  // B and C of a token, from its rows of the tile or from here.
  __device__ void load_B(X (&x)[M::kS], const X* row, const Position<M>& at) const { load(x, row, at, has_B, B); }
  __device__ void load_C(X (&x)[M::kS], const X* row, const Position<M>& at) const { load(x, row, at, has_C, C); }

 private:
  static __device__ void load(X (&x)[M::kS], const X* row, const Position<M>& at, bool constant,
                              const X (&constants)[M::kC][M::kS]) {
    load_states<M>(x, row, at);
    if constexpr (M::kAny) {
#pragma unroll
      for (int j = 0; j < M::kS; ++j) x[j] = constant ? constants[0][j] : x[j];
    }
  }
};

// What a thread needs of the parameters of its channels.
template <class M>
struct ChannelParameters {
  typename M::X A[M::kC][M::kS];  // in decay()'s units
  float delta_bias[M::kC], D[M::kC];

  __device__ ChannelParameters(const ScanProblem& p, const Position<M>& at) {
    load_parameter<M>(A, p.A, 0, at, p.states);
#pragma unroll
    for (int c = 0; c < M::kC; ++c)
#pragma unroll
      for (int j = 0; j < M::kS; ++j) A[c][j] = to_exponent(A[c][j]);
    load_vector<M>(delta_bias, p.delta_bias, at);
    load_vector<M>(D, p.D, at);
  }
};

// A thread's states every kChunk tokens, in the workspace: whoever wrote one reads it, so any order will do, and this
// one is contiguous over a block's threads.
template <class M>
class Checkpoints {
  using X = typename M::X;
  static constexpr int kStates = M::kC * M::kS, kRun = kStates < int(16 / sizeof(X)) ? kStates : int(16 / sizeof(X));
  using Run = Few<X, kRun>;

 public:
  // width: of one checkpoint of all channels, in states. Sequence i's begin at number cu_seqlens[i] / kChunk + i.
  __device__ Checkpoints(X* data, int64_t width, const Walk& walk, int block)
      : width_(width),
        at_(data + (walk.begin / M::kChunk + walk.sequence + walk.segment * (kSegmentRows / M::kChunk)) * width +
            int64_t(block) * kScanThreads * kStates + threadIdx.x * kRun) {}

  __device__ void write(int chunk, const X (&h)[M::kC][M::kS]) const {
    X* const to = at_ + chunk * width_;
#pragma unroll
    for (int i = 0; i < kStates; i += kRun) {
      Run run;
#pragma unroll
      for (int k = 0; k < kRun; ++k) run.x[k] = h[(i + k) / M::kS][(i + k) % M::kS];
      *reinterpret_cast<Run*>(to + i * kScanThreads) = run;
    }
  }
  // Starts copying a checkpoint to the thread's place in shared memory; read() waits for it and for whatever else was.
  using Slot = Run[kStates / kRun][kScanThreads];
  __device__ void fetch(int chunk, Slot& slot) const {
    const X* const from = at_ + chunk * width_;
#pragma unroll
    for (int i = 0; i < kStates / kRun; ++i) {
      const uint32_t to = uint32_t(__cvta_generic_to_shared(&slot[i][threadIdx.x]));
      const char* const run = reinterpret_cast<const char*>(from + i * kRun * kScanThreads);
      if constexpr (sizeof(Run) == 16) {
        copy_async_16(to, run, true);
      } else {
#pragma unroll
        for (int byte = 0; byte < int(sizeof(Run)); byte += 4) copy_async_4(to + byte, run + byte, true);
      }
    }
    copy_async_commit();
  }
  __device__ void read(const Slot& slot, X (&h)[M::kC][M::kS]) const {
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < kStates; i += kRun) {
      const Run run = slot[i / kRun][threadIdx.x];
#pragma unroll
      for (int k = 0; k < kRun; ++k) h[(i + k) / M::kS][(i + k) % M::kS] = run.x[k];
    }
  }

 private:
  const int64_t width_;
  X* const at_;
};

// What a walk is for: outputs, checkpoints, the final state alone, or, with dout in place of u and the rows walked
// backwards, the gradient of the state that stands before them.
enum class Walking { outputs, checkpoints, state, gradient };

// Walks a segment from state (or gradient) h, which becomes what it ends as. `out` is for outputs, `checkpoints` for
// those, steps_sum becomes the sum of d over the lane's tokens.
template <class M, Walking kFor>
__device__ __forceinline__ void walk_states(const ScanProblem& p, const ScanGrid& grid, const Rows& u_rows,
                                            const Position<M>& at, const Walk& walk, const ChannelParameters<M>& params,
                                            WalkShared<M>& shared, typename M::X (&h)[M::kC][M::kS], void* out,
                                            const Checkpoints<M>* checkpoints, float (&steps_sum)[M::kC]) {
  using X = typename M::X;
  constexpr int kC = M::kC, kS = M::kS, kGroup = M::kGroup, kTileGroups = M::kTile / kGroup;
  constexpr int kUnrolled = kTileGroups < 4 ? kTileGroups : 4;  // groups
  static_assert(M::kAny || kTileGroups > kInputSlots - 2);      // a tile later the next one's B and C are there
  static_assert(kTileGroups % kUnrolled == 0 && kUnrolled % 2 == 0 && kUnrolled * kGroup % M::kChunk == 0);
  const int groups = (walk.count + kGroup - 1) / kGroup;
  const float threshold = softplus_threshold(p.delta_softplus);
  constexpr bool kOutputs = kFor == Walking::outputs, kGradient = kFor == Walking::gradient,
                 kGates = kOutputs || kGradient;
  const bool has_z = kGates && p.z.data;
  const bool own_token = M::States::index() < kGroup;  // further lanes repeat what the first ones do
  const ConstantMatrices<M> constants(p, at);
  Column<M> u(u_rows, p.dtype, at, walk, 0, 1), delta(p.delta, p.dtype, at, walk, 0, 1),
      z(p.z, p.dtype, at, walk, 0, 1);
  Column<M> to({out, p.channels}, p.dtype, at, walk, 0, 1);
  const auto valid = [&](int group) { return group * kGroup + at.token < walk.count; };

  // A lane copies its own values, so none waits for another's.
  const auto fetch = [&](int group) {
    const int slot = group % kInputSlots;
    u.fetch(shared.u[slot][threadIdx.x], valid(group), at.mine);
    delta.fetch(shared.delta[slot][threadIdx.x], valid(group), at.mine);
    if constexpr (kGates) z.fetch(shared.z[slot][threadIdx.x], valid(group) && has_z, at.mine);
    copy_async_commit();
  };
  const auto stage = [&](int group, float2(&steps)[kGroup][M::kWarpChannels]) {
    const auto u_of = shared.u[group % kInputSlots][threadIdx.x];
    const auto delta_of = shared.delta[group % kInputSlots][threadIdx.x];
    const auto z_of = kGradient ? shared.z[group % kInputSlots][threadIdx.x] : delta_of;
    Few<float2, kC> step;
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const float x = delta_of[c] + params.delta_bias[c];
      float d = softplus<Element<typename M::T>::kExact, false>(x, threshold).value;
      d = select(valid(group) && c < at.mine, d, 0.0f);  // beyond the end: decay 1, input 0
      float pushed = d * u_of[c];
      if constexpr (kGradient) {  // what the gate leaves of dout
        pushed = select(has_z, u_of[c] * (z_of[c] * sigmoid(z_of[c])), u_of[c]);
      }
      step.x[c] = {d, pushed};
      if constexpr (kFor == Walking::state || kGradient) steps_sum[c] += own_token ? d : 0.0f;
    }
    if (own_token) *reinterpret_cast<Few<float2, kC>*>(&steps[at.token][at.in_warp]) = step;
  };

  __syncthreads();  // whoever used the shared memory before is done
  MatrixTiles<M, M::kTile> matrices(p, at.group, walk, grid.aligned_matrices, 0, 1);
  matrices.fetch(shared.matrix_stage);
#pragma unroll
  for (int group = 0; group < kInputSlots - 1; ++group) fetch(group);
  copy_async_wait<kInputSlots - 2>();
  matrices.put(shared.matrix_stage, shared.matrices[0]);
  stage(0, shared.steps[at.warp][0]);
  __syncthreads();

  for (int tile = 0; tile * kTileGroups < groups; ++tile) {
    const auto& matrix = shared.matrices[tile % 2].matrix;
    const bool more = (tile + 1) * kTileGroups < groups;
    if (more) matrices.fetch(shared.matrix_stage);  // with the copies of the tile's first group
#pragma unroll 1
    for (int part = 0; part < kTileGroups && tile * kTileGroups + part < groups; part += kUnrolled) {
#pragma unroll
      for (int r = 0; r < kUnrolled; ++r) {
        const int group = tile * kTileGroups + part + r;
        fetch(group + kInputSlots - 1);
        copy_async_wait<kInputSlots - 2>();  // the next group's
        __syncwarp();                        // this group's steps are there, and the buffer of the one before is free
        stage(group + 1, shared.steps[at.warp][(r + 1) % 2]);
        if constexpr (kFor == Walking::checkpoints) {
          if (r * kGroup % M::kChunk == 0 && group < groups) checkpoints->write(group * kGroup / M::kChunk, h);
        }
        float y[kC][kGroup] = {};
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          const int row = (part + r) * kGroup + t;
          X B[kS], C[kS];
          if constexpr (!kGradient) constants.load_B(B, matrix[0][row], at);
          if constexpr (kGates) constants.load_C(C, matrix[1][row], at);
          const auto step = *reinterpret_cast<const Few<float2, kC>*>(&shared.steps[at.warp][r % 2][t][at.in_warp]);
#pragma unroll
          for (int c = 0; c < kC; ++c)
#pragma unroll
            for (int j = 0; j < kS; ++j) {
              const X a = decay(step.x[c].x, params.A[c][j]);
              if constexpr (kGradient) {
                h[c][j] = times_conjugate(multiply_add(step.x[c].y, conjugate(C[j]), h[c][j]), a);
              } else {
                h[c][j] = multiply_add(a, h[c][j], scaled(step.x[c].y, B[j]));
              }
              if constexpr (kOutputs) y[c][t] = add_product(C[j], h[c][j], y[c][t]);
            }
        }
        if constexpr (kOutputs) {
          const auto u_of = shared.u[group % kInputSlots][threadIdx.x],
                     z_of = shared.z[group % kInputSlots][threadIdx.x];
          float result[kC];
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            sum_over_lanes<typename M::States>(y[c]);
            const float gate = z_of[c];
            result[c] = fmaf(params.D[c], u_of[c], y[c][0]);
            result[c] *= select(has_z, gate * sigmoid(gate), 1.0f);
          }
          to.store(result, valid(group) && own_token, at.mine);
        }
      }
    }
    if (more) matrices.put(shared.matrix_stage, shared.matrices[(tile + 1) % 2]);
    __syncthreads();
  }
  copy_async_wait<0>();  // nothing is under way into memory that is used for something else next
}

}  // namespace packseq
