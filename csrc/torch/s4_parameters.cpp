#include "torch/s4_parameters.h"

#include <limits>

#include "longconv/filters.h"

namespace packseq {

void check_poles(const Argument& a, int64_t poles) {
  check(poles >= 1 && poles <= kMostPoles, a, " must have between 1 and ", kMostPoles, " poles, got ", poles);
}

void S4Parameters::check_all(ScalarType complex, const Argument& like) const {
  const auto check_one = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape, ScalarType type) {
    const Argument a = named(name, t);
    check_shape(a, shape);
    check_dtype(a, type);
    check_same_device(a, like);
  };
  check_dims(named("w", w), 2, "[channels, poles]");
  check_poles(named("w", w), poles());
  check_one("w", w, {channels(), poles()}, complex);
  check_one("B", B, {channels(), poles()}, complex);
  if (has_filters()) {
    check(filters() <= std::numeric_limits<int>::max(), named("C", C), " must have at most 2^31 - 1 filters, got ",
          filters());
    check_one("C", C, {filters(), channels(), poles()}, complex);
  } else {
    check_dims(named("C", C), 2, "[channels, poles] or [filters, channels, poles]");
    check_one("C", C, {channels(), poles()}, complex);
  }
  check_one("dt", dt, {channels()}, complex == ScalarType::ComplexDouble ? ScalarType::Double : ScalarType::Float);
  if (P) {
    check_dims(named("P", *P), 3, "[rank, channels, poles]");
    check(rank() >= 1 && rank() <= kMostRank, named("P", *P), " must have rank 1 or 2, got ", rank());
    check_one("P", *P, {rank(), channels(), poles()}, complex);
  }
}

void S4Parameters::make_contiguous() {
  for (Tensor* t : {&w, &B, &C, &dt}) *t = torch::stable::contiguous(*t);
  packseq::make_contiguous(P);
}

}  // namespace packseq
