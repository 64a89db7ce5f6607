// Errors: one sentence that names the argument, what it was and what it must be.
//
// Put together without iostreams: a toolchain that links the C++ library statically would bring a second set of
// locales into a process that has one.
#pragma once
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace packseq {

inline std::string text_of(std::string_view text) { return std::string(text); }

template <class Number>
requires std::is_arithmetic_v<Number> std::string text_of(Number x) {
  if constexpr (std::is_integral_v<Number>) return std::to_string(x);
  char text[32];
  std::snprintf(text, sizeof text, "%g", double(x));
  return text;
}

// Throws std::invalid_argument (Python's ValueError) with the parts as one message. A part is text, a number, or
// anything with a text_of().
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string() + ... + text_of(parts)));
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace packseq
