// S4's recurrence: checks, allocation, and the way down to csrc/longconv/s4_step.h.
#include "longconv/s4_step.h"

#include <torch/csrc/stable/library.h>

#include <limits>

#include "longconv/filters.h"
#include "torch/backend.h"
#include "torch/checks.h"

namespace packseq {
namespace {

constexpr const char* kOp = "s4_step";
constexpr int64_t kMostRank = 2;

Argument named(const char* name, const Tensor& t) { return {kOp, name, t}; }

// What the operator is called with, as it came.
struct Inputs {
  Tensor states, u, w, B, C, dt, cu_seqlens;
  OptionalTensor indices, P, D;
  bool zoh;

  int64_t total() const { return u.size(0); }
  int64_t channels() const { return u.size(1); }
  int64_t poles() const { return w.size(1); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }
  int64_t rank() const { return P ? P->size(0) : 0; }
  bool has_filters() const { return C.dim() == 3; }
  int64_t filters() const { return has_filters() ? C.size(0) : 1; }
};

void check_parameter(const Inputs& in, const Argument& a, ScalarType type) {
  check_dtype(a, type);
  check_same_device(a, named("u", in.u));
}

void check_parameters(const Inputs& in) {
  const ScalarType real = parameter_type(in.u), complex = complex_of(real);
  const auto w = named("w", in.w), B = named("B", in.B), C = named("C", in.C), dt = named("dt", in.dt);
  check_dims(w, 2, "[channels, poles]");
  check(in.poles() >= 1 && in.poles() <= kMostPoles, w, " must have between 1 and ", kMostPoles, " poles, got ",
        in.poles());
  check_shape(w, {in.channels(), in.poles()});
  check_parameter(in, w, complex);
  check_shape(B, {in.channels(), in.poles()});
  check_parameter(in, B, complex);
  if (in.has_filters()) {
    check(in.filters() >= 1 && in.filters() <= std::numeric_limits<int>::max(), C,
          " must have between 1 and 2^31 - 1 filters, got ", in.filters());
    check_shape(C, {in.filters(), in.channels(), in.poles()});
  } else {
    check_dims(C, 2, "[channels, poles] or [filters, channels, poles]");
    check_shape(C, {in.channels(), in.poles()});
  }
  check_parameter(in, C, complex);
  check_shape(dt, {in.channels()});
  check_parameter(in, dt, real);

  if (in.P) {
    const auto P = named("P", *in.P);
    check_dims(P, 3, "[rank, channels, poles]");
    check(in.rank() >= 1 && in.rank() <= kMostRank, P, " must have rank 1 or 2, got ", in.rank());
    check_shape(P, {in.rank(), in.channels(), in.poles()});
    check_parameter(in, P, complex);
    check(!in.zoh, P, " must be None where the discretization is zoh, got rank ", in.rank());
  }
  if (in.D) {
    const auto D = named("D", *in.D);
    if (in.has_filters()) {
      check_shape(D, {in.filters(), in.channels()});
    } else {
      check_shape(D, {in.channels()});
    }
    check_parameter(in, D, real);
  }
}

void check_inputs(const Inputs& in) {
  const auto u = named("u", in.u), states = named("states", in.states);
  check_dims(u, 2, "[total, channels]");
  check_channels(u, in.channels());
  dtype_on_device(u);
  check_parameters(in);
  check_boundaries(named("cu_seqlens", in.cu_seqlens), u);
  check_boundary_values(named("cu_seqlens", in.cu_seqlens), in.total());

  check_pool(states, 3, "[slots, channels, poles]");
  check_shape(states, {in.states.size(0), in.channels(), in.poles()});
  check_same_dtype(states, named("w", in.w));
  check_same_device(states, u);
  check_slots(kOp, in.indices, states, in.sequences());
}

void run(const S4Step& call, const Cpu& backend) { s4_step(call, Executor(backend)); }
#if PACKSEQ_HAS_CUDA
void run(const S4Step& call, const Cuda& backend) { s4_step(call, backend.stream); }
#endif

template <class Backend>
Tensor step(Tensor states, const Tensor& u, const Tensor& w, const Tensor& B, const Tensor& C, const Tensor& dt,
            const Tensor& cu_seqlens, const OptionalTensor& indices, const OptionalTensor& P, const OptionalTensor& D,
            bool zoh) {
  Inputs in{states, u, w, B, C, dt, cu_seqlens, indices, P, D, zoh};
  check_inputs(in);
  in.u = readable(u, alignment_of(u, in.channels()));
  for (Tensor* t : {&in.w, &in.B, &in.C, &in.dt}) *t = torch::stable::contiguous(*t);
  for (OptionalTensor* t : {&in.indices, &in.P, &in.D}) make_contiguous(*t);

  const Backend backend(u);
  const Tensor out = in.has_filters() ? torch::stable::new_empty(u, {in.total(), in.filters(), in.channels()})
                                      : torch::stable::new_empty(u, {in.total(), in.channels()});
  run(S4Step{.dtype = dtype_of(named("u", u)),
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
