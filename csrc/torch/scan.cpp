// The selective scan: checks, allocation, and the way down to csrc/scan/scan.h.
#include "scan/scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"

namespace packseq {
namespace {

constexpr int64_t kStatesMost = 256;

// What every operator here is called with, as it came.
struct Inputs {
  const char* op;
  Tensor u, delta, A, B, C, cu_seqlens;
  OptionalTensor D, z, delta_bias, initial_states;
  bool delta_softplus, reverse;

  Argument named(const char* name, const Tensor& t) const { return {op, name, t}; }
  int64_t total() const { return u.size(0); }
  int64_t channels() const { return u.size(1); }
  int64_t states() const { return A.size(1); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }
  bool complex() const { return A.scalar_type() == complex_of(parameter_type(u)); }
  // B or C of every token is [total, groups, states], constant it is [channels, states].
  static bool of_tokens(const Tensor& matrix) { return matrix.dim() == 3; }
  int64_t groups() const { return of_tokens(B) ? B.size(1) : of_tokens(C) ? C.size(1) : 1; }
};

void check_rows(const Inputs& in) {
  const auto u = in.named("u", in.u);
  check_dims(u, 2, "[total, channels]");
  check_channels(u, in.channels());
  dtype_on_device(u);
  check_rows_like(in.named("delta", in.delta), u);
  if (in.z) check_rows_like(in.named("z", *in.z), u);
}

void check_parameters(const Inputs& in) {
  const auto A = in.named("A", in.A), u = in.named("u", in.u);
  check_dims(A, 2, "[channels, states]");
  check_shape(A, {in.channels(), in.states()});
  check(in.states() >= 1 && in.states() <= kStatesMost, A, " must have between 1 and ", kStatesMost, " states, got ",
        in.states());
  const ScalarType got = in.A.scalar_type(), real = parameter_type(in.u);
  if (got != real && got != complex_of(real)) {
    fail(A, " must be ", name_of(real), " or ", name_of(complex_of(real)), ", got ", name_of(got));
  }
  check_same_device(A, u);

  const auto check_per_channel = [&](const Argument& a) {
    check_shape(a, {in.channels()});
    check_dtype(a, real);
    check_same_device(a, u);
  };
  if (in.D) check_per_channel(in.named("D", *in.D));
  if (in.delta_bias) check_per_channel(in.named("delta_bias", *in.delta_bias));
}

void check_state_matrix(const Inputs& in, const Argument& a) {
  const auto A = in.named("A", in.A), u = in.named("u", in.u);
  if (Inputs::of_tokens(a.tensor)) {
    const int64_t groups = a.tensor.size(1);
    check(groups >= 1 && in.channels() % groups == 0, a, " must have a number of groups that divides u's ",
          in.channels(), " channels, got ", groups);
    check_shape(a, {in.total(), in.groups(), in.states()});
    check_same_dtype(a, in.complex() ? A : u);
  } else {
    check_dims(a, 2, "[total, groups, states] or [channels, states]");
    check_shape(a, {in.channels(), in.states()});
    check_same_dtype(a, A);
  }
  check_same_device(a, u);
}

// [rows, channels, states] of A's type.
void check_states(const Inputs& in, const Argument& states, int64_t rows) {
  check_shape(states, {rows, in.channels(), in.states()});
  check_same_dtype(states, in.named("A", in.A));
  check_same_device(states, in.named("u", in.u));
}

// Checks everything, then makes the tensors ready for the kernels; they stay alive as long as this does.
struct Ready : Inputs {
  explicit Ready(const Inputs& in) : Inputs(in) {
    check_rows(in);
    check_parameters(in);
    check_state_matrix(in, named("B", B));
    check_state_matrix(in, named("C", C));
    check_boundaries(named("cu_seqlens", cu_seqlens), named("u", u));
    check_boundary_values(named("cu_seqlens", cu_seqlens), total());
    if (initial_states) check_states(in, named("initial_states", *initial_states), sequences());

    for (Tensor* t : {&u, &delta}) *t = readable(*t, alignment());
    for (Tensor* t : {&B, &C}) *t = of_tokens(*t) ? readable(*t) : torch::stable::contiguous(*t);
    if (z) z = readable(*z, alignment());
    A = torch::stable::contiguous(A);
    for (OptionalTensor* t : {&D, &delta_bias, &initial_states}) make_contiguous(*t);
  }

  int64_t alignment() const { return alignment_of(u, channels()); }

