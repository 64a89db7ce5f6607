// The long convolution's cases on the GPU, from the table that the comparison in Python reads too.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "case_lengths.h"
#include "case_tables.h"
#include "core/dtype.h"

namespace packseq::bench {

struct LongConvCase {
  std::string name;  // "B128xL1024 float32"
  int channels;
  std::vector<int> lengths;
  Dtype dtype;

  int64_t total() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
  int64_t elements() const { return total() * channels; }
  int64_t taps() const { return *std::max_element(lengths.begin(), lengths.end()); }
  std::vector<int32_t> cu_seqlens() const {
    std::vector<int32_t> cu(lengths.size() + 1, 0);
    std::partial_sum(lengths.begin(), lengths.end(), cu.begin() + 1);
    return cu;
  }

  // What must move: u, out and the filter forward; u, dout, du, the filter and its gradient backward; each once.
  double bytes(bool backward) const {
    const double rows = double(elements()) * double(size_of(dtype)), filter = 4.0 * double(channels * taps());
    return backward ? 3 * rows + 2 * filter : 2 * rows + filter;
  }
};

// Every line of the table in both types.
inline std::vector<LongConvCase> longconv_cases() {
  std::vector<LongConvCase> cases;
  std::istringstream table(kLongConvCases);
  for (std::string line; std::getline(table, line);) {
    if (line.empty() || line.starts_with('#')) continue;
    std::istringstream words(line);
    LongConvCase row = {};
    words >> row.name >> row.channels;
    row.lengths = parse_lengths(words);
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      cases.push_back({row.name + " " + name_of(dtype), row.channels, row.lengths, dtype});
    }
  }
  return cases;
}

}  // namespace packseq::bench
