// Attention: checks, allocation, and the way down to csrc/attention/.
#include "attention/attention.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "torch/backend.h"
#include "torch/checks.h"

namespace packseq {
namespace {

// What both directions are called with, as it came.
struct Inputs {
  const char* op;
  Tensor q, k, v, cu_seqlens;
  OptionalTensor cu_seqlens_k;
  bool causal;
  int64_t window_left, window_right, sink_tokens;
  double softcap;
  OptionalTensor alibi_slopes, sinks;
  std::optional<double> scale;
  OptionalTensor positions = std::nullopt;

  Argument named(const char* name, const Tensor& t) const { return {op, name, t}; }
  // Of lse and everything else that goes with it.
  ScalarType statistics() const {
    return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

void check_dtypes(const Inputs& in) {
  const Dtype dtype = dtype_of(in.named("q", in.q));
  const auto q = in.named("q", in.q);
  check_same_dtype(in.named("k", in.k), q);
  check_same_dtype(in.named("v", in.v), q);
  if (!in.q.is_cuda()) return;
  check(dtype != Dtype::f64, q, " must be float16, bfloat16 or float32 on a GPU, got float64");
  for (const auto& a : {q, in.named("v", in.v)}) {
    const int64_t dim = a.tensor.size(2);
    check(dim % 8 == 0 && dim <= 256, a, " must have a head dim that is a multiple of 8 up to 256 on a GPU, got ", dim);
  }
}

void check_shapes(const Inputs& in) {
  check_dims(in.named("q", in.q), 3, "[total_q, heads, dim]");
  check_dims(in.named("k", in.k), 3, "[total_k, kv_heads, dim]");
  check_dims(in.named("v", in.v), 3, "[total_k, kv_heads, dim_v]");
  const int64_t heads = in.q.size(1), kv_heads = in.k.size(1), dim = in.q.size(2);
  check(heads >= 1 && dim >= 1, in.named("q", in.q), " must have at least one head and a head dim of at least 1, got [",
        in.q.size(0), ", ", heads, ", ", dim, "]");
  check(kv_heads >= 1 && heads % kv_heads == 0, in.named("k", in.k), " must have a number of heads that divides q's ",
        heads, ", got ", kv_heads);
  check_shape(in.named("k", in.k), {in.k.size(0), kv_heads, dim});
  check(in.v.size(2) >= 1, in.named("v", in.v), " must have a head dim of at least 1, got ", in.v.size(2));
  check_shape(in.named("v", in.v), {in.k.size(0), kv_heads, in.v.size(2)});
}

void check_sequences(const Inputs& in) {
  const auto q = in.named("q", in.q), cu_q = in.named("cu_seqlens", in.cu_seqlens);
  check_boundaries(cu_q, q);
  check_boundary_values(cu_q, in.q.size(0));
  if (in.cu_seqlens_k) {
    const auto cu_k = in.named("cu_seqlens_k", *in.cu_seqlens_k);
    check_boundaries(cu_k, q);
    check_shape(cu_k, {in.cu_seqlens.size(0)});
    check_boundary_values(cu_k, in.k.size(0));
  } else {
    check(in.k.size(0) == in.q.size(0), in.named("k", in.k), " must have q's ", in.q.size(0),
          " rows, or cu_seqlens_k must be given, got ", in.k.size(0));
  }
  if (in.positions) {
    const auto positions = in.named("positions", *in.positions);
    check_shape(positions, {in.cu_seqlens.size(0) - 1, 2});
    check_dtype(positions, ScalarType::Int);
    check_same_device(positions, q);
  }
}

void check_options(const Inputs& in) {
  check(in.window_left >= -1 && in.window_right >= -1, in.op,
        ": window must be two numbers of at least 0, or -1 for unbounded, got (", in.window_left, ", ", in.window_right,
        ")");
  check(in.sink_tokens >= 0, in.op, ": sink_tokens must be at least 0, got ", in.sink_tokens);
  check(in.softcap >= 0 && std::isfinite(in.softcap), in.op, ": softcap must be finite and at least 0, got ",
        in.softcap);
  check(!in.scale || std::isfinite(*in.scale), in.op, ": scale must be finite, got ", in.scale.value_or(0));
  const auto check_per_head = [&](const Argument& a) {
    check_shape(a, {in.q.size(1)});
    check_dtype(a, in.statistics());
    check_same_device(a, in.named("q", in.q));
  };
  if (in.alibi_slopes) check_per_head(in.named("alibi_slopes", *in.alibi_slopes));
  if (in.sinks) check_per_head(in.named("sinks", *in.sinks));
}

// Checks everything, then makes the tensors ready for the kernels; they stay alive as long as this does.
struct Ready : Inputs {
  explicit Ready(const Inputs& in) : Inputs(in) {
    check_shapes(in);
    check_same_device(named("k", k), named("q", q));
    check_same_device(named("v", v), named("q", q));
    check_dtypes(in);
    check_sequences(in);
    check_options(in);
    for (Tensor* t : {&q, &k, &v}) *t = readable(*t, alignment());
    make_contiguous(alibi_slopes);
    make_contiguous(sinks);
    make_contiguous(positions);
  }

  int64_t alignment() const { return q.is_cuda() ? 16 : 1; }

  AttentionProblem problem() const {
    const auto boundaries = [](const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); };
    return {.dtype = dtype_of(named("q", q)),
            .total_q = q.size(0),
            .total_k = k.size(0),
            .sequences = cu_seqlens.size(0) - 1,
            .heads = int(q.size(1)),
            .kv_heads = int(k.size(1)),
            .dim = int(q.size(2)),
            .dim_v = int(v.size(2)),
            .cu_seqlens_q = boundaries(cu_seqlens),
            .cu_seqlens_k = boundaries(cu_seqlens_k.value_or(cu_seqlens)),
            .q = packed_of(q),
            .k = packed_of(k),
            .v = packed_of(v),
            .scale = scale.value_or(1 / std::sqrt(double(q.size(2)))),
            .causal = causal,
            .window_left = window_left,
            .window_right = window_right,
            .sink_tokens = sink_tokens,
            .softcap = softcap,
            .alibi_slopes = data_of(alibi_slopes),
            .sinks = data_of(sinks),
            .positions = static_cast<const int32_t*>(data_of(positions))};
  }
};

void run(const AttentionForward& call, const Tensor&, const Cpu& on) { attention_forward(call, on); }
void run(const AttentionBackward& call, const Tensor&, const Cpu& on) { attention_backward(call, on); }
#if PACKSEQ_HAS_CUDA
void run(const AttentionForward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, attention_forward_workspace(call.problem), like, on, attention_forward);
}
void run(const AttentionBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, attention_backward_workspace(call), like, on, attention_backward);
}
#endif

template <class Backend>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                     const OptionalTensor& cu_seqlens_k, bool causal, int64_t window_left,
                                     int64_t window_right, int64_t sink_tokens, double softcap,
                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                     std::optional<double> scale) {
  const Ready in({"attention", q, k, v, cu_seqlens, cu_seqlens_k, causal, window_left, window_right, sink_tokens,
                  softcap, alibi_slopes, sinks, scale});
  const Backend backend(q);
  const Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  const Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, in.statistics());
  run(
      AttentionForward{
          .problem = in.problem(), .out = out.mutable_data_ptr(), .lse = lse.mutable_data_ptr(), .workspace = nullptr},
      q, backend);
  return {out, lse};
}

