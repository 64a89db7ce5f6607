// From a run-time value to a compile-time constant.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

namespace packseq {

template <auto V>
using constant = std::integral_constant<decltype(V), V>;

// Calls f(constant<V>{}) for the one V among Vs that equals `value`; throws when none does.
template <auto... Vs, class Value, class F>
void dispatch(const char* what, Value value, F&& f) {
  const bool known = ((value == static_cast<Value>(Vs) && (f(constant<Vs>{}), true)) || ...);
  if (!known) {
    throw std::invalid_argument(std::string(what) + ": unsupported value " +
                                std::to_string(static_cast<long long>(value)));
  }
}

}  // namespace packseq
