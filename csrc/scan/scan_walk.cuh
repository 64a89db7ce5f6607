// The recurrence over one sequence, in the order of its tokens: what the forward does, and the first half of the
// backward, which wants the state every kChunk tokens instead of outputs.
//
// B and C come through shared memory a tile of tokens at a time, fetched one tile ahead. Everything else is a warp's
// own affair: it fetches u, delta and z a run of groups of tokens ahead. Among the work on a group's states, which
// waits for the special functions, stand in parts what would be long chains by themselves: the steps (d, d u) of the
// next group, and the sums, gates and stores of the outputs of the one before.
#pragma once
#include "core/device/async_copy.cuh"
#include "scan/scan_tile.cuh"

namespace packseq {

inline constexpr int kInputSlots = 4;  // runs of kFetch tokens whose u, delta and z are there or under way

template <class M>
struct alignas(16) WalkShared {
  typename MatrixTiles<M, M::kTile>::Buffer matrices[2];
  typename MatrixTiles<M, M::kTile>::Stage matrix_stage;
  float2 steps[kScanWarps][2][M::kGroup][M::kWarpChannels];  // d, d u
  struct Inputs {
    typename InputRows<M, M::kFetch>::Slot u, delta, z;
  };
  alignas(16) Inputs inputs[kInputSlots][kScanWarps];

  LaneSums<M> sums[kScanWarps][2];
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
  __device__ void fetch(int chunk, Slot& slot, bool commit = true) const {
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
    if (commit) copy_async_commit();
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
  constexpr int kUnrolled = M::kFetch / kGroup;                   // groups
  constexpr int kAtOnce = M::kAny && kGroup > 4 ? 1 : kUnrolled;  // decays of more groups would spill
  static_assert(M::kAny || kTileGroups > kUnrolled);              // a run later the next tile's B and C are there
  static_assert(kTileGroups % kUnrolled == 0 && kUnrolled % 2 == 0 && M::kFetch % M::kChunk == 0);
  const int groups = (walk.count + kGroup - 1) / kGroup;
  constexpr bool kOutputs = kFor == Walking::outputs, kGradient = kFor == Walking::gradient,
                 kGates = kOutputs || kGradient;
  const bool has_z = kGates && p.z.data, soft = p.delta_softplus;
  const bool own_token = M::States::index() < kGroup;  // further lanes repeat what the first ones do
  const ConstantMatrices<M> constants(p, at);
  const bool wide = grid.aligned_rows;
  using Inputs = InputRows<M, M::kFetch>;
  Inputs u(u_rows, p.dtype, at, walk, wide, 0, 1), delta(p.delta, p.dtype, at, walk, wide, 0, 1),
      z(p.z, p.dtype, at, walk, wide, 0, 1);
  OutputPlace<M> to(p, at, walk, -1, 1);
  const int own_rows = own_token && at.mine > 0 ? max(walk.count - at.token, 0) : 0;  // from the lane's first token on
  const auto valid = [&](int group) { return group * kGroup < own_rows; };

  const auto fetch = [&](int run) {
    auto& in = shared.inputs[unsigned(run) % kInputSlots][at.warp];
    const int rest = walk.count - run * M::kFetch;
    u.fetch(in.u, rest, at.of_warp, wide, p.dtype);
    delta.fetch(in.delta, rest, at.of_warp, wide, p.dtype);
    if (has_z) z.fetch(in.z, rest, at.of_warp, wide, p.dtype);
    copy_async_commit();
  };
  // Groups are counted as r of a run, which may be the last one of the run before or the first one of the next.
  const auto inputs_of = [&](int run, int r) -> const auto& {
    return shared.inputs[unsigned(run + (r < 0 ? -1 : r / kUnrolled)) % kInputSlots][at.warp];
  };
  const auto token_of = [&](int r) { return (r + kUnrolled) % kUnrolled * kGroup + at.token; };

  // Steps of a group's token, in kSoftplusParts parts that can stand among other work; the last one puts them in place.
  using Steps = Few<float2, kC>;
  SoftplusParts<Element<typename M::T>::kExact> softplus[kC];
  using Values = typename Inputs::Values;
  Values u_next, delta_next, z_next, u_before, z_before;
  Steps steps;
  const auto stage = [&](int run, int r, int part) {
    const auto& in = inputs_of(run, r);
    const int token = token_of(r), group = run * kUnrolled + r;
    if (part == 0) {
      u_next = Inputs::at(in.u, token, at), delta_next = Inputs::at(in.delta, token, at);
      if constexpr (kGradient) z_next = Inputs::at(in.z, token, at);
    }
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (part == 0) softplus[c].start(delta_next[c] + params.delta_bias[c]);
      softplus[c].run(part);
      if (part < kSoftplusParts - 1) continue;
      const float d = select(valid(group), softplus[c].value(soft), 0.0f);  // beyond the end: decay 1, input 0
      float pushed = d * u_next[c];
      if constexpr (kGradient) {  // what the gate leaves of dout
        pushed = select(has_z, u_next[c] * (z_next[c] * sigmoid(z_next[c])), u_next[c]);
      }
      steps.x[c] = {d, pushed};
      if constexpr (kFor == Walking::state || kGradient) steps_sum[c] += d;
    }
  };
  const auto put_steps = [&](int r) {
    if (own_token) *reinterpret_cast<Steps*>(&shared.steps[at.warp][r & 1][at.token][at.in_warp]) = steps;
  };
  // Outputs of a group's token, in as many parts.
  float open[kC], result[kC];
  const auto gate = [&](int run, int r, int part) {
    const auto& in = inputs_of(run, r);
    const int token = token_of(r);
    if (part == 0) u_before = Inputs::at(in.u, token, at), z_before = Inputs::at(in.z, token, at);
    if (part == 2) shared.sums[at.warp][r & 1].get(result, at.token);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (part == 0) open[c] = exp2_approx(-z_before[c] * kScanLog2e);
      if (part == 1) open[c] = reciprocal_approx(1.0f + open[c]);
      if (part == 2) open[c] = select(has_z, z_before[c] * open[c], 1.0f);
      if (part == 3) result[c] = fmaf(params.D[c], u_before[c], result[c]) * open[c];
    }
  };
  const auto store = [&](int group) {
    to.store(out, result, unsigned(group) * kGroup < unsigned(own_rows));  // none before the first group
    to.next();
  };