// A tensor like `out`.
void check_like_out(const Ready& in, const char* name, const Tensor& t) {
  const Argument a = in.named(name, t), q = in.named("q", in.q);
  check_shape(a, {in.q.size(0), in.q.size(1), in.v.size(2)});
  check_same_dtype(a, q);
  check_same_device(a, q);
}

// A tensor like `lse`.
void check_like_lse(const Ready& in, const char* name, const Tensor& t) {
  const Argument a = in.named(name, t);
  check_shape(a, {in.q.size(0), in.q.size(1)});
  check_dtype(a, in.statistics());
  check_same_device(a, in.named("q", in.q));
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const OptionalTensor& dlse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out_in, const Tensor& lse_in, const Tensor& cu_seqlens, const OptionalTensor& cu_seqlens_k,
    bool causal, int64_t window_left, int64_t window_right, int64_t sink_tokens, double softcap,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, std::optional<double> scale) {
  const Ready in({"attention_backward", q, k, v, cu_seqlens, cu_seqlens_k, causal, window_left, window_right,
                  sink_tokens, softcap, alibi_slopes, sinks, scale});
  check_like_out(in, "dout", dout_in);
  check_like_out(in, "out", out_in);
  check_like_lse(in, "lse", lse_in);
  if (dlse_in) check_like_lse(in, "dlse", *dlse_in);
  const Backend backend(q);
  const Tensor dout = readable(dout_in, in.alignment());
  const Tensor out = torch::stable::contiguous(out_in), lse = torch::stable::contiguous(lse_in);
  OptionalTensor dlse = dlse_in;
  make_contiguous(dlse);

  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2)}); };
  const Tensor dq = like(q), dk = like(k), dv = like(v);
  const Tensor dsinks = torch::stable::new_empty(q, {sinks ? q.size(1) : 0}, in.statistics());
  run(AttentionBackward{.problem = in.problem(),
                        .dout = packed_of(dout),
                        .out = out.const_data_ptr(),
                        .lse = lse.const_data_ptr(),
                        .dlse = data_of(dlse),
                        .dq = dq.mutable_data_ptr(),
                        .dk = dk.mutable_data_ptr(),
                        .dv = dv.mutable_data_ptr(),
                        .dsinks = sinks ? dsinks.mutable_data_ptr() : nullptr,
                        .workspace = nullptr},
      q, backend);
  return {dq, dk, dv, dsinks};
}

