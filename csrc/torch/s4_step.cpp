// S4's recurrence: checks, allocation, and the way down to csrc/longconv/s4_step.h.
#include "longconv/s4_step.h"

#include <torch/csrc/stable/library.h>

#include "torch/backend.h"
#include "torch/checks.h"
#include "torch/s4_parameters.h"

namespace packseq {
namespace {

constexpr const char* kOp = "s4_step";

// What the operator is called with, as it came.
struct Inputs : S4Parameters {
  Tensor states, u, cu_seqlens;
  OptionalTensor indices, D;
  bool zoh;

  int64_t total() const { return u.size(0); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }
};

void check_inputs(const Inputs& in) {
  const auto u = in.named("u", in.u), states = in.named("states", in.states);
  check_dims(u, 2, "[total, channels]");
  check_channels(u, in.u.size(1));
  dtype_on_device(u);
  const ScalarType real = parameter_type(in.u);
  check_dims(in.named("w", in.w), 2, "[channels, poles]");
  check_shape(in.named("w", in.w), {in.u.size(1), in.poles()});
  in.check_all(complex_of(real), u);
  check(in.filters() >= 1, in.named("C", in.C), " must have at least 1 filter, got 0");
  if (in.P) {
    check(!in.zoh, in.named("P", *in.P), " must be None where the discretization is zoh, got rank ", in.rank());
  }
  if (in.D) {
    const auto D = in.named("D", *in.D);
    if (in.has_filters()) {
      check_shape(D, {in.filters(), in.channels()});
    } else {
      check_shape(D, {in.channels()});
    }
    check_dtype(D, real);
    check_same_device(D, u);
  }
  check_boundaries(in.named("cu_seqlens", in.cu_seqlens), u);
  check_boundary_values(in.named("cu_seqlens", in.cu_seqlens), in.total());

  check_pool(states, 3, "[slots, channels, poles]");
  check_shape(states, {in.states.size(0), in.channels(), in.poles()});
  check_same_dtype(states, in.named("w", in.w));
  check_same_device(states, u);
  check_slots(kOp, in.indices, states, in.sequences());
}

template <class Backend>
Tensor step(Tensor states, const Tensor& u, const Tensor& w, const Tensor& B, const Tensor& C, const Tensor& dt,
            const Tensor& cu_seqlens, const OptionalTensor& indices, const OptionalTensor& P, const OptionalTensor& D,
            bool zoh) {
  Inputs in{{kOp, w, B, C, dt, P}, states, u, cu_seqlens, indices, D, zoh};
  check_inputs(in);
  in.u = readable(u);
  in.make_contiguous();
  for (OptionalTensor* t : {&in.indices, &in.D}) make_contiguous(*t);

  const Backend backend(u);
  const Tensor out = in.has_filters() ? torch::stable::new_empty(u, {in.total(), in.filters(), in.channels()})
                                      : torch::stable::new_empty(u, {in.total(), in.channels()});
  s4_step({.dtype = dtype_of(in.named("u", u)),
           .total = in.total(),
           .sequences = in.sequences(),
           .channels = in.channels(),
           .filters = int(in.filters()),
           .poles = int(in.poles()),
           .rank = int(in.rank()),
           .zoh = zoh,
           .cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
           .u = rows_of(in.u),
           .w = in.w.const_data_ptr(),
           .P = data_of(in.P),
           .B = in.B.const_data_ptr(),
           .C = in.C.const_data_ptr(),
           .dt = in.dt.const_data_ptr(),
           .D = data_of(in.D),
           .pool = states.mutable_data_ptr(),
           .slots = states.size(0),
           .indices = static_cast<const int32_t*>(data_of(in.indices)),
           .out = out.mutable_data_ptr()},
          backend);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) { m.impl("s4_step", TORCH_BOX(&step<Cpu>)); }

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) { m.impl("s4_step", TORCH_BOX(&step<Cuda>)); }

}  // namespace packseq
