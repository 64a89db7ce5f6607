// Writes the list of tiles: a stable counting sort of pieces of the sequences by work, in one kernel of one block.
//
// A piece is a run of a sequence's tiles: one of eight where tiles are to be spread and sequences are not very many,
// else the whole sequence. Later pieces count as less work, so that tiles of one sequence do not all run at once.
//
// Every warp owns a contiguous range of pieces and a row of counters in shared memory, one counter for each class
// of work, in tiles. The pieces are read twice:
//
//   1. each warp counts the tiles of its pieces into its row
//      the rows become prefix sums: over the warps within a class, then over the classes, most work first
//   2. each warp goes over its pieces again; the counter is where a piece's tiles begin, and moves on by them
//
// Lanes of a warp whose pieces are in one class agree on their order with shuffles, so nothing is atomic and the
// list is the same on every run. Sums saturate at the list's capacity: malformed boundaries can claim any number of
// tiles, and those beyond the list are dropped.
#include <limits>

#include "core/check.h"
#include "core/launch.h"
#include "core/schedule.h"

namespace packseq {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kClasses = 256;  // 8 to a power of two
constexpr int64_t kManySequences = 4096;
constexpr unsigned kAll = ~0u;         // lanes of a warp
constexpr uint32_t kOwnTilesMost = 2;  // a lane writes so many by itself; more are a warp's work

struct ListParams {
  TileScheduleParams schedule;
  uint32_t capacity;
  uint32_t pieces;  // of each sequence
};

// The tiles of a piece: how many, from which of its sequence's blocks on, and from which place of the list on.
struct Run {
  uint32_t first, count, block;
};

struct Shared {
  uint32_t rows[kWarps][kClasses];
  uint32_t classes[kClasses];  // tiles before the class
  uint32_t parts[kClasses / 32];
  uint32_t tiles;  // of all sequences
  Run runs[kThreads];
};

// Class of work: 0 has the most. Lengths of a class differ by at most one part in eight.
__device__ uint32_t class_of(uint32_t work) {
  if (work == 0) return kClasses - 1;
  const int zeros = __clz(work);
  return kClasses - 2 - ((31 - zeros) * 8 + ((work << zeros) >> 28 & 7));
}

__device__ uint32_t plus(uint32_t a, uint32_t b, uint32_t most) { return min(a + b, most); }

// Inclusive prefix sum over the warp.
__device__ uint32_t prefix_sum(uint32_t x, uint32_t most) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, x, step);
    if (lane >= step) x = plus(x, other, most);
  }
  return x;
}

// Sum of x over the lanes of `peers` before this one.
__device__ uint32_t sum_before(unsigned peers, uint32_t x, uint32_t most) {
  const int lane = threadIdx.x % 32;
  unsigned rest = peers & ((1u << lane) - 1);
  uint32_t sum = 0;
  if (peers == kAll) {  // one class: for all lanes or for none
    sum = __shfl_up_sync(kAll, prefix_sum(x, most), 1);
    return lane == 0 ? 0 : sum;
  }
  while (__any_sync(kAll, rest != 0)) {
    const uint32_t other = __shfl_sync(kAll, x, rest ? __ffs(rest) - 1 : lane);
    if (rest) sum = plus(sum, other, most);
    rest &= rest - 1;
  }
  return sum;
}

// Moves the counter of the class on by `count`, lane after lane; returns where it stood for this lane.
__device__ uint32_t claim(uint32_t* row, uint32_t work_class, uint32_t count, uint32_t most) {
  const unsigned peers = __match_any_sync(kAll, work_class);
  const uint32_t first = plus(row[work_class], sum_before(peers, count, most), most);
  __syncwarp();
  if (peers >> (threadIdx.x % 32) == 1) row[work_class] = plus(first, count, most);  // the last of them
  __syncwarp();
  return first;
}

struct Piece {
  uint32_t block, tiles, work_class;  // its first block
};

__device__ Piece look_up(const ListParams& p, int64_t item) {
  const auto& [cu_seqlens, cu_work, sequences, total, total_work, tile_rows, order, tiles] = p.schedule;
  const int64_t i = item / p.pieces;
  const uint32_t piece = uint32_t(item % p.pieces);
  if (i >= sequences) return {0, 0, kClasses - 1};
  const uint32_t rows = uint32_t(span_of(cu_seqlens, sequences, total, i).size());  // boundaries are int32
  const uint32_t work = uint32_t(span_of(cu_work, sequences, total_work, i).size());
  const uint32_t count = rows / tile_rows + (rows % tile_rows != 0);
  const auto cut = [&](uint32_t n) { return uint32_t((uint64_t(count) * n + p.pieces - 1) / p.pieces); };
  const uint32_t begin = cut(piece), end = cut(piece + 1);
  const uint32_t parts = order == TileOrder::spread_falling ? p.pieces : 2 * p.pieces;  // down to an eighth, or half
  return {begin, end - begin, class_of(uint32_t(uint64_t(work) * (parts - piece) / parts))};
}

