// Lengths of the benchmarks' cases.
#pragma once
#include <cmath>
#include <istream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace packseq::bench {

// As the tables write them: 512*32 is 32 sequences of 512 tokens.
inline std::vector<int> parse_lengths(std::istream& words) {
  std::vector<int> lengths;
  for (std::string word; words >> word;) {
    const size_t star = word.find('*');
    const int times = star == std::string::npos ? 1 : std::stoi(word.substr(star + 1));
    lengths.insert(lengths.end(), size_t(times), std::stoi(word));
  }
  return lengths;
}

// `count` lengths, `total` in all, spread as exp(0.8 z) is for a normal z: the same on every machine.
inline std::vector<int> log_normal_lengths(int count, int total) {
  std::mt19937 random(1);
  std::vector<double> weights;
  for (int i = 0; i < count; ++i) {
    double z = -6;  // twelve uniform numbers less their mean
    for (int j = 0; j < 12; ++j) z += double(random()) * 0x1p-32;
    weights.push_back(std::exp(0.8 * z));
  }
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int> lengths;
  for (double w : weights) lengths.push_back(int(w * total / sum));
  lengths.back() += total - std::accumulate(lengths.begin(), lengths.end(), 0);
  return lengths;
}

}  // namespace packseq::bench
