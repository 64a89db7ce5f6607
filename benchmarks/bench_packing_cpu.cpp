// Packing and unpacking on the CPU through the C++ API: bytes/s, and the percentage of what memcpy reaches.
#include "cpu_benchmark.h"
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

void packing(benchmark::State& state, const PackingCase& c, bool is_pack) {
  const Executor executor = threads_executor();
  Batch batch(c);
  pack(batch.to_tokens, executor);
  repeat_against_copy(state, double(c.bytes(is_pack)),
                      [&] { is_pack ? pack(batch.to_tokens, executor) : unpack(batch.to_padded, executor); });
}

void add_benchmarks() {
  for (const PackingCase& c : packing_cases()) {
    for (bool is_pack : {true, false}) {
      add_benchmark((is_pack ? "pack " : "unpack ") + c.name,
                    [=](benchmark::State& state) { packing(state, c, is_pack); });
    }
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  return packseq::bench::run_benchmarks(argc, argv);
}
