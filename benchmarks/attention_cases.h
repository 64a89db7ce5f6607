// The attention benchmarks' cases, from the table that the comparisons in Python read too.
#pragma once
#include <cstdint>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "case_lengths.h"
#include "case_tables.h"

namespace packseq::bench {

struct Case {
  std::string name;  // "d64 32x512 causal"
  int heads, dim;
  std::vector<int> lengths;
  bool causal;

  int64_t total() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }

  std::vector<int32_t> cu_seqlens() const {
    std::vector<int32_t> cu(lengths.size() + 1, 0);
    std::partial_sum(lengths.begin(), lengths.end(), cu.begin() + 1);
    return cu;
  }

  // Of the matrix products of visible scores only: four a score and dim, 2.5 times that backward.
  double flops(bool backward) const {
    double scores = 0;
    for (int n : lengths) scores += double(n) * n;
    return 4 * scores * heads * dim * (causal ? 0.5 : 1) * (backward ? 2.5 : 1);
  }

  // What must move at least: q, k, v and out forward; those, dout, and three gradients backward; lse either way.
  double bytes(bool backward, size_t element) const {
    return double(total()) * heads * ((backward ? 8.0 : 4.0) * dim * double(element) + sizeof(float));
  }
};

inline std::vector<Case> attention_cases(const std::string& suite) {
  std::vector<Case> shapes, cases;
  std::istringstream table(kAttentionCases);
  for (std::string line; std::getline(table, line);) {
    std::istringstream words(line);
    std::string kind, of;
    Case row{};
    words >> kind >> of >> row.name;
    if (of != suite || kind.starts_with('#')) continue;
    if (kind == "shape") {
      words >> row.heads >> row.dim;
      shapes.push_back(row);
    } else if (kind == "batch") {
      row.lengths = parse_lengths(words);
      cases.push_back(row);
    } else {
      throw std::invalid_argument("attention_cases.txt: unknown kind of line '" + kind + "'");
    }
  }
  std::vector<Case> result;
  for (const Case& shape : shapes) {
    for (const Case& batch : cases) {
      for (bool causal : {false, true}) {
        result.push_back({shape.name + " " + batch.name + (causal ? " causal" : " full"), shape.heads, shape.dim,
                          batch.lengths, causal});
      }
    }
  }
  return result;
}

}  // namespace packseq::bench