// From tiles in each (warp, class) to where they begin: within the class into rows, of the classes into classes.
__device__ void accumulate(Shared& s, int warps, uint32_t most) {
  const int thread = threadIdx.x;
  uint32_t in_class = 0, through = 0;
  if (thread < kClasses) {
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      const uint32_t count = s.rows[w][thread];
      s.rows[w][thread] = in_class;
      in_class = plus(in_class, count, most);
    }
    through = prefix_sum(in_class, most);
    if (thread % 32 == 31) s.parts[thread / 32] = through;
  }
  __syncthreads();
  if (thread < kClasses) {
    uint32_t before = 0;
    for (int part = 0; part < thread / 32; ++part) before = plus(before, s.parts[part], most);
    const uint32_t own = __shfl_up_sync(kAll, through, 1);
    s.classes[thread] = thread % 32 == 0 ? before : plus(before, own, most);
    if (thread == kClasses - 1) s.tiles = plus(before, through, most);
  }
  __syncthreads();
}

// Slack, then nothing, from place `first` of the list to its end.
__device__ void fill_rest(const ListParams& p, uint32_t first) {
  const auto& [cu_seqlens, cu_work, sequences, total, total_work, rows, order, tiles] = p.schedule;
  const int64_t slack = (span_of(cu_seqlens, sequences, total, sequences).size() + rows - 1) / rows;
  for (int64_t at = int64_t(first) + threadIdx.x; at < p.capacity; at += kThreads) {
    const int64_t block = at - first;
    tiles[at] = block < slack ? Tile{int32_t(sequences), int32_t(block)} : Tile{-1, -1};
  }
}

__device__ void write(const ListParams& p, int64_t sequence, Run run, uint32_t lane, uint32_t lanes) {
  for (uint32_t block = lane; block < run.count && block < p.capacity - run.first; block += lanes) {
    p.schedule.tiles[run.first + block] = {int32_t(sequence), int32_t(run.block + block)};
  }
}

__global__ void __launch_bounds__(kThreads) list_tiles_kernel(const __grid_constant__ ListParams p) {
  __shared__ Shared s;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t items = p.schedule.sequences * p.pieces;
  const int64_t rounds = (items + kThreads - 1) / kThreads, range = 32 * rounds;  // of each warp
  const int warps = rounds == 0 ? 0 : int((items + range - 1) / range);           // that have any
  const auto item_of = [&](int64_t round, int w, int l) { return w * range + round * 32 + l; };
  const auto sequence_of = [&](int64_t round, int w, int l) { return item_of(round, w, l) / p.pieces; };

  if (warp < warps) {
    for (int i = lane; i < kClasses; i += 32) s.rows[warp][i] = 0;
    __syncwarp();
    for (int64_t round = 0; round < rounds; ++round) {
      const Piece x = look_up(p, item_of(round, warp, lane));
      claim(s.rows[warp], x.work_class, x.tiles, p.capacity);
    }
  }
  __syncthreads();
  accumulate(s, warps, p.capacity);
  fill_rest(p, s.tiles);

  for (int64_t round = 0; round < rounds; ++round) {
    Run run = {0, 0, 0};
    if (warp < warps) {
      const Piece x = look_up(p, item_of(round, warp, lane));
      const uint32_t first = claim(s.rows[warp], x.work_class, x.tiles, p.capacity);
      run = {plus(s.classes[x.work_class], first, p.capacity), x.tiles, x.block};
    }
    if (run.count <= kOwnTilesMost) {
      write(p, sequence_of(round, warp, lane), run, 0, 1);
      run.count = 0;
    }
    s.runs[threadIdx.x] = run;
    if (!__syncthreads_or(run.count)) continue;
    for (int w = 0; w < warps; ++w) write(p, sequence_of(round, w, warp), s.runs[32 * w + warp], lane, 32);
    __syncthreads();
  }
}

}  // namespace

void build_tile_schedule(const TileScheduleParams& p, cudaStream_t stream) {
  check(p.rows > 0, "tile schedule: rows must be at least 1, got ", p.rows);
  check(p.sequences >= 0 && p.sequences < std::numeric_limits<int32_t>::max(),
        "tile schedule: sequences must be between 0 and 2^31 - 2, got ", p.sequences);
  const int64_t capacity = tile_capacity(p.total, p.sequences, p.rows);
  check(capacity <= std::numeric_limits<int32_t>::max(), "tile schedule: ", p.total, " rows in tiles of ", p.rows,
        " need a list of ", capacity, ", which must be below 2^31");
  if (capacity == 0) return;
  const bool whole = p.order == TileOrder::together || p.sequences > kManySequences;
  launch("tile schedule", list_tiles_kernel, 1, kThreads, 0, stream,
         {.schedule = p, .capacity = uint32_t(capacity), .pieces = whole ? 1u : 8u});
}

}  // namespace packseq