  __syncthreads();  // whoever used the shared memory before is done
  MatrixTiles<M, M::kTile> matrices(p, at.group, walk, grid.aligned_matrices, 0, 1);
  matrices.fetch(shared.matrix_stage);
  fetch(0);
  fetch(1);
  copy_async_wait<1>();
  matrices.put(shared.matrix_stage, shared.matrices[0]);
  __syncwarp();
#pragma unroll
  for (int part = 0; part < kSoftplusParts; ++part) stage(0, 0, part);
  put_steps(0);
  __syncthreads();

  for (int tile = 0; tile * kTileGroups < groups; ++tile) {
    const auto& matrix = shared.matrices[tile % 2].matrix;
    const bool more = (tile + 1) * kTileGroups < groups;
    if (more) matrices.fetch(shared.matrix_stage);  // with the copies of the tile's first run
#pragma unroll 1
    for (int part = 0; part < kTileGroups && tile * kTileGroups + part < groups; part += kUnrolled) {
      const int run = (tile * kTileGroups + part) / kUnrolled;
      fetch(run + 2);
#pragma unroll(kAtOnce)
      for (int r = 0; r < kUnrolled; ++r) {
        const int group = tile * kTileGroups + part + r;
        if (r == kUnrolled - 1) copy_async_wait<1>();  // the next run's
        __syncwarp();  // this group's steps and the sums of the one before are there, and the other buffers are free
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
          const auto step = *reinterpret_cast<const Steps*>(&shared.steps[at.warp][r % 2][t][at.in_warp]);
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
          if (t < kSoftplusParts) {
            stage(run, r + 1, t);
            if constexpr (kOutputs) gate(run, r - 1, t);
          }
        }
        put_steps(r + 1);
        if constexpr (kOutputs) {
          shared.sums[at.warp][r % 2].put(y);
          store(group - 1);
        }
      }
    }
    if (more) matrices.put(shared.matrix_stage, shared.matrices[(tile + 1) % 2]);
    __syncthreads();
  }
  if (kOutputs && groups > 0) {
    __syncwarp();
    const int last_run = (groups + kUnrolled - 1) / kUnrolled - 1;
#pragma unroll
    for (int part = 0; part < kSoftplusParts; ++part) gate(last_run, kUnrolled - 1, part);
    store(last_run * kUnrolled + kUnrolled - 1);
  }
  copy_async_wait<0>();  // nothing is under way into memory that is used for something else next
}

}  // namespace packseq
