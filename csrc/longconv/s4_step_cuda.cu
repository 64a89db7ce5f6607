// S4's recurrence on the GPU, host side.
#include "core/device/element_type.cuh"
#include "longconv/filters.h"
#include "longconv/s4_step.cuh"

namespace packseq {
namespace {

void check_step(const S4Step& s) {
  check(s.dtype != Dtype::f64, "s4_step: float64 is for the CPU only");
  check(s.poles >= 1 && s.poles <= kMostPoles, "s4_step: poles must be between 1 and ", kMostPoles, ", got ", s.poles);
  check(!s.zoh || s.rank == 0, "s4_step: zero-order hold needs rank 0, got rank ", s.rank);
}

}  // namespace

void s4_step(const S4Step& s, cudaStream_t stream) {
  check_step(s);
  with_element_type(s.dtype, [&]<class T>(std::type_identity<T>) {
    dispatch<0, 1, 2>("rank", s.rank, [&](auto rank) {
      dispatch<8, 32, 256>("lanes",
                           s.poles <= 32    ? 8
                           : s.poles <= 128 ? 32
                                            : 256,
                           [&](auto lanes) { launch_s4_step<S4StepKind<T, rank, lanes>>(s, stream); });
    });
  });
}

}  // namespace packseq
