// The long convolution: checks, allocation, and the way down to csrc/longconv/longconv.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "longconv/longconv.h"
#include "torch/backend.h"
#include "torch/checks.h"

namespace packseq {
namespace {

// What every operator here is called with, as it came.
struct Inputs {
  const char* op;
  Tensor u, k, cu_seqlens;
  OptionalTensor D, pre_gate, gate, k_after;
  bool reverse;

  Argument named(const char* name, const Tensor& t) const { return {op, name, t}; }
  int64_t total() const { return u.size(0); }
  int64_t channels() const { return u.size(1); }
};

void check_filter(const Inputs& in, const Argument& k) {
  check_dims(k, 2, "[channels, taps]");
  const int64_t taps = k.tensor.size(1);
  check(taps >= 1, k, " must have at least one tap, got 0");
  check_shape(k, {in.channels(), taps});
  check_dtype(k, parameter_type(in.u));
  check_same_device(k, in.named("u", in.u));
}

void check_inputs(const Inputs& in) {
  const auto u = in.named("u", in.u);
  check_dims(u, 2, "[total, channels]");
  check_channels(u, in.channels());
  dtype_on_device(u);
  if (in.pre_gate) check_rows_like(in.named("pre_gate", *in.pre_gate), u);
  if (in.gate) check_rows_like(in.named("gate", *in.gate), u);

  check_filter(in, in.named("k", in.k));
  if (in.k_after) check_filter(in, in.named("k_after", *in.k_after));
  if (in.D) {
    const auto D = in.named("D", *in.D);
    check_shape(D, {in.channels()});
    check_dtype(D, parameter_type(in.u));
    check_same_device(D, u);
  }

  const auto cu_seqlens = in.named("cu_seqlens", in.cu_seqlens);
  check_boundaries(cu_seqlens, u);
  check_boundary_values(cu_seqlens, in.total());
}

// Checks everything, then makes the tensors ready for the kernels; they stay alive as long as this does.
struct Ready : Inputs {
  explicit Ready(const Inputs& in) : Inputs(in) {
    check_inputs(in);
    u = readable(u);
    for (OptionalTensor* rows : {&pre_gate, &gate}) {
      if (*rows) *rows = readable(**rows);
    }
    k = torch::stable::contiguous(k);
    make_contiguous(k_after);
    make_contiguous(D);
  }

  LongConvProblem problem() const {
    return {.dtype = dtype_of(named("u", u)),
            .total = total(),
            .sequences = cu_seqlens.size(0) - 1,
            .channels = channels(),
            .cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
            .reverse = reverse,
            .u = rows_of(u),
            .pre_gate = pre_gate ? rows_of(*pre_gate) : Rows{},
            .gate = gate ? rows_of(*gate) : Rows{},
            .k = k.const_data_ptr(),
            .k_after = data_of(k_after),
            .taps = k.size(1),
            .taps_after = k_after ? k_after->size(1) : 0,
            .D = data_of(D)};
  }
};

void run(const LongConvForward& call, const Tensor&, const Cpu& on) { long_conv_forward(call, on); }
void run(const LongConvBackward& call, const Tensor&, const Cpu& on) { long_conv_backward(call, on); }
#if PACKSEQ_HAS_CUDA
void run(const LongConvForward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, long_conv_forward_workspace(call.problem), like, on, long_conv_forward);
}
void run(const LongConvBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, long_conv_backward_workspace(call.problem), like, on, long_conv_backward);
}
#endif

template <class Backend>
Tensor long_conv(const Tensor& u, const Tensor& k, const Tensor& cu_seqlens, const OptionalTensor& D,
                 const OptionalTensor& pre_gate, const OptionalTensor& gate, const OptionalTensor& k_after,
                 bool reverse) {
  const Ready in({"long_conv", u, k, cu_seqlens, D, pre_gate, gate, k_after, reverse});
  const Backend backend(u);
  const Tensor out = torch::stable::new_empty(u, {in.total(), in.channels()});
  run(LongConvForward{.problem = in.problem(), .out = out.mutable_data_ptr(), .workspace = nullptr}, u, backend);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> long_conv_backward(
    const Tensor& dout_in, const Tensor& u, const Tensor& k, const Tensor& cu_seqlens, const OptionalTensor& D,
    const OptionalTensor& pre_gate, const OptionalTensor& gate, const OptionalTensor& k_after, bool reverse) {
  const Ready in({"long_conv_backward", u, k, cu_seqlens, D, pre_gate, gate, k_after, reverse});
  check_rows_like(in.named("dout", dout_in), in.named("u", u));
  const Backend backend(u);
  const Tensor dout = readable(dout_in);

  const Tensor du = gradient_of(u), dk = gradient_of(k);
  const Tensor dD = gradient_of(D, k), dpre_gate = gradient_of(pre_gate, u), dgate = gradient_of(gate, u);
  const Tensor dk_after = gradient_of(k_after, k);
  run(LongConvBackward{.problem = in.problem(),
                       .dout = rows_of(dout),
                       .du = du.mutable_data_ptr(),
                       .dpre_gate = data_of_gradient(dpre_gate, pre_gate),
                       .dgate = data_of_gradient(dgate, gate),
                       .dk = dk.mutable_data_ptr(),
                       .dk_after = data_of_gradient(dk_after, k_after),
                       .dD = data_of_gradient(dD, D),
                       .workspace = nullptr},
      u, backend);
  return {du, dk, dD, dpre_gate, dgate, dk_after};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) {
  m.impl("long_conv", TORCH_BOX(&long_conv<Cpu>));
  m.impl("long_conv_backward", TORCH_BOX(&long_conv_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) {
  m.impl("long_conv", TORCH_BOX(&long_conv<Cuda>));
  m.impl("long_conv_backward", TORCH_BOX(&long_conv_backward<Cuda>));
}

}  // namespace packseq
