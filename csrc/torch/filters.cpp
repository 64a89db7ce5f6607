// The sums that filters are made of: checks, allocation, and the way down to csrc/longconv/filters.h.
#include "longconv/filters.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "torch/backend.h"
#include "torch/checks.h"
#include "torch/s4_parameters.h"

namespace packseq {
namespace {

// The parts' type of a complex tensor, whatever it is an argument of.
Dtype real_of(const Argument& a) {
  const ScalarType got = a.tensor.scalar_type();
  if (got != ScalarType::ComplexFloat && got != ScalarType::ComplexDouble) {
    fail(a, " must be complex64 or complex128, got ", name_of(got));
  }
  if (got == ScalarType::ComplexDouble && a.tensor.is_cuda()) fail(a, " must be complex64 on a GPU, got complex128");
  return got == ScalarType::ComplexDouble ? Dtype::f64 : Dtype::f32;
}

void check_like(const Argument& a, const Argument& like) {
  check_same_dtype(a, like);
  check_same_device(a, like);
}

void check_length(const char* op, int64_t length) {
  check(length >= 1, op, ": length must be 1 or more, got ", length);
}

// Sizes of `t` with another last one.
std::vector<int64_t> sizes_with(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

// How `a`, [*groups, *rows, width], stands over `poles`, [*rows, poles].
struct Layout {
  int64_t groups = 1, rows = 1;
  int poles;

  Layout(const Argument& a, const Argument& poles_of) {
    const Tensor &t = a.tensor, &p = poles_of.tensor;
    check(p.dim() >= 1, poles_of, " must be [*rows, poles], got shape ", shape_of(p));
    check_poles(poles_of, p.size(p.dim() - 1));
    poles = int(p.size(p.dim() - 1));
    const int64_t extra = t.dim() - p.dim();
    bool fits = extra >= 0;
    for (int64_t dim = 0; fits && dim + 1 < p.dim(); ++dim) {
      fits = t.size(extra + dim) == p.size(dim);
      rows *= p.size(dim);
    }
    if (!fits) {
      fail(a, " must have ", poles_of.name,
           "'s dimensions before the last, with or without more before them, got shape ", shape_of(t), " beside ",
           shape_of(p));
    }
    for (int64_t dim = 0; dim < extra; ++dim) groups *= t.size(dim);
  }
};

// ---- Cauchy

struct CauchyInputs {
  const char* op;
  Tensor v, z, w;
  bool conjugate;

  Argument named(const char* name, const Tensor& t) const { return {op, name, t}; }

  CauchyProblem checked() {
    const auto w_named = named("w", w), v_named = named("v", v), z_named = named("z", z);
    const Dtype real = real_of(w_named);
    const Layout layout(v_named, w_named);
    check(v.size(v.dim() - 1) == layout.poles, v_named, " must have w's ", layout.poles, " poles, got shape ",
          shape_of(v));
    check_like(v_named, w_named);
    check_dims(z_named, 1, "[nodes]");
    check_like(z_named, w_named);
    for (Tensor* t : {&v, &z, &w}) *t = torch::stable::contiguous(*t);
    return {.real = real,
            .conjugate = conjugate,
            .groups = layout.groups,
            .rows = layout.rows,
            .nodes = z.size(0),
            .poles = layout.poles,
            .v = v.const_data_ptr(),
            .z = z.const_data_ptr(),
            .w = w.const_data_ptr()};
  }
};

// ---- Vandermonde

// v or u, over x.
struct VandermondeInputs {
  const char* op;
  const char* name;
  Tensor values, x;

  Argument named(const char* what, const Tensor& t) const { return {op, what, t}; }

  VandermondeProblem checked(int64_t length, bool conjugate, ScalarType type) {
    const auto x_named = named("x", x), values_named = named(name, values);
    const Dtype real = real_of(x_named);
    check_length(op, length);
    const Layout layout(values_named, x_named);
    check_dtype(values_named, type);
    check_same_device(values_named, x_named);
    for (Tensor* t : {&values, &x}) *t = torch::stable::contiguous(*t);
    return {.real = real,
            .conjugate = conjugate,
            .groups = layout.groups,
            .rows = layout.rows,
            .length = length,
            .poles = layout.poles,
            .x = x.const_data_ptr()};
  }

  VandermondeProblem numerators_of(int64_t length, bool conjugate) {
    const VandermondeProblem problem = checked(length, conjugate, x.scalar_type());
    check(values.size(values.dim() - 1) == problem.poles, named(name, values), " must have x's ", problem.poles,
          " poles, got shape ", shape_of(values));
    return problem;
  }

  // The transpose's rows are as long as they are.
  VandermondeProblem rows() {
    check(values.dim() >= 1, named(name, values), " must be [*groups, *rows, length], got shape ", shape_of(values));
    check(values.size(values.dim() - 1) >= 1, named(name, values), " must have a last dimension of 1 or more, got 0");
    const bool is_complex = values.scalar_type() == x.scalar_type();
    if (!is_complex && values.scalar_type() != real_type()) {
      fail(named(name, values), " must be ", name_of(real_type()), " or ", name_of(complex_of(real_type())), ", got ",
           name_of(values.scalar_type()));
    }
    return checked(values.size(values.dim() - 1), !is_complex, values.scalar_type());
  }

  ScalarType real_type() const { return scalar_type_of(real_of(named("x", x))); }
  ScalarType out_type(bool conjugate) const { return conjugate ? real_type() : x.scalar_type(); }
};

// ---- S4

struct S4Inputs : S4Parameters {
  S4Problem checked(int64_t length) {
    const Dtype real = real_of(named("w", w));
    check_all(w.scalar_type(), named("w", w));
    check_length(op, length);
    make_contiguous();
    return {.real = real,
            .filters = filters(),
            .channels = channels(),
            .length = length,
            .poles = int(poles()),
            .rank = int(rank()),
            .w = w.const_data_ptr(),
            .P = data_of(P),
            .B = B.const_data_ptr(),
            .C = C.const_data_ptr(),
            .dt = dt.const_data_ptr()};
  }

  std::vector<int64_t> spectrum_sizes(int64_t length) const { return sizes_with(C, length / 2 + 1); }
};

// The gradient of an output: of its shape and type, contiguous.
Tensor gradient_given(const char* op, const Tensor& dout, const std::vector<int64_t>& sizes, ScalarType type,
                      const Argument& like) {
  const Argument a{op, "dout", dout};
  check_shape(a, sizes);
  check_dtype(a, type);
  check_same_device(a, like);
  return torch::stable::contiguous(dout);
}

// ---- what needs a workspace on a GPU

void run(const CauchyBackward& call, const Tensor&, const Cpu& on) { cauchy_backward(call, on); }
void run(const VandermondeBackward& call, const Tensor&, const Cpu& on) { vandermonde_backward(call, on); }
void run(const VandermondeTranspose& call, const Tensor&, const Cpu& on) { vandermonde_transpose(call, on); }
void run(const VandermondeTransposeBackward& call, const Tensor&, const Cpu& on) {
  vandermonde_transpose_backward(call, on);
}
void run(const S4SpectrumBackward& call, const Tensor&, const Cpu& on) { s4_spectrum_backward(call, on); }
#if PACKSEQ_HAS_CUDA
void run(const CauchyBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, cauchy_backward_workspace(call.problem, call.dz != nullptr), like, on, cauchy_backward);
}
void run(const VandermondeBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, vandermonde_backward_workspace(call.problem), like, on, vandermonde_backward);
}
void run(const VandermondeTranspose& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, vandermonde_backward_workspace(call.problem), like, on, vandermonde_transpose);
}
void run(const VandermondeTransposeBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, vandermonde_backward_workspace(call.problem), like, on, vandermonde_transpose_backward);
}
void run(const S4SpectrumBackward& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, s4_spectrum_backward_workspace(call.problem), like, on, s4_spectrum_backward);
}
#endif

