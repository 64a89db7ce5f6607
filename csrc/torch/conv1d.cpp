// The causal convolution: checks, allocation, and the way down to csrc/scan/conv1d.h.
#include "scan/conv1d.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"

namespace packseq {
namespace {

constexpr int64_t kWidthLeast = 2, kWidthMost = 8;

// What every operator here is called with, as it came.
struct Inputs {
  const char* op;
  Tensor x, weight, cu_seqlens;
  OptionalTensor bias, initial_states;
  bool silu, reverse;

  Argument named(const char* name, const Tensor& t) const { return {op, name, t}; }
  int64_t channels() const { return x.size(1); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }
  int64_t width() const { return weight.size(1); }
};

void check_inputs(const Inputs& in) {
  const auto x = in.named("x", in.x), weight = in.named("weight", in.weight);
  check_dims(x, 2, "[total, channels]");
  check_channels(x, in.channels());
  dtype_on_device(x);

  const auto check_parameter = [&](const Argument& a) {
    check_dtype(a, parameter_type(in.x));
    check_same_device(a, x);
  };
  check_dims(weight, 2, "[channels, width]");
  check(in.width() >= kWidthLeast && in.width() <= kWidthMost, weight, " must have a width between ", kWidthLeast,
        " and ", kWidthMost, ", got ", in.width());
  check_shape(weight, {in.channels(), in.width()});
  check_parameter(weight);
  if (in.bias) {
    const auto bias = in.named("bias", *in.bias);
    check_shape(bias, {in.channels()});
    check_parameter(bias);
  }

  const auto cu_seqlens = in.named("cu_seqlens", in.cu_seqlens);
  check_boundaries(cu_seqlens, x);
  check_boundary_values(cu_seqlens, in.x.size(0));
}

// [rows, channels, width - 1] of x's type.
void check_states(const Inputs& in, const Argument& states, int64_t rows) {
  const auto x = in.named("x", in.x);
  check_shape(states, {rows, in.channels(), in.width() - 1});
  check_same_dtype(states, x);
  check_same_device(states, x);
}

// Checks everything, then makes the tensors ready for the kernels; they stay alive as long as this does.
struct Ready : Inputs {
  explicit Ready(const Inputs& in) : Inputs(in) {
    check_inputs(in);
    if (initial_states) check_states(in, named("initial_states", *initial_states), sequences());
    x = readable(x);
    weight = torch::stable::contiguous(weight);
    make_contiguous(bias);
    make_contiguous(initial_states);
  }

  Conv1dProblem problem() const {
    return {.dtype = dtype_of(named("x", x)),
            .total = x.size(0),
            .sequences = sequences(),
            .channels = int(channels()),
            .width = int(width()),
            .cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
            .reverse = reverse,
            .silu = silu,
            .x = rows_of(x),
            .weight = weight.const_data_ptr(),
            .bias = data_of(bias),
            .initial_states = data_of(initial_states)};
  }
};

void run(const Conv1dBackward& call, const Tensor&, const Cpu& on) { conv1d_backward(call, on); }
#if PACKSEQ_HAS_CUDA
void run(const Conv1dBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, conv1d_backward_workspace(call.problem), like, on, conv1d_backward);
}
#endif

template <class Backend>
std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const Tensor& cu_seqlens,
                                         const OptionalTensor& bias, const OptionalTensor& initial_states, bool silu,
                                         bool reverse, bool return_final_states) {
  const Ready in({"causal_conv1d", x, weight, cu_seqlens, bias, initial_states, silu, reverse});
  const Backend backend(x);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const Tensor final_states =
      torch::stable::new_empty(x, {return_final_states ? in.sequences() : 0, in.channels(), in.width() - 1});
  conv1d_forward({.problem = in.problem(),
                  .out = out.mutable_data_ptr(),
                  .final_states = return_final_states ? final_states.mutable_data_ptr() : nullptr},
                 backend);
  return {out, final_states};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& dout_in,
                                                                  const OptionalTensor& dfinal_states_in,
                                                                  const Tensor& x, const Tensor& weight,
                                                                  const Tensor& cu_seqlens, const OptionalTensor& bias,
                                                                  const OptionalTensor& initial_states, bool silu,
                                                                  bool reverse) {
  const Ready in({"causal_conv1d_backward", x, weight, cu_seqlens, bias, initial_states, silu, reverse});
  check_rows_like(in.named("dout", dout_in), in.named("x", x));
  if (dfinal_states_in) check_states(in, in.named("dfinal_states", *dfinal_states_in), in.sequences());
  const Backend backend(x);
  const Tensor dout = readable(dout_in);
  OptionalTensor dfinal_states = dfinal_states_in;
  make_contiguous(dfinal_states);

  const Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const Tensor dweight = torch::stable::new_empty(weight, {in.channels(), in.width()});
  const Tensor dbias = torch::stable::new_empty(weight, {bias ? in.channels() : 0});
  const Tensor dinitial_states = initial_states
                                     ? torch::stable::new_empty(x, {in.sequences(), in.channels(), in.width() - 1})
                                     : torch::stable::new_empty(x, {0});
  run(Conv1dBackward{.problem = in.problem(),
                     .dout = rows_of(dout),
                     .dfinal_states = data_of(dfinal_states),
                     .dx = dx.mutable_data_ptr(),
                     .dweight = dweight.mutable_data_ptr(),
                     .dbias = bias ? dbias.mutable_data_ptr() : nullptr,
                     .dinitial_states = initial_states ? dinitial_states.mutable_data_ptr() : nullptr,
                     .workspace = nullptr},
      x, backend);
  return {dx, dweight, dbias, dinitial_states};
}

template <class Backend>
Tensor causal_conv1d_step(Tensor states, const Tensor& x, const Tensor& weight, const Tensor& cu_seqlens,
                          const OptionalTensor& bias, const OptionalTensor& indices_in, bool silu) {
  const Ready in({"causal_conv1d_step", x, weight, cu_seqlens, bias, std::nullopt, silu, /*reverse=*/false});
  const auto pool = in.named("states", states);
  check_pool(pool, 3, "[slots, channels, width - 1]");
  check_states(in, pool, states.size(0));
  OptionalTensor indices = indices_in;
  check_slots("causal_conv1d_step", indices, pool, in.sequences());
  make_contiguous(indices);

  const Backend backend(x);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  conv1d_step({.problem = in.problem(),
               .pool = states.mutable_data_ptr(),
               .slots = states.size(0),
               .indices = static_cast<const int32_t*>(data_of(indices)),
               .out = out.mutable_data_ptr()},
              backend);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<Cpu>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward<Cpu>));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<Cuda>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward<Cuda>));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step<Cuda>));
}

}  // namespace packseq
