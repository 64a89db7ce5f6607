#include "torch/checks.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string_view>

namespace packseq {

namespace {

std::string listed(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

}  // namespace

std::string shape_of(const Tensor& t) { return listed(t.sizes().data(), t.sizes().size()); }

std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "device type " + std::to_string(int(t.device().type()));
}

std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default: {
      std::string name = torch::headeronly::toString(type);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return name;
    }
  }
}

ScalarType scalar_type_of(Dtype t) {
  return t == Dtype::f16    ? ScalarType::Half
         : t == Dtype::bf16 ? ScalarType::BFloat16
         : t == Dtype::f32  ? ScalarType::Float
                            : ScalarType::Double;
}

Dtype dtype_of(const Argument& a) {
  for (const Dtype t : {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}) {
    if (a.tensor.scalar_type() == scalar_type_of(t)) return t;
  }
  fail(a, " must be float16, bfloat16, float32 or float64, got ", name_of(a.tensor.scalar_type()));
}

Dtype dtype_on_device(const Argument& a) {
  const Dtype dtype = dtype_of(a);
  check(dtype != Dtype::f64 || !a.tensor.is_cuda(), a, " must be float16, bfloat16 or float32 on a GPU, got float64");
  return dtype;
}

ScalarType parameter_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

ScalarType complex_of(ScalarType real) {
  return real == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

void check_dims(const Argument& a, int64_t dims, const char* layout) {
  if (a.tensor.dim() == dims) return;  // every call comes by here: no message is made before one is needed
  fail(a, " must be ", layout, ", got shape ", shape_of(a.tensor));
}

namespace {

void check_sizes(const Argument& a, const int64_t* shape, size_t count) {
  const auto sizes = a.tensor.sizes();
  if (std::equal(sizes.begin(), sizes.end(), shape, shape + count)) return;
  fail(a, " must have shape ", listed(shape, count), ", got ", shape_of(a.tensor));
}

}  // namespace

void check_shape(const Argument& a, std::initializer_list<int64_t> shape) {
  check_sizes(a, shape.begin(), shape.size());
}

void check_shape(const Argument& a, const std::vector<int64_t>& shape) { check_sizes(a, shape.data(), shape.size()); }

void check_dtype(const Argument& a, ScalarType expected) {
  const ScalarType got = a.tensor.scalar_type();
  if (got != expected) fail(a, " must be ", name_of(expected), ", got ", name_of(got));
}

void check_same_dtype(const Argument& a, const Argument& like) {
  const ScalarType got = a.tensor.scalar_type(), expected = like.tensor.scalar_type();
  if (got != expected) fail(a, " must be ", name_of(expected), " like ", like.name, ", got ", name_of(got));
}

void check_same_device(const Argument& a, const Argument& like) {
  if (a.tensor.device() == like.tensor.device()) return;
  fail(a, " must be on ", device_of(like.tensor), " like ", like.name, ", got ", device_of(a.tensor));
}

void check_boundaries(const Argument& a, const Argument& like) {
  check_dims(a, 1, "[sequences + 1]");
  check_dtype(a, ScalarType::Int);
  check_same_device(a, like);
  check(a.tensor.size(0) >= 1, a, " must have at least one element, got shape [0]");
  check(a.tensor.is_contiguous(), a, " must be contiguous, got stride ", a.tensor.stride(0));
}

bool validates(const Tensor& t) {
  if (t.is_cpu()) return true;
  const char* set = std::getenv("PACKSEQ_VALIDATE");
  return set && std::string_view(set) == "1";
}

Tensor on_host(const Tensor& t) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return t.is_cpu() ? t : torch::stable::to(t, cpu);
}

void check_boundary_values(const Argument& a, int64_t total) {
  if (!validates(a.tensor)) return;
  const Tensor host = on_host(a.tensor);
  const int32_t* at = static_cast<const int32_t*>(host.const_data_ptr());
  const int64_t last = host.size(0) - 1;
  check(at[0] == 0, a, " must start at 0, got ", at[0]);
  for (int64_t i = 1; i <= last; ++i) {
    check(at[i] >= at[i - 1], a, " must not decrease, got ", at[i - 1], " then ", at[i], " at position ", i);
  }
  check(at[last] <= total, a, " must end within the ", total, " rows there are, got ", at[last], " at position ", last);
}

void check_channels(const Argument& a, int64_t channels) {
  check(channels >= 1 && channels <= std::numeric_limits<int>::max(), a,
        " must have between 1 and 2^31 - 1 channels, got ", channels);
}

void check_rows_like(const Argument& a, const Argument& rows) {
  check_shape(a, {rows.tensor.size(0), rows.tensor.size(1)});
  check_same_dtype(a, rows);
  check_same_device(a, rows);
}

void check_pool(const Argument& a, int64_t dims, const char* layout) {
  check_dims(a, dims, layout);
  if (a.tensor.is_contiguous()) return;
  const auto strides = a.tensor.strides();
  fail(a, " must be contiguous, got strides ", listed(strides.data(), strides.size()));
}

void check_slots(const char* op, const OptionalTensor& indices, const Argument& pool, int64_t sequences) {
  const int64_t slots = pool.tensor.size(0);
  if (!indices) {
    check(sequences <= slots, pool, " must have a slot for each of the ", sequences,
          " sequences, or indices must be given, got ", slots, " slots");
    return;
  }
  const Argument a{op, "indices", *indices};
  check_shape(a, {sequences});
  check_dtype(a, ScalarType::Int);
  check_same_device(a, pool);
  if (!validates(*indices)) return;
  const Tensor host = on_host(torch::stable::contiguous(*indices));
  const int32_t* slot = static_cast<const int32_t*>(host.const_data_ptr());
  std::vector<bool> taken(slots);
  for (int64_t i = 0; i < sequences; ++i) {
    if (slot[i] < 0) continue;
    check(slot[i] < slots, a, " must be negative or one of the ", slots, " slots of ", pool.name, ", got ", slot[i],
          " at position ", i);
    check(!taken[slot[i]], a, " must give each sequence a slot of its own, got ", slot[i], " again at position ", i);
    taken[slot[i]] = true;
  }
}

const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

void make_contiguous(OptionalTensor& t) {
  if (t) *t = torch::stable::contiguous(*t);
}

Tensor readable(const Tensor& t, int64_t alignment) {
  const int64_t bytes = int64_t(t.element_size()), last = t.dim() - 1;
  const auto in_place = [&](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % uintptr_t(alignment) == 0;
  };
  bool steps_well = t.size(last) <= 1 || t.stride(last) == 1;
  for (int64_t dim = 0; dim < last; ++dim) {
    steps_well = steps_well && (t.size(dim) <= 1 || t.stride(dim) * bytes % alignment == 0);
  }
  if (steps_well && in_place(t)) return t;
  const Tensor copy = torch::stable::contiguous(t);
  return in_place(copy) ? copy : torch::stable::clone(copy);
}

int64_t alignment_of(const Tensor& like, int64_t width) {
  return like.is_cuda() ? std::gcd(int64_t(16), width * int64_t(like.element_size())) : 1;
}

Packed packed_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }

Tensor gradient_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return torch::stable::new_empty(t, {sizes.data(), sizes.size()});
}

Tensor gradient_of(const OptionalTensor& t, const Tensor& like) {
  return t ? gradient_of(*t) : torch::stable::new_empty(like, {0});
}

void* data_of_gradient(const Tensor& gradient, const OptionalTensor& of) {
  return of ? gradient.mutable_data_ptr() : nullptr;
}

}  // namespace packseq
