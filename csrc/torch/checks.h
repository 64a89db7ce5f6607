// From torch's tensors to the core's words: checks that name the argument, and the few conversions.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"
#include "core/packed.h"

namespace packseq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An operator's argument, which prints as "attention: q".
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;
};

inline std::string text_of(const Argument& a) { return std::string(a.op) + ": " + a.name; }

std::string shape_of(const Tensor&);   // "[3, 4, 64]"
std::string device_of(const Tensor&);  // "cuda:0"
std::string name_of(ScalarType);       // "float32"

ScalarType scalar_type_of(Dtype);
// The element type, which must be one of the floating types that the core knows.
Dtype dtype_of(const Argument&);

// The same, where a GPU takes all but float64.
Dtype dtype_on_device(const Argument&);
// Of parameters, states and statistics beside a tensor: float64 where it is float64, else float32.
ScalarType parameter_type(const Tensor&);
// The complex type whose parts are float32 or float64.
ScalarType complex_of(ScalarType real);

// `layout` names the dimensions: "[total, heads, dim]".
void check_dims(const Argument&, int64_t dims, const char* layout);
void check_shape(const Argument&, std::initializer_list<int64_t> shape);
void check_shape(const Argument&, const std::vector<int64_t>& shape);
void check_dtype(const Argument&, ScalarType expected);
void check_same_dtype(const Argument&, const Argument& like);
void check_same_device(const Argument&, const Argument& like);

// Whether the contents of index tensors are to be checked: on the CPU, where that costs nothing, and with
// PACKSEQ_VALIDATE=1 in the environment everywhere, which copies them to the host.
bool validates(const Tensor&);
Tensor on_host(const Tensor&);

// A vector of boundaries: int32, one dimension, at least one element, contiguous, beside `like`.
void check_boundaries(const Argument&, const Argument& like);
// What is in it, where validates() says so: starts at 0, never decreases, ends within `total`.
void check_boundary_values(const Argument&, int64_t total);

// Rows [total, channels]: how many channels there may be, and that other rows are like them.
void check_channels(const Argument&, int64_t channels);
void check_rows_like(const Argument& a, const Argument& rows);

// A pool of states is updated in place, so it cannot be copied: it must be contiguous.
void check_pool(const Argument&, int64_t dims, const char* layout);
// Which slot of the pool each sequence has: int32 [sequences], or none, where sequence i has slot i. What is in it,
// where validates() says so: negative, or one of the slots that no other sequence has.
void check_slots(const char* op, const OptionalTensor& indices, const Argument& pool, int64_t sequences);

// Data of an optional tensor, nullptr where there is none; and the tensor made contiguous in place.
const void* data_of(const OptionalTensor&);
void make_contiguous(OptionalTensor&);

// t if a kernel can read its rows, [total, width] or [total, heads, dim], in place: the last dimension contiguous, rows
// at multiples of `alignment` bytes. Else a contiguous copy.
Tensor readable(const Tensor& t, int64_t alignment = 1);
// What contiguous rows of `width` elements lie at multiples of, where kernels choose by it: bits must not depend on
// where a tensor lies.
int64_t alignment_of(const Tensor& like, int64_t width);
Packed packed_of(const Tensor&);
Rows rows_of(const Tensor&);

// A contiguous gradient of `t`, without elements where `t` is absent.
Tensor gradient_of(const Tensor& t);
Tensor gradient_of(const OptionalTensor& t, const Tensor& like);
// Its data where it is a gradient of something.
void* data_of_gradient(const Tensor& gradient, const OptionalTensor& of);

}  // namespace packseq
