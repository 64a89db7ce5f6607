// Packing: checks, allocation, and the way down to csrc/packing/.
#include "packing/packing.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "torch/backend.h"
#include "torch/checks.h"

namespace packseq {
namespace {

constexpr int64_t kRowsMost = std::numeric_limits<int32_t>::max();  // boundaries are int32

// Bytes of one row, where a row has the dimensions from `first` on.
int64_t row_bytes(const Tensor& t, int64_t first) {
  int64_t bytes = int64_t(t.element_size());
  for (int64_t d = first; d < t.dim(); ++d) bytes *= t.size(d);
  return bytes;
}

// A tensor like `t` whose dimensions before `first` are replaced.
Tensor with_rows(const Tensor& t, int64_t first, std::vector<int64_t> sizes) {
  for (int64_t d = first; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return torch::stable::new_empty(t, {sizes.data(), sizes.size()});
}

PaddedShape check_padded(const Argument& a) {
  check(a.tensor.dim() >= 2, a, " must be [batch, length, ...], got shape ", shape_of(a.tensor));
  return {a.tensor.size(0), a.tensor.size(1)};
}

// ---- pack

void check_mask(const Argument& mask, const Argument& padded) {
  const ScalarType type = mask.tensor.scalar_type();
  const bool integer = type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Char ||
                       type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long;
  check(integer, mask, " must be bool or an integer type, got ", name_of(type));
  check_shape(mask, {padded.tensor.size(0), padded.tensor.size(1)});
  check_same_device(mask, padded);
}

void check_lengths(const Argument& lengths, const Argument& padded) {
  const ScalarType type = lengths.tensor.scalar_type();
  check(type == ScalarType::Int || type == ScalarType::Long, lengths, " must be int32 or int64, got ", name_of(type));
  check_shape(lengths, {padded.tensor.size(0)});
  check_same_device(lengths, padded);
}

TokenRows token_rows(const OptionalTensor& mask, const OptionalTensor& lengths) {
  return {.mask = mask ? mask->const_data_ptr() : nullptr,
          .lengths = lengths ? lengths->const_data_ptr() : nullptr,
          .mask_bytes = mask ? int(mask->element_size()) : 0,
          .length_bytes = lengths ? int(lengths->element_size()) : 0};
}

int64_t check_capacity(const PaddedShape& shape, std::optional<int64_t> capacity) {
  const char* const given = capacity ? "" : " (batch * length, as none is given)";
  const int64_t rows = capacity.value_or(shape.rows());
  check(rows >= 0 && rows <= kRowsMost, "pack: capacity must be between 0 and 2^31 - 1, got ", rows, given);
  return rows;
}

void run(const Pack& call, const Tensor&, const Cpu& on) { pack(call, on); }
#if PACKSEQ_HAS_CUDA
void run(const Pack& call, const Tensor& like, const Cuda& on) {
  run_in_workspace(call, pack_workspace(call), like, on, pack);
}
#endif

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> pack(const Tensor& padded_in, const OptionalTensor& mask_in,
                                        const OptionalTensor& lengths_in, std::optional<int64_t> capacity_in) {
  const Argument padded_argument{"pack", "padded", padded_in};
  const PaddedShape shape = check_padded(padded_argument);
  check(mask_in.has_value() != lengths_in.has_value(), "pack: one of mask and lengths must be given, got ",
        mask_in ? "both" : "none");
  if (mask_in) check_mask({"pack", "mask", *mask_in}, padded_argument);
  if (lengths_in) check_lengths({"pack", "lengths", *lengths_in}, padded_argument);
  const int64_t capacity = check_capacity(shape, capacity_in);

  const Backend backend(padded_in);
  const auto contiguous = [](const OptionalTensor& t) { return t ? torch::stable::contiguous(*t) : t; };
  const Tensor padded = torch::stable::contiguous(padded_in);
  const OptionalTensor mask = contiguous(mask_in), lengths = contiguous(lengths_in);
  if (!padded.is_cpu() && validates(padded)) {  // on the CPU pack itself checks
    const auto host = [](const OptionalTensor& t) { return t ? on_host(*t) : t; };
    const OptionalTensor host_mask = host(mask), host_lengths = host(lengths);
    check_tokens(shape, token_rows(host_mask, host_lengths), capacity, Executor::serial());
  }
  const Tensor tokens = with_rows(padded, 2, {capacity});
  const Tensor cu_seqlens = torch::stable::new_empty(padded, {shape.batch + 1}, ScalarType::Int);
  const Tensor indices = torch::stable::new_empty(padded, {capacity}, ScalarType::Long);
  run(Pack{.shape = shape,
           .row_bytes = row_bytes(padded, 2),
           .capacity = capacity,
           .keep = token_rows(mask, lengths),
           .padded = padded.const_data_ptr(),
           .tokens = tokens.mutable_data_ptr(),
           .cu_seqlens = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr()),
           .indices = static_cast<int64_t*>(indices.mutable_data_ptr()),
           .workspace = nullptr},
      padded, backend);
  return {tokens, cu_seqlens, indices};
}

// ---- unpack

void check_indices(const Argument& a, const PaddedShape& shape) {
  if (!validates(a.tensor)) return;
  const Tensor host = on_host(a.tensor);
  const int64_t* at = static_cast<const int64_t*>(host.const_data_ptr());
  int64_t previous = -1;
  for (int64_t t = 0; t < host.size(0); ++t) {
    const bool slack = at[t] == -1, after_slack = t > 0 && at[t - 1] == -1;
    check(slack || (at[t] > previous && !after_slack && at[t] < shape.rows()), a, " must increase within the ",
          shape.rows(), " rows of the padded batch, and then be -1, got ", at[t], " at position ", t);
    previous = at[t];
  }
}

void check_sequences(const Argument& a, const PaddedShape& shape, int64_t capacity) {
  check_boundary_values(a, capacity);
  if (!validates(a.tensor)) return;
  const Tensor host = on_host(a.tensor);
  const int32_t* at = static_cast<const int32_t*>(host.const_data_ptr());
  for (int64_t b = 0; b < shape.batch; ++b) {
    check(at[b + 1] - at[b] <= shape.length, a, " must hold sequences of at most the padded length ", shape.length,
          ", got ", at[b + 1] - at[b], " for sequence ", b);
  }
}

// `like` is what stands beside the places: tokens, or the gradient of the padded batch.
TokenPlaces check_places(const Argument& a, const Argument& like, const PaddedShape& shape, int64_t capacity) {
  const ScalarType type = a.tensor.scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, a, " must be indices (int64) or cu_seqlens (int32), got ",
        name_of(type));
  check_same_device(a, like);
  if (type == ScalarType::Long) {
    check_shape(a, {capacity});
    check_indices(a, shape);
    return {.indices = static_cast<const int64_t*>(a.tensor.const_data_ptr()), .cu_seqlens = nullptr};
  }
  check_shape(a, {shape.batch + 1});
  check_sequences(a, shape, capacity);
  return {.indices = nullptr, .cu_seqlens = static_cast<const int32_t*>(a.tensor.const_data_ptr())};
}

void check_fill(const Argument& fill, const Argument& tokens) {
  check_same_dtype(fill, tokens);
  check_same_device(fill, tokens);
  check_shape(fill, {16 / int64_t(fill.tensor.element_size())});
}

template <class Backend>
Tensor unpack(const Tensor& tokens_in, const Tensor& places_in, int64_t batch, int64_t length,
              const OptionalTensor& fill_in) {
  const Argument tokens_argument{"unpack", "tokens", tokens_in};
  check(tokens_in.dim() >= 1, tokens_argument, " must be [capacity, ...], got shape []");
  check(batch >= 0 && length >= 0, "unpack: batch and length must be at least 0, got ", batch, " and ", length);
  const PaddedShape shape{batch, length};
  const Tensor places = torch::stable::contiguous(places_in);
  const Argument places_argument{"unpack", "places", places};
  const TokenPlaces found = check_places(places_argument, tokens_argument, shape, tokens_in.size(0));
  OptionalTensor fill = fill_in;
  if (fill) {
    check_fill({"unpack", "fill", *fill}, tokens_argument);
    fill = torch::stable::contiguous(*fill);
    if (reinterpret_cast<uintptr_t>(fill->const_data_ptr()) % 16 != 0) fill = torch::stable::clone(*fill);
  }

  const Backend backend(tokens_in);
  const Tensor tokens = torch::stable::contiguous(tokens_in);
  const Tensor padded = with_rows(tokens, 1, {batch, length});
  unpack(Unpack{.shape = shape,
                .row_bytes = row_bytes(tokens, 1),
                .capacity = tokens.size(0),
                .places = found,
                .tokens = tokens.const_data_ptr(),
                .padded = padded.mutable_data_ptr(),
                .fill = fill ? fill->const_data_ptr() : nullptr},
         backend);
  return padded;
}

template <class Backend>
Tensor unpack_backward(const Tensor& dpadded_in, const Tensor& places_in, int64_t capacity) {
  const Argument dpadded_argument{"unpack_backward", "dpadded", dpadded_in};
  const PaddedShape shape = check_padded(dpadded_argument);
  check(capacity >= 0, "unpack_backward: capacity must be at least 0, got ", capacity);
  const Tensor places = torch::stable::contiguous(places_in);
  const Argument places_argument{"unpack_backward", "places", places};
  const TokenPlaces found = check_places(places_argument, dpadded_argument, shape, capacity);

  const Backend backend(dpadded_in);
  const Tensor dpadded = torch::stable::contiguous(dpadded_in);
  const Tensor dtokens = with_rows(dpadded, 2, {capacity});
  unpack_backward(UnpackBackward{.shape = shape,
                                 .row_bytes = row_bytes(dpadded, 2),
                                 .capacity = capacity,
                                 .places = found,
                                 .padded = dpadded.const_data_ptr(),
                                 .tokens = dtokens.mutable_data_ptr()},
                  backend);
  return dtokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packseq, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack<Cpu>));
  m.impl("unpack", TORCH_BOX(&unpack<Cpu>));
  m.impl("unpack_backward", TORCH_BOX(&unpack_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(packseq, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack<Cuda>));
  m.impl("unpack", TORCH_BOX(&unpack<Cuda>));
  m.impl("unpack_backward", TORCH_BOX(&unpack_backward<Cuda>));
}

}  // namespace packseq
