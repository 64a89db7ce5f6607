// Packing and unpacking on the CPU through the C++ API: bytes/s, and the percentage of what memcpy reaches.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstring>

#include "cpu_threads.h"
#include "packing/packing.h"
#include "packing_cases.h"

namespace packseq::bench {
namespace {

// One case's batch, and the calls that pack it by lengths and unpack it by boundaries.
struct Batch {
  explicit Batch(const PackingCase& c)
      : lengths(c.lengths()),
        padded(size_t(c.rows() * c.row_bytes), 1),
        tokens(size_t(c.tokens() * c.row_bytes)),
        cu_seqlens(size_t(c.batch + 1)),
        indices(size_t(c.tokens())) {
    const PaddedShape shape = {.batch = c.batch, .length = c.length};
    to_tokens = {.shape = shape,
                 .row_bytes = c.row_bytes,
                 .capacity = c.tokens(),
                 .keep = {.mask = nullptr, .lengths = lengths.data(), .mask_bytes = 0, .length_bytes = 8},
                 .padded = padded.data(),
                 .tokens = tokens.data(),
                 .cu_seqlens = cu_seqlens.data(),
                 .indices = indices.data(),
                 .workspace = nullptr};
    to_padded = {.shape = shape,
                 .row_bytes = c.row_bytes,
                 .capacity = c.tokens(),
                 .places = {.indices = nullptr, .cu_seqlens = cu_seqlens.data()},
                 .tokens = tokens.data(),
                 .padded = padded.data(),
                 .fill = nullptr};
  }

  std::vector<int64_t> lengths;
  std::vector<char> padded, tokens;
  std::vector<int32_t> cu_seqlens;
  std::vector<int64_t> indices;
  Pack to_tokens;
  Unpack to_padded;
};

// Seconds of a memcpy, cut as the operator's work is, that reads and writes `bytes` in all.
double copy_seconds(int64_t bytes) {
  std::vector<char> from(size_t(bytes / 2), 1), to(from.size());
  double best = 1e9;
  for (int run = 0; run < 10; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    threads_executor().parallel_for(int64_t(from.size()), 64 * 1024, [&](int64_t first, int64_t last) {
      std::memcpy(&to[size_t(first)], &from[size_t(first)], size_t(last - first));
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::min(best, seconds.count());
  }
  return best;
}

void packing(benchmark::State& state, const PackingCase& c, bool is_pack) {
  const Executor executor = threads_executor();
  Batch batch(c);
  pack(batch.to_tokens, executor);
  const auto begin = std::chrono::steady_clock::now();
  for (auto _ : state) {
    if (is_pack) {
      pack(batch.to_tokens, executor);
    } else {
      unpack(batch.to_padded, executor);
    }
    benchmark::ClobberMemory();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const double runs = double(state.iterations());
  state.counters["bytes"] = benchmark::Counter(double(c.bytes(is_pack)) * runs, benchmark::Counter::kIsRate);
  state.counters["memcpy_%"] = 100 * copy_seconds(c.bytes(is_pack)) * runs / seconds.count();
}

void add_benchmarks() {
  for (const PackingCase& c : packing_cases()) {
    for (bool is_pack : {true, false}) {
      const std::string name = (is_pack ? "pack " : "unpack ") + c.name;
      benchmark::RegisterBenchmark(name.c_str(), packing, c, is_pack)->UseRealTime()->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