// Where a tensor that a call writes begins.
void* writable(const Argument& a) {
  check(a.tensor.is_contiguous(), a, " must be contiguous");
  void* const data = a.tensor.mutable_data_ptr();
  check(!a.tensor.is_cuda() || reinterpret_cast<uintptr_t>(data) % 16 == 0, a,
        " must begin at a multiple of 16 bytes on a GPU");
  return data;
}

// A tensor that a call adds to, in the statistics' type.
void* accumulator(const Ready& in, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  const Argument a = in.named(name, t);
  check_shape(a, shape);
  check_dtype(a, in.statistics());
  check_same_device(a, in.named("q", in.q));
  return writable(a);
}

template <class Backend>
void attention_accumulate(const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor sums,
                          const Tensor& cu_seqlens, const Tensor& cu_seqlens_k, const Tensor& positions, bool causal,
                          int64_t window_left, int64_t window_right, int64_t sink_tokens, double softcap,
                          const OptionalTensor& alibi_slopes, std::optional<double> scale) {
  const Ready in({"attention_accumulate", q, k, v, cu_seqlens, cu_seqlens_k, causal, window_left, window_right,
                  sink_tokens, softcap, alibi_slopes, std::nullopt, scale, positions});
  const int64_t rows = q.size(0), heads = q.size(1);
  const Backend backend(q);
  run(AttentionForward{.problem = in.problem(),
                       .out = accumulator(in, "out", out, {rows, heads, v.size(2)}),
                       .lse = nullptr,
                       .workspace = nullptr,
                       .sums = accumulator(in, "sums", sums, {rows, heads, 2})},
      q, backend);
}

template <class Backend>
void attention_accumulate_backward(const Tensor& dout_in, const Tensor& delta_in, const Tensor& q, const Tensor& k,
                                   const Tensor& v, const Tensor& lse_in, Tensor dq, Tensor dk, Tensor dv,
                                   bool add_to_keys, const Tensor& cu_seqlens, const Tensor& cu_seqlens_k,
                                   const Tensor& positions, bool causal, int64_t window_left, int64_t window_right,
                                   int64_t sink_tokens, double softcap, const OptionalTensor& alibi_slopes,
                                   std::optional<double> scale) {
  const Ready in({"attention_accumulate_backward", q, k, v, cu_seqlens, cu_seqlens_k, causal, window_left, window_right,
                  sink_tokens, softcap, alibi_slopes, std::nullopt, scale, positions});
  check_like_out(in, "dout", dout_in);
  check_like_lse(in, "lse", lse_in);
  check_like_lse(in, "delta", delta_in);
  const Backend backend(q);
  const Tensor dout = readable(dout_in, in.alignment());
  const Tensor lse = torch::stable::contiguous(lse_in), delta = torch::stable::contiguous(delta_in);
  run(AttentionBackward{.problem = in.problem(),
                        .dout = packed_of(dout),
                        .out = nullptr,
                        .lse = lse.const_data_ptr(),
                        .dlse = nullptr,
                        .dq = accumulator(in, "dq", dq, {q.size(0), q.size(1), q.size(2)}),
                        .dk = accumulator(in, "dk", dk, {k.size(0), k.size(1), k.size(2)}),
                        .dv = accumulator(in, "dv", dv, {v.size(0), v.size(1), v.size(2)}),
                        .dsinks = nullptr,
                        .workspace = nullptr,
                        .delta = delta.const_data_ptr(),
                        .add_to_keys = add_to_keys},
      q, backend);
}

