// The selective scan on the GPU, host side: picks the kernels, lays out the workspace, lists the sequences.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "core/check.h"
#include "core/schedule.h"
#include "core/workspace.h"
#include "scan/scan.h"
#include "scan/scan_kernels.h"

namespace packseq {
namespace {

// f(std::type_identity<mapping>). `pairs`: rows can be read two channels at a time.
template <class F>
void with_mapping(const ScanProblem& p, bool pairs, const F& f) {
  const bool small = p.states <= SmallMapping::kN, every_token = !p.B.constants && !p.C.constants;
  if (p.complex) {
    small ? f(std::type_identity<SmallComplexMapping>{}) : f(std::type_identity<LargeComplexMapping>{});
  } else if (!small || !every_token || !pairs) {
    small ? f(std::type_identity<SmallMapping>{}) : f(std::type_identity<LargeMapping>{});
  } else if (p.dtype == Dtype::f32) {
    f(std::type_identity<PairMapping<float>>{});
  } else if (p.dtype == Dtype::bf16) {
    f(std::type_identity<PairMapping<__nv_bfloat16>>{});
  } else {
    f(std::type_identity<PairMapping<__half>>{});
  }
}

void check_problem(const ScanProblem& p) {
  check(p.dtype != Dtype::f64, "selective scan: float64 is for the CPU only");
  check(p.states >= 1 && p.states <= 256, "selective scan: states must be between 1 and 256, got ", p.states);
}

bool is_aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether rows of all of them can be read two channels at a time.
bool in_pairs(const ScanProblem& p, std::initializer_list<Rows> all) {
  const int64_t item = int64_t(size_of(p.dtype)), bytes = 2 * item;
  return p.channels / p.groups * item % bytes == 0 && std::all_of(all.begin(), all.end(), [&](const Rows& x) {
           return !x.data || (is_aligned(x.data, bytes) && x.token * item % bytes == 0);
         });
}

// Whether rows of all of them can be read 16 bytes at a time.
bool rows_aligned(const ScanProblem& p, std::initializer_list<Rows> all) {
  const int64_t item = int64_t(size_of(p.dtype));
  return p.channels / p.groups * item % 16 == 0 && std::all_of(all.begin(), all.end(), [&](const Rows& x) {
           return is_aligned(x.data, 16) && x.token * item % 16 == 0;
         });
}

bool matrices_aligned(const ScanProblem& p, int kN) {
  const int64_t item = int64_t(size_of(p.dtype));
  const auto fits = [&](const StateMatrix& m) {
    return is_aligned(m.tokens.data, 16) && m.tokens.token * item % 16 == 0 && m.tokens.head * item % 16 == 0;
  };
  return p.states == kN && fits(p.B) && fits(p.C);
}

// Places of the list of segments.
int64_t places_of(const ScanProblem& p) { return tile_capacity(p.total, p.sequences, kSegmentRows); }

// Whether a relay's 32 bits hold the bytes from one of a warp's groups of tokens to the next.
bool relay_fits(const ScanProblem& p) {
  constexpr int64_t kMost = int64_t(1) << 22;
  const std::initializer_list<int64_t> strides = {p.channels, p.u.token,        p.delta.token,
                                                  p.z.token,  p.B.tokens.token, p.C.tokens.token};
  return std::all_of(strides.begin(), strides.end(), [](int64_t x) { return -kMost < x && x < kMost; });
}

template <class Mapping>
ScanGrid grid_of(const ScanProblem& p, const Rows& dout, Tile* tiles, int64_t slots_most) {
  const int64_t places = places_of(p);
  ScanGrid grid = {.tiles = tiles,
                   .places = int32_t(places),
                   .slots = int32_t(std::min(places, slots_most)),
                   .split_places = p.total > kSegmentRows ? int32_t(std::min(places, 2 * (p.total / kSegmentRows))) : 0,
                   .relay_places = 0,
                   .channel_blocks = channel_blocks<Mapping>(p),
                   .aligned_rows = rows_aligned(p, {p.u, p.delta, p.z, dout}),
                   .aligned_matrices = matrices_aligned(p, Mapping::kN)};
  if (kHasRelay<Mapping> && p.total > kRelayRows && grid.aligned_rows && grid.aligned_matrices && relay_fits(p)) {
    grid.relay_places = int32_t(std::min(places, p.total / kSegmentRows + p.total / kRelayRows));
  }
  return grid;
}

Tile* take_list(Workspace& pieces, const ScanProblem& p) {
  check(places_of(p) <= std::numeric_limits<int32_t>::max(), "selective scan: too many sequences");
  return pieces.take<Tile>(places_of(p));
}

int64_t relay_blocks(const ScanProblem& p) { return channel_blocks<RelayMapping<float>>(p); }

SegmentTies take_ties(Workspace& pieces, const ScanProblem& p, bool backward) {
  if (p.total <= kSegmentRows) return {};
  const int64_t channels = segment_slots(p.total) * p.channels, states = channels * p.states * (p.complex ? 2 : 1);
  return {.states = pieces.take<float>(states),
          .gradients = backward ? pieces.take<float>(states) : nullptr,
          .decay_steps = pieces.take<float>(channels),
          .decay_steps_back = backward ? pieces.take<float>(channels) : nullptr,
          .passed = backward ? nullptr : pieces.take<int>(segment_slots(p.total) * relay_blocks(p))};
}

void list_segments(const ScanProblem& p, Tile* tiles, cudaStream_t stream) {
  build_tile_schedule({.cu_seqlens = p.cu_seqlens,
                       .cu_work = p.cu_seqlens,
                       .sequences = p.sequences,
                       .total = p.total,
                       .total_work = p.total,
                       .rows = kSegmentRows,
                       .order = TileOrder::together,
                       .tiles = tiles},
                      stream);
}

constexpr int64_t kEveryPlace = std::numeric_limits<int64_t>::max();
constexpr int64_t kSlotsMost = 256;  // blocks that sum the parameters' gradients over sequences, per block of channels

// One sequence's blocks of channels store states of a checkpoint side by side.
template <class Mapping>
int64_t checkpoint_width(int32_t blocks) {
  return int64_t(blocks) * kScanThreads * Mapping::kC * Mapping::kS;
}

template <class Mapping>
BackwardScratch take_scratch(Workspace& pieces, const ScanProblem& p, const ScanGrid& grid) {
  static_assert(kSegmentRows % Mapping::kChunk == 0);
  using X = typename Mapping::X;
  const bool every_token = !(p.B.constants && p.C.constants);
  const int64_t shares = grid.slots, of_states = shares * p.channels * p.states;
  const int64_t width = checkpoint_width<Mapping>(grid.channel_blocks);
  const int64_t matrix_shares = grid.channel_blocks / p.groups;
  constexpr int64_t kParts = sizeof(X) / sizeof(float);
  return {.checkpoints = pieces.take<X>((p.total / Mapping::kChunk + p.sequences) * width),
          .checkpoint_width = width,
          .width = Mapping::kN,
          .matrices = every_token ? pieces.take<X>(matrix_shares * p.total * p.groups * 2 * Mapping::kN) : nullptr,
          .dA = pieces.take<float>(of_states * kParts),
          .dB = p.B.constants ? pieces.take<float>(of_states * kParts) : nullptr,
          .dC = p.C.constants ? pieces.take<float>(of_states * kParts) : nullptr,
          .dD = pieces.take<float>(shares * p.channels),
          .ddelta_bias = pieces.take<float>(shares * p.channels),
          .shares = shares};
}

}  // namespace

size_t scan_forward_workspace(const ScanProblem& p) {
  Workspace pieces(nullptr);
  take_list(pieces, p);
  take_ties(pieces, p, false);
  return pieces.used();
}

void scan_forward(const ScanForward& call, cudaStream_t stream) {
  const ScanProblem& p = call.problem;
  check_problem(p);
  Workspace pieces(call.workspace);
  Tile* const tiles = take_list(pieces, p);
  const SegmentTies ties = take_ties(pieces, p, false);
  list_segments(p, tiles, stream);
  const bool pairs = in_pairs(p, {p.u, p.delta, p.z, {call.out, p.channels}});
  with_mapping(p, pairs, [&]<class Mapping>(std::type_identity<Mapping>) {
    launch_scan_forward<Mapping>(call, grid_of<Mapping>(p, {}, tiles, kEveryPlace), ties, stream);
  });
}

// Enough wherever the gradients will lie.
size_t scan_backward_workspace(const ScanProblem& p) {
  size_t most = 0;
  for (const bool pairs : {false, true}) {
    with_mapping(p, pairs, [&]<class Mapping>(std::type_identity<Mapping>) {
      Workspace pieces(nullptr);
      Tile* const tiles = take_list(pieces, p);
      take_ties(pieces, p, true);
      take_scratch<Mapping>(pieces, p, grid_of<Mapping>(p, {}, tiles, kSlotsMost));
      most = std::max(most, pieces.used());
    });
  }
  return most;
}

void scan_backward(const ScanBackward& call, cudaStream_t stream) {
  const ScanProblem& p = call.problem;
  check_problem(p);
  Workspace pieces(call.workspace);
  Tile* const tiles = take_list(pieces, p);
  const SegmentTies ties = take_ties(pieces, p, true);
  list_segments(p, tiles, stream);
  const auto contiguous = [&](void* data) { return Rows{data, p.channels}; };
  const bool pairs =
      in_pairs(p, {p.u, p.delta, p.z, call.dout, contiguous(call.du), contiguous(call.ddelta), contiguous(call.dz)});
  with_mapping(p, pairs, [&]<class Mapping>(std::type_identity<Mapping>) {
    const ScanGrid grid = grid_of<Mapping>(p, call.dout, tiles, kSlotsMost);
    const BackwardScratch scratch = take_scratch<Mapping>(pieces, p, grid);
    launch_scan_backward<Mapping>(call, grid, ties, scratch, stream);
    sum_scan_shares(call, grid, scratch, stream);
  });
}

void scan_step(const ScanStep& call, cudaStream_t stream) {
  const ScanProblem& p = call.problem;
  check_problem(p);
  const bool small = p.states <= SmallMapping::kN;
  if (p.complex) {
    small ? launch_scan_step<SmallComplexMapping>(call, stream) : launch_scan_step<LargeComplexMapping>(call, stream);
  } else {
    small ? launch_scan_step<SmallMapping>(call, stream) : launch_scan_step<LargeMapping>(call, stream);
  }
}

}  // namespace packseq