// ---- the operators

template <class Backend>
Tensor cauchy(const Tensor& v, const Tensor& z, const Tensor& w, bool conjugate) {
  CauchyInputs in{"cauchy", v, z, w, conjugate};
  const CauchyProblem problem = in.checked();
  const Backend backend(w);
  const Tensor out = empty(v, sizes_with(v, problem.nodes), w.scalar_type());
  cauchy_forward({.problem = problem, .out = out.mutable_data_ptr()}, backend);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> cauchy_backward(const Tensor& dout_in, const Tensor& v, const Tensor& z,
                                                   const Tensor& w, bool conjugate, bool wants_dz) {
  CauchyInputs in{"cauchy_backward", v, z, w, conjugate};
  const CauchyProblem problem = in.checked();
  const Tensor dout = gradient_given(in.op, dout_in, sizes_with(v, problem.nodes), w.scalar_type(), in.named("w", w));
  const Backend backend(w);
  const Tensor dv = gradient_of(v), dw = gradient_of(w);
  const Tensor dz = gradient_of(wants_dz ? OptionalTensor(z) : std::nullopt, w);
  run(CauchyBackward{.problem = problem,
                     .dout = dout.const_data_ptr(),
                     .dv = dv.mutable_data_ptr(),
                     .dz = wants_dz ? dz.mutable_data_ptr() : nullptr,
                     .dw = dw.mutable_data_ptr(),
                     .workspace = nullptr},
      w, backend);
  return {dv, dz, dw};
}

template <class Backend>
Tensor vandermonde(const Tensor& v, const Tensor& x, int64_t length, bool conjugate) {
  VandermondeInputs in{"vandermonde", "v", v, x};
  const VandermondeProblem problem = in.numerators_of(length, conjugate);
  const Backend backend(x);
  const Tensor out = empty(v, sizes_with(v, length), in.out_type(conjugate));
  vandermonde_forward({.problem = problem, .v = in.values.const_data_ptr(), .out = out.mutable_data_ptr()}, backend);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> vandermonde_backward(const Tensor& dout_in, const Tensor& v, const Tensor& x, int64_t length,
                                                bool conjugate) {
  VandermondeInputs in{"vandermonde_backward", "v", v, x};
  const VandermondeProblem problem = in.numerators_of(length, conjugate);
  const Tensor dout = gradient_given(in.op, dout_in, sizes_with(v, length), in.out_type(conjugate), in.named("x", x));
  const Backend backend(x);
  const Tensor dv = gradient_of(v), dx = gradient_of(x);
  run(VandermondeBackward{.problem = problem,
                          .v = in.values.const_data_ptr(),
                          .dout = dout.const_data_ptr(),
                          .dv = dv.mutable_data_ptr(),
                          .dx = dx.mutable_data_ptr(),
                          .workspace = nullptr},
      x, backend);
  return {dv, dx};
}

template <class Backend>
Tensor transpose(const Tensor& u, const Tensor& x) {
  VandermondeInputs in{"vandermonde_transpose", "u", u, x};
  const VandermondeProblem problem = in.rows();
  const Backend backend(x);
  const Tensor out = empty(u, sizes_with(u, problem.poles), x.scalar_type());
  run(
      VandermondeTranspose{
          .problem = problem, .u = in.values.const_data_ptr(), .out = out.mutable_data_ptr(), .workspace = nullptr},
      x, backend);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> transpose_backward(const Tensor& dout_in, const Tensor& u, const Tensor& x) {
  VandermondeInputs in{"vandermonde_transpose_backward", "u", u, x};
  const VandermondeProblem problem = in.rows();
  const Tensor dout = gradient_given(in.op, dout_in, sizes_with(u, problem.poles), x.scalar_type(), in.named("x", x));
  const Backend backend(x);
  const Tensor du = gradient_of(u), dx = gradient_of(x);
  run(VandermondeTransposeBackward{.problem = problem,
                                   .u = in.values.const_data_ptr(),
                                   .dout = dout.const_data_ptr(),
                                   .du = du.mutable_data_ptr(),
                                   .dx = dx.mutable_data_ptr(),
                                   .workspace = nullptr},
      x, backend);
  return {du, dx};
}

template <class Backend>
Tensor spectrum(const Tensor& w, const Tensor& B, const Tensor& C, const Tensor& dt, int64_t length,
                const OptionalTensor& P) {
  S4Inputs in{{"s4_spectrum", w, B, C, dt, P}};
  const S4Problem problem = in.checked(length);
  const Backend backend(w);
  const Tensor out = empty(w, in.spectrum_sizes(length), w.scalar_type());
  s4_spectrum({.problem = problem, .out = out.mutable_data_ptr()}, backend);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spectrum_backward(const Tensor& dout_in, const Tensor& w,
                                                                     const Tensor& B, const Tensor& C, const Tensor& dt,
                                                                     int64_t length, const OptionalTensor& P) {
  S4Inputs in{{"s4_spectrum_backward", w, B, C, dt, P}};
  const S4Problem problem = in.checked(length);
  const Tensor dout = gradient_given(in.op, dout_in, in.spectrum_sizes(length), w.scalar_type(), in.named("w", w));
  const Backend backend(w);
  const Tensor dw = gradient_of(w), dB = gradient_of(B), dC = gradient_of(C), ddt = gradient_of(dt);
  const Tensor dP = gradient_of(P, w);
  run(S4SpectrumBackward{.problem = problem,
                         .dout = dout.const_data_ptr(),
                         .dw = dw.mutable_data_ptr(),
                         .dP = data_of_gradient(dP, P),
                         .dB = dB.mutable_data_ptr(),
                         .dC = dC.mutable_data_ptr(),
                         .ddt = ddt.mutable_data_ptr(),
                         .workspace = nullptr},
      w, backend);
  return {dw, dB, dC, ddt, dP};
}

template <class Backend, class Library>
void add_all(Library& m) {
  m.impl("cauchy", TORCH_BOX(&cauchy<Backend>));
  m.impl("cauchy_backward", TORCH_BOX(&cauchy_backward<Backend>));
  m.impl("vandermonde", TORCH_BOX(&vandermonde<Backend>));
  m.impl("vandermonde_backward", TORCH_BOX(&vandermonde_backward<Backend>));
  m.impl("vandermonde_transpose", TORCH_BOX(&transpose<Backend>));
  m.impl("vandermonde_transpose_backward", TORCH_BOX(&transpose_backward<Backend>));
  m.impl("s4_spectrum", TORCH_BOX(&spectrum<Backend>));
  m.impl("s4_spectrum_backward", TORCH_BOX(&spectrum_backward<Backend>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) { add_all<Cpu>(m); }

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) { add_all<Cuda>(m); }

}  // namespace packseq
