// The packing benchmarks' cases, from the table that the comparison in Python reads too.
#pragma once
#include <cmath>
#include <cstdint>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "case_tables.h"

namespace packseq::bench {

struct PackingCase {
  std::string name;
  int64_t batch, length, row_bytes;

  std::vector<int64_t> lengths() const {
    std::vector<int64_t> all;
    for (int64_t b = 0; b < batch; ++b) {
      const double place = double(b + 1) * 0.6180339887498949;
      all.push_back(int64_t(std::ceil(double(length) * (0.2 + 0.8 * (place - std::floor(place))))));
    }
    return all;
  }

  int64_t rows() const { return batch * length; }
  int64_t tokens() const {
    const std::vector<int64_t> all = lengths();
    return std::accumulate(all.begin(), all.end(), int64_t{0});
  }

  // What must move: tokens read and written; unpacking writes the padding too, packing writes the indices.
  int64_t bytes(bool pack) const {
    return pack ? tokens() * (2 * row_bytes + int64_t(sizeof(int64_t))) : (tokens() + rows()) * row_bytes;
  }
};

inline std::vector<PackingCase> packing_cases() {
  std::vector<PackingCase> cases;
  std::istringstream table(kPackingCases);
  for (std::string line; std::getline(table, line);) {
    if (line.empty() || line.starts_with('#')) continue;
    PackingCase row{};
    std::istringstream(line) >> row.name >> row.batch >> row.length >> row.row_bytes;
    cases.push_back(row);
  }
  return cases;
}

}  // namespace packseq::bench
