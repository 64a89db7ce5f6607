// The tile scheduler, against what its header promises.
#include <algorithm>
#include <random>

#include "core/schedule.h"
#include "device_array.cuh"

namespace packseq::testing {
namespace {

struct Problem {
  std::vector<int32_t> cu_seqlens, cu_work;
  int64_t total, total_work;
  int32_t rows;
  TileOrder order = TileOrder::together;

  int64_t sequences() const { return int64_t(cu_seqlens.size()) - 1; }
  int64_t capacity() const { return tile_capacity(total, sequences(), rows); }
  int64_t tiles_of(int64_t i) const {
    return (span_of(cu_seqlens.data(), sequences(), total, i).size() + rows - 1) / rows;
  }
  int64_t work_of(int64_t i) const { return span_of(cu_work.data(), sequences(), total_work, i).size(); }
};

Problem problem(const std::vector<int32_t>& lengths, int32_t rows, int64_t slack = 0) {
  std::vector<int32_t> cu{0};
  for (int32_t length : lengths) cu.push_back(cu.back() + length);
  return {cu, cu, cu.back() + slack, cu.back(), rows};
}

TileScheduleParams params(const Problem& p, const DeviceArray<int32_t>& cu_seqlens, const DeviceArray<int32_t>& cu_work,
                          const DeviceArray<Tile>& tiles) {
  return {.cu_seqlens = cu_seqlens.data(),
          .cu_work = cu_work.data(),
          .sequences = p.sequences(),
          .total = p.total,
          .total_work = p.total_work,
          .rows = p.rows,
          .order = p.order,
          .tiles = tiles.data()};
}

std::vector<Tile> schedule(const Problem& p) {
  const DeviceArray<int32_t> cu_seqlens(p.cu_seqlens), cu_work(p.cu_work);
  const DeviceArray<Tile> tiles(p.capacity());
  build_tile_schedule(params(p, cu_seqlens, cu_work, tiles), nullptr);
  return tiles.values();
}

void expect_same(const std::vector<Tile>& got, const std::vector<Tile>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_TRUE(got[i].sequence == want[i].sequence && got[i].block == want[i].block) << "at place " << i;
  }
}

// How much work a sequence may have behind one with `work`: their classes differ by an eighth.
int64_t most_behind(int64_t work) { return work + work / 7 + 1; }

// Every tile once, those of a sequence in order, most work first, slack last, nothing behind it.
void expect_right(const Problem& p) {
  const std::vector<Tile> tiles = schedule(p);
  std::vector<int64_t> seen(p.sequences() + 1, 0);
  int64_t least_work = std::numeric_limits<int32_t>::max();
  size_t at = 0;
  for (; at < tiles.size() && tiles[at].sequence >= 0; ++at) {
    const auto [sequence, block] = tiles[at];
    ASSERT_LE(sequence, p.sequences()) << "at place " << at;
    ASSERT_EQ(block, seen[sequence]++) << "of sequence " << sequence << " at place " << at;
    if (sequence == p.sequences()) continue;
    ASSERT_EQ(seen.back(), 0) << "sequence " << sequence << " after the slack, at place " << at;
    if (block > 0) {
      ASSERT_TRUE(tiles[at - 1].sequence == sequence) << "torn apart at place " << at;
      continue;
    }
    ASSERT_LE(p.work_of(sequence), most_behind(least_work)) << "more work than before, at place " << at;
    least_work = std::min(least_work, p.work_of(sequence));
  }
  for (; at < tiles.size(); ++at) {
    ASSERT_EQ(tiles[at].sequence, -1) << "at place " << at;
    ASSERT_EQ(tiles[at].block, -1) << "at place " << at;
  }
  for (int64_t i = 0; i <= p.sequences(); ++i) {
    ASSERT_EQ(seen[i], p.tiles_of(i)) << "sequence " << i << " of " << p.sequences();
  }
}

std::vector<int32_t> lognormal(int count, double mean, double sigma, int32_t most, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::lognormal_distribution<double> length(mean, sigma);
  std::vector<int32_t> lengths(count);
  for (int32_t& x : lengths) x = std::min(int32_t(length(random)), most);
  return lengths;
}

class Schedule : public GpuTest {};

TEST_F(Schedule, RaggedBatches) {
  for (int count : {1, 2, 31, 32, 33, 113, 1023, 1024, 1025, 3000}) {
    for (int32_t rows : {1, 64, 128}) {
      expect_right(problem(lognormal(count, 5, 1.5, 4096, count), rows));
    }
  }
}

TEST_F(Schedule, EqualLengths) {
  for (int count : {1, 32, 1000, 5000}) expect_right(problem(std::vector<int32_t>(count, 128), 64));
}

TEST_F(Schedule, Slack) {
  for (int64_t slack : {1, 63, 64, 65, 100000}) expect_right(problem(lognormal(50, 5, 1, 2000), 64, slack));
  expect_right(problem(std::vector<int32_t>(7, 0), 64, 1000));  // nothing else
}

TEST_F(Schedule, EmptyThings) {
  expect_right(problem({}, 64));
  expect_right(problem({}, 64, 100));
  expect_right(problem({0, 0, 0}, 64));
  expect_right(problem({0, 1, 0, 0, 65, 0}, 64));
  expect_right(problem(std::vector<int32_t>(5000, 0), 64, 3));  // fewer rows than sequences
}

TEST_F(Schedule, LengthsAroundTheTile) { expect_right(problem({63, 64, 65, 127, 128, 129, 1, 0}, 64)); }

TEST_F(Schedule, WorkFromOtherBoundaries) {
  Problem p = problem(lognormal(500, 4, 1, 1000, 2), 64);
  const Problem keys = problem(lognormal(500, 6, 1.5, 9000, 3), 64);
  p.cu_work = keys.cu_seqlens, p.total_work = keys.total;
  expect_right(p);
}

TEST_F(Schedule, OneLongSequence) { expect_right(problem({3, 1'000'000, 70}, 64)); }

TEST_F(Schedule, ManySequences) {
  expect_right(problem(lognormal(100'000, 3, 1.2, 5000), 64));
  expect_right(problem(std::vector<int32_t>(100'000, 17), 64, 1000));
}

TEST_F(Schedule, SameListOnEveryRun) {
  const Problem p = problem(lognormal(20'000, 4, 1, 3000), 64);
  expect_same(schedule(p), schedule(p));
}

// Whatever the boundaries hold: places of the list alone are written, all of them, with tiles inside the tensor.
TEST_F(Schedule, MalformedBoundaries) {
  std::mt19937 random(4);
  for (int count : {1, 31, 1025, 30'000}) {
    for (int kind = 0; kind < 4; ++kind) {
      Problem p = problem(lognormal(count, 4, 1, 1000, count), 64, kind == 3 ? 5000 : 0);
      for (size_t i = 0; i < p.cu_seqlens.size(); ++i) {
        int32_t& x = p.cu_seqlens[i];
        if (kind == 0) x = i % 2 ? std::numeric_limits<int32_t>::max() : 0;  // far more tiles than places
        if (kind == 1) x = int32_t(random());
        if (kind == 2 && random() % 8 == 0) x = -x;
        p.cu_work[i] = kind == 0 ? int32_t(random()) : p.cu_work[i];
      }
      std::vector<std::pair<int32_t, int32_t>> listed;
      for (const Tile t : schedule(p)) {
        if (t.sequence == -1) continue;
        ASSERT_TRUE(t.sequence >= 0 && t.sequence <= count && t.block >= 0 && t.block < p.tiles_of(t.sequence))
            << "tile " << t.block << " of sequence " << t.sequence;
        listed.emplace_back(t.sequence, t.block);
      }
      std::sort(listed.begin(), listed.end());
      ASSERT_EQ(std::adjacent_find(listed.begin(), listed.end()), listed.end()) << "a tile twice";
    }
  }
}

TEST_F(Schedule, ReplaysInAGraphWithOtherBoundaries) {
  const Problem before = problem({100, 2000, 30}, 64, 870), after = problem({1500, 0, 1500}, 64);
  const DeviceArray<int32_t> cu_seqlens(before.cu_seqlens);
  const DeviceArray<Tile> tiles(before.capacity());
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamCreate(&stream), "stream");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  build_tile_schedule(params(before, cu_seqlens, cu_seqlens, tiles), stream);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "graph");
  for (const Problem& p : {before, after}) {
    check_cuda(cudaMemcpy(cu_seqlens.data(), p.cu_seqlens.data(), p.cu_seqlens.size() * 4, cudaMemcpyHostToDevice),
               "copy");
    check_cuda(cudaGraphLaunch(executable, stream), "graph");
    expect_same(tiles.values(), schedule(p));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST(ScheduleArguments, AreNamedWhenBad) {
  const auto build = [](int64_t sequences, int64_t total, int32_t rows) {
    build_tile_schedule({.cu_seqlens = nullptr,
                         .cu_work = nullptr,
                         .sequences = sequences,
                         .total = total,
                         .total_work = total,
                         .rows = rows,
                         .order = TileOrder::together,
                         .tiles = nullptr},
                        nullptr);
  };
  EXPECT_THROW(build(1, 10, 0), std::invalid_argument);
  EXPECT_THROW(build(-1, 10, 64), std::invalid_argument);
  EXPECT_THROW(build(1, int64_t(1) << 33, 1), std::invalid_argument);
}

}  // namespace
}  // namespace packseq::testing
