// Errors: one sentence that names the argument, what it was and what it must be.
#pragma once
#include <sstream>
#include <stdexcept>

namespace packseq {

// Throws std::invalid_argument (Python's ValueError) with the parts streamed into one message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace packseq