// [rows, heads, dim_v], of a type that the device has kernels for.
Dtype check_results(const Argument& a) {
  check_dims(a, 3, "[rows, heads, dim_v]");
  const Dtype dtype = dtype_on_device(a);
  const int64_t dim = a.tensor.size(2);
  check(dim >= 1 && (!a.tensor.is_cuda() || dim % 8 == 0), a, " must have a head dim of at least 1, ",
        "a multiple of 8 on a GPU, got ", dim);
  return dtype;
}

template <class Backend>
void attention_finish(const Tensor& total_in, const Tensor& sums_in, const OptionalTensor& sinks_in, Tensor out,
                      Tensor lse) {
  constexpr const char* op = "attention_finish";
  const Argument of_out{op, "out", out};
  const Dtype dtype = check_results(of_out);
  const int64_t rows = out.size(0), heads = out.size(1), dim = out.size(2);
  const auto check_like = [&](const Argument& a, std::initializer_list<int64_t> shape) {
    check_shape(a, shape);
    check_dtype(a, parameter_type(out));
    check_same_device(a, of_out);
  };
  check_like({op, "total", total_in}, {rows, heads, dim});
  check_like({op, "sums", sums_in}, {rows, heads, 2});
  check_like({op, "lse", lse}, {rows, heads});
  if (sinks_in) check_like({op, "sinks", *sinks_in}, {heads});
  const Backend backend(out);
  const int64_t alignment = alignment_of(out, 16);
  const Tensor total = readable(torch::stable::contiguous(total_in), alignment);
  const Tensor sums = readable(torch::stable::contiguous(sums_in), alignment);
  OptionalTensor sinks = sinks_in;
  make_contiguous(sinks);
  packseq::attention_finish(AttentionFinish{.dtype = dtype,
                                            .rows = rows,
                                            .heads = int(heads),
                                            .dim_v = int(dim),
                                            .total = total.const_data_ptr(),
                                            .sums = sums.const_data_ptr(),
                                            .sinks = data_of(sinks),
                                            .out = writable(of_out),
                                            .lse = writable({op, "lse", lse})},
                            backend);
}

template <class Backend>
Tensor attention_delta(const Tensor& dout_in, const Tensor& out_in, const OptionalTensor& dlse_in) {
  constexpr const char* op = "attention_delta";
  const Argument of_dout{op, "dout", dout_in}, of_out{op, "out", out_in};
  const Dtype dtype = check_results(of_out);
  check_shape(of_dout, {out_in.size(0), out_in.size(1), out_in.size(2)});
  check_same_dtype(of_dout, of_out);
  check_same_device(of_dout, of_out);
  if (dlse_in) {
    const Argument of_dlse{op, "dlse", *dlse_in};
    check_shape(of_dlse, {out_in.size(0), out_in.size(1)});
    check_dtype(of_dlse, parameter_type(out_in));
    check_same_device(of_dlse, of_out);
  }
  const Backend backend(out_in);
  const int64_t alignment = alignment_of(out_in, 16);
  const Tensor dout = readable(dout_in, alignment), out = readable(torch::stable::contiguous(out_in), alignment);
  OptionalTensor dlse = dlse_in;
  make_contiguous(dlse);
  const Tensor delta = torch::stable::new_empty(out, {out.size(0), out.size(1)}, parameter_type(out));
  packseq::attention_delta(AttentionDelta{.dtype = dtype,
                                          .rows = out.size(0),
                                          .heads = int(out.size(1)),
                                          .dim_v = int(out.size(2)),
                                          .dout = packed_of(dout),
                                          .out = out.const_data_ptr(),
                                          .dlse = data_of(dlse),
                                          .delta = delta.mutable_data_ptr()},
                           backend);
  return delta;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention<Cpu>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cpu>));
  m.impl("attention_accumulate", TORCH_BOX(&attention_accumulate<Cpu>));
  m.impl("attention_accumulate_backward", TORCH_BOX(&attention_accumulate_backward<Cpu>));
  m.impl("attention_finish", TORCH_BOX(&attention_finish<Cpu>));
  m.impl("attention_delta", TORCH_BOX(&attention_delta<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention<Cuda>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cuda>));
  m.impl("attention_accumulate", TORCH_BOX(&attention_accumulate<Cuda>));
  m.impl("attention_accumulate_backward", TORCH_BOX(&attention_accumulate_backward<Cuda>));
  m.impl("attention_finish", TORCH_BOX(&attention_finish<Cuda>));
  m.impl("attention_delta", TORCH_BOX(&attention_delta<Cuda>));
}

}  // namespace packseq