  ScanProblem problem() const {
    const auto state_matrix = [](const Tensor& t) {
      return of_tokens(t) ? StateMatrix{.tokens = packed_of(t), .constants = nullptr}
                          : StateMatrix{.tokens = {}, .constants = t.const_data_ptr()};
    };
    return {.dtype = dtype_of(named("u", u)),
            .complex = complex(),
            .total = total(),
            .sequences = sequences(),
            .channels = int(channels()),
            .states = int(states()),
            .groups = int(groups()),
            .cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
            .reverse = reverse,
            .delta_softplus = delta_softplus,
            .u = rows_of(u),
            .delta = rows_of(delta),
            .z = z ? rows_of(*z) : Rows{},
            .A = A.const_data_ptr(),
            .B = state_matrix(B),
            .C = state_matrix(C),
            .D = data_of(D),
            .delta_bias = data_of(delta_bias),
            .initial_states = data_of(initial_states)};
  }
};

void run(const ScanForward& call, const Tensor&, const Cpu& on) { scan_forward(call, on); }
void run(const ScanBackward& call, const Tensor&, const Cpu& on) { scan_backward(call, on); }
#if PACKSEQ_HAS_CUDA
void run(const ScanForward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, scan_forward_workspace(call.problem), like, on, scan_forward);
}
void run(const ScanBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, scan_backward_workspace(call.problem), like, on, scan_backward);
}
#endif

template <class Backend>
std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                          const Tensor& C, const Tensor& cu_seqlens, const OptionalTensor& D,
                                          const OptionalTensor& z, const OptionalTensor& delta_bias,
                                          const OptionalTensor& initial_states, bool delta_softplus, bool reverse,
                                          bool return_final_states) {
  const Ready in(
      {"selective_scan", u, delta, A, B, C, cu_seqlens, D, z, delta_bias, initial_states, delta_softplus, reverse});
  const Backend backend(u);
  const Tensor out = torch::stable::new_empty(u, {in.total(), in.channels()});
  const Tensor final_states =
      torch::stable::new_empty(A, {return_final_states ? in.sequences() : 0, in.channels(), in.states()});
  run(ScanForward{.problem = in.problem(),
                  .out = out.mutable_data_ptr(),
                  .final_states = return_final_states ? final_states.mutable_data_ptr() : nullptr,
                  .workspace = nullptr},
      u, backend);
  return {out, final_states};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& dout_in, const OptionalTensor& dfinal_states_in, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& cu_seqlens, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_states,
    bool delta_softplus, bool reverse) {
  const Ready in({"selective_scan_backward", u, delta, A, B, C, cu_seqlens, D, z, delta_bias, initial_states,
                  delta_softplus, reverse});
  check_rows_like(in.named("dout", dout_in), in.named("u", u));
  if (dfinal_states_in) check_states(in, in.named("dfinal_states", *dfinal_states_in), in.sequences());
  const Backend backend(u);
  const Tensor dout = readable(dout_in, in.alignment());
  OptionalTensor dfinal_states = dfinal_states_in;
  make_contiguous(dfinal_states);

  const Tensor du = gradient_of(u), ddelta = gradient_of(delta);
  const Tensor dA = gradient_of(A), dB = gradient_of(B), dC = gradient_of(C);
  const Tensor dD = gradient_of(D, u), dz = gradient_of(z, u), ddelta_bias = gradient_of(delta_bias, u);
  const Tensor dinitial_states = gradient_of(initial_states, A);
  run(ScanBackward{.problem = in.problem(),
                   .dout = rows_of(dout),
                   .dfinal_states = data_of(dfinal_states),
                   .du = du.mutable_data_ptr(),
                   .ddelta = ddelta.mutable_data_ptr(),
                   .dz = data_of_gradient(dz, z),
                   .dA = dA.mutable_data_ptr(),
                   .dB = dB.mutable_data_ptr(),
                   .dC = dC.mutable_data_ptr(),
                   .dD = data_of_gradient(dD, D),
                   .ddelta_bias = data_of_gradient(ddelta_bias, delta_bias),
                   .dinitial_states = data_of_gradient(dinitial_states, initial_states),
                   .workspace = nullptr},
      u, backend);
  return {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_states};
}

template <class Backend>
Tensor selective_scan_step(Tensor states, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                           const Tensor& C, const Tensor& cu_seqlens, const OptionalTensor& indices_in,
                           const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                           bool delta_softplus) {
  const Ready in({"selective_scan_step", u, delta, A, B, C, cu_seqlens, D, z, delta_bias, std::nullopt, delta_softplus,
                  /*reverse=*/false});
  const auto pool = in.named("states", states);
  check_pool(pool, 3, "[slots, channels, states]");
  check_states(in, pool, states.size(0));
  OptionalTensor indices = indices_in;
  check_slots("selective_scan_step", indices, pool, in.sequences());
  make_contiguous(indices);

  const Backend backend(u);
  const Tensor out = torch::stable::new_empty(u, {in.total(), in.channels()});
  scan_step({.problem = in.problem(),
             .pool = states.mutable_data_ptr(),
             .slots = states.size(0),
             .indices = static_cast<const int32_t*>(data_of(indices)),
             .out = out.mutable_data_ptr()},
            backend);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan<Cpu>));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward<Cpu>));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan<Cuda>));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward<Cuda>));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step<Cuda>));
}

}  // namespace packseq
