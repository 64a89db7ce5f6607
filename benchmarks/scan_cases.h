// The scan benchmarks' cases, from the table that the comparison in Python reads too.
#pragma once
#include <cstdint>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "case_lengths.h"
#include "case_tables.h"
#include "core/dtype.h"

namespace packseq::bench {

struct ScanCase {
  std::string name;
  Dtype dtype;
  int channels;
  std::vector<int> lengths;
  int states = 16;

  int64_t total() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
  int64_t elements() const { return total() * channels; }
  double steps() const { return double(elements()) * states; }
};

inline std::vector<ScanCase> scan_cases() {
  std::vector<ScanCase> cases;
  std::istringstream table(kScanCases);
  for (std::string line; std::getline(table, line);) {
    if (line.empty() || line.starts_with('#')) continue;
    std::istringstream words(line);
    ScanCase row = {};
    std::string dtype;
    words >> row.name >> dtype >> row.channels;
    row.dtype = dtype == "f32" ? Dtype::f32 : Dtype::bf16;
    row.lengths = parse_lengths(words);
    cases.push_back(row);
  }
  return cases;
}

}  // namespace packseq::bench
