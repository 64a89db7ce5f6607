// Lengths as the tables of cases write them: 512*32 is 32 sequences of 512 tokens.
#pragma once
#include <istream>
#include <string>
#include <vector>

namespace packseq::bench {

inline std::vector<int> parse_lengths(std::istream& words) {
  std::vector<int> lengths;
  for (std::string word; words >> word;) {
    const size_t star = word.find('*');
    const int times = star == std::string::npos ? 1 : std::stoi(word.substr(star + 1));
    lengths.insert(lengths.end(), size_t(times), std::stoi(word));
  }
  return lengths;
}

}  // namespace packseq::bench
