// The long convolution on the GPU, host side: what is launched, in which order, and where it keeps things.
//
// A call first lists the sequences class by class and transforms the filter once for every class in use; then one
// kernel convolves all sequences that are a single transform or a direct sum. Longer ones are cut into blocks, whose
// spectra go through device memory, a slab of channels after the other so that they never take much of it, in one
// kernel that leaves at once where there are none.
//
// The gradient of the input is the convolution of dout in reversed time, and so the same kernel's for direct sums and
// the largest transforms; others share one with the filter's gradient. With E elements of B bytes, the forward moves 2
// E B bytes at the least, the backward 5 E B, and sequences in blocks add 32 E in the forward.
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "core/check.h"
#include "core/device/element_type.cuh"
#include "core/launch.h"
#include "core/shared_memory.h"
#include "longconv/long_conv_launch.h"
#include "longconv/long_conv_prepare.h"
#include "longconv/long_conv_tiles.cuh"

namespace packseq {
namespace {

using namespace longconv;

struct Device {
  int processors, fft_classes;
  size_t shared;  // bytes that a block can have
  bool can_stage;

  static Device current() {
    int device = 0, processors = 0;
    check_cuda(cudaGetDevice(&device), "long conv");
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "long conv");
    const size_t shared = most_shared_memory("long conv");
    const int fft_classes = shared >= conv_shared_bytes(conv_threads(kLargeClass)) ? kLargeClass : kSmallClass;
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "long conv");
    return {processors, fft_classes, shared, major >= 9};
  }
};

enum class Direction { forward, backward };

// Spectra of sequences in blocks are kept for as many channels at a time as this holds, or for 32.
constexpr int64_t kPoolBytes = int64_t(512) << 20;

// The workspace, as pieces; with a null base only their sizes.
struct Scratch {
  Plan* plan;
  ListedRows* list;
  LongBlock* blocks;
  float2* table;
  float4* spectra;
  float* lags;
  // Of the backward.
  float* direct_sums;
  float4* sums;
  float* skip_sums;
  // Of sequences in blocks.
  float4* pool;
  int64_t pool_elements;
  size_t bytes;

  Scratch(const Layout& l, Direction direction, bool has_skip, void* base) {
    Workspace w(base);
    const bool backward = direction == Direction::backward;
    plan = w.take<Plan>(1);
    list = w.take<ListedRows>(l.sequences);
    blocks = w.take<LongBlock>(l.most_long_blocks());
    table = w.take<float2>(kTableSize);
    spectra = w.take<float4>(l.spectra() / 2 * l.channels);
    lags = w.take<float>(kDirectLags * l.channels);
    // Malformed boundaries can make all sequences short, however many rows there are.
    const int64_t chunks = std::min<int64_t>(kDirectChunks, l.sequences);
    direct_sums = w.take<float>(backward ? chunks * kLagGroups * kBlockLags * l.channels : 0);
    sums = w.take<float4>(backward ? divide_up(l.chunk_sums(), 2) * l.channels : 0);
    skip_sums = w.take<float>(backward && has_skip ? divide_up(l.total, kSkipRows) * l.channels : 0);

    const int64_t most = l.most_long_blocks(), filter = l.filter_blocks();
    const int64_t spectra = most * (1 + backward + (l.taps_after > 0)) + filter + (backward ? filter + 1 : 0);
    const int64_t of_channel = spectra * l.block() / 2, all = divide_up(l.channels, 8) * 8;
    const int64_t room = of_channel == 0 ? 0 : kPoolBytes / int64_t(sizeof(float4)) / of_channel;
    pool_elements = most == 0 ? 0 : of_channel * std::min(all, std::max<int64_t>(room, 32));
    pool = w.take<float4>(pool_elements);
    bytes = w.used();
  }
};

// One call: its sizes, its workspace and its stream.
struct Call {
  const LongConvProblem& p;
  Device device;
  Layout layout;
  Scratch scratch;
  Shape shape;
  cudaStream_t stream;

  Call(const LongConvProblem& p_, Direction direction, void* workspace, cudaStream_t stream_)
      : p(p_),
        device(Device::current()),
        layout(p, device.fft_classes),
        scratch(layout, direction, p.D != nullptr, workspace),
        shape({.cu_seqlens = p.cu_seqlens,
               .total = p.total,
               .sequences = p.sequences,
               .channels = p.channels,
               .fft_classes = device.fft_classes,
               .plan = scratch.plan,
               .list = scratch.list,
               .blocks = scratch.blocks,
               .table = scratch.table}),
        stream(stream_) {}

  bool has_long() const { return layout.most_long_blocks() > 0; }
  bool two_sided() const { return layout.taps_after > 0; }
  Filter filter() const {
    return {static_cast<const float*>(p.k), static_cast<const float*>(p.k_after), p.taps, layout.taps_after};
  }

  void prepare_filter() const {
    prepare({.shape = shape, .most_long_blocks = layout.most_long_blocks(), .chunk_sums = layout.chunk_sums()}, stream);
    filter_spectra({.shape = shape, .filter = filter(), .spectra = scratch.spectra, .lags = scratch.lags},
                   conv_threads(device.fft_classes), stream);
  }

  // Whether rows of all these tensors, the results' among them, can be copied 16 bytes at a time.
  template <class T>
  bool staged(std::initializer_list<Rows> all) const {
    const auto lies_so = [&](const Rows& x) {
      return x.token * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    };
    return device.can_stage && device.shared >= staged_bytes<T>(device.fft_classes) &&
           p.channels * sizeof(T) % 16 == 0 && std::all_of(all.begin(), all.end(), lies_so);
  }
  Rows result(const void* data) const { return {data, p.channels}; }

  template <class T>
  void convolve_short(const ConvCall& call, int first_class = 1) const {
    convolve<T>({.shape = shape,
                 .call = call,
                 .spectra = scratch.spectra,
                 .lags = scratch.lags,
                 .two_sided = two_sided(),
                 .first_class = first_class},
                staged<T>({call.input, result(call.out)}), device.processors, stream);
  }

  // Forward (x's input to x's output), or backward with dy, and dk and dk_after to be added to.
  template <class T>
  void convolve_long(const ConvCall& x, const ConvCall* dy, float* dk, float* dk_after,
                     std::initializer_list<Rows> all) const {
    if (!has_long()) return;
    convolve_blocks<T>({.shape = shape,
                        .filter = filter(),
                        .x = x,
                        .dy = dy ? *dy : ConvCall{},
                        .blocks_before = int32_t(layout.blocks_before()),
                        .blocks_after = int32_t(layout.blocks_after()),
                        .backward = dy != nullptr,
                        .pool = scratch.pool,
                        .pool_elements = scratch.pool_elements,
                        .dk = dk,
                        .dk_after = dk_after},
                       staged<T>(all), device.processors, stream);
  }
};

// Kernels count from row to row in 32 bits.
void check_stride(const char* name, const Rows& rows) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(-kMost <= rows.token && rows.token <= kMost, "long_conv: rows of ", name,
        " must lie fewer than 2^31 elements apart, got ", rows.token);
}

void check_sizes(const LongConvProblem& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(p.taps >= 1, "long_conv: k must have at least 1 tap, got ", p.taps);
  check_stride("u", p.u), check_stride("pre_gate", p.pre_gate), check_stride("gate", p.gate);
  check(p.sequences < kMost && p.channels < (1 << 24),
        "long_conv: needs fewer than 2^31 sequences and 2^24 channels, got ", p.sequences, " and ", p.channels);
  check(std::min(p.total, p.sequences) * divide_up(p.channels, 32) <= kMost, "long_conv: ", p.sequences,
        " sequences of ", p.channels, " channels are more than 2^31 pieces of work");
}

bool empty(const LongConvProblem& p) { return p.total == 0 || p.channels == 0; }

template <class T>
void forward(const LongConvForward& f, cudaStream_t stream) {
  const LongConvProblem& p = f.problem;
  const Call call(p, Direction::forward, f.workspace, stream);
  const ConvCall conv = {.input = p.u,
                         .pre_gate = p.pre_gate,
                         .gate = p.gate,
                         .other = {},
                         .D = static_cast<const float*>(p.D),
                         .out = f.out,
                         .out_other = nullptr,
                         .reverse = p.reverse};
  call.prepare_filter();
  call.convolve_short<T>(conv);
  call.convolve_long<T>(conv, nullptr, nullptr, nullptr, {p.u, call.result(f.out)});
}

// With dy = gate dout and dx the gradient of x: du = pre_gate dx, dpre_gate = u dx, dgate = dout y.
template <class T>
void backward(const LongConvBackward& b, cudaStream_t stream) {
  const LongConvProblem& p = b.problem;
  const Call call(p, Direction::backward, b.workspace, stream);
  const Scratch& scratch = call.scratch;
  const ConvCall to_du = {.input = b.dout,
                          .pre_gate = p.gate,
                          .gate = p.pre_gate,
                          .other = p.u,
                          .D = static_cast<const float*>(p.D),
                          .out = b.du,
                          .out_other = p.pre_gate.data ? b.dpre_gate : nullptr,
                          .reverse = p.reverse};
  const ConvCall to_dgate = {.input = p.u,
                             .pre_gate = p.pre_gate,
                             .gate = b.dout,
                             .other = {},
                             .D = static_cast<const float*>(p.D),
                             .out = p.gate.data ? b.dgate : nullptr,
                             .out_other = nullptr,
                             .reverse = p.reverse};
  call.prepare_filter();
  ConvCall reversed = to_du;
  reversed.reverse = !p.reverse;
  call.convolve_short<T>(reversed, kFusedClasses + 1);
  if (p.gate.data) call.convolve_short<T>(to_dgate);
  gradients<T>({.shape = call.shape,
                .x = to_dgate,
                .dy = to_du,
                .spectra = scratch.spectra,
                .two_sided = call.two_sided(),
                .direct_sums = scratch.direct_sums,
                .sums = scratch.sums},
               call.staged<T>({p.u, b.dout, call.result(b.du)}), call.device.processors, stream);
  if (p.D) {
    skip_sums<T>({.shape = call.shape,
                  .input = p.u,
                  .pre_gate = p.pre_gate,
                  .dout = b.dout,
                  .gate = p.gate,
                  .sums = scratch.skip_sums},
                 stream);
  }
  filter_gradient({.shape = call.shape,
                   .taps = p.taps,
                   .taps_after = call.layout.taps_after,
                   .direct_sums = scratch.direct_sums,
                   .sums = scratch.sums,
                   .skip_sums = scratch.skip_sums,
                   .skip_parts = divide_up(p.total, kSkipRows),
                   .dk = static_cast<float*>(b.dk),
                   .dk_after = static_cast<float*>(b.dk_after),
                   .dD = p.D ? static_cast<float*>(b.dD) : nullptr},
                  conv_threads(call.device.fft_classes), stream);
  call.convolve_long<T>(to_dgate, &to_du, static_cast<float*>(b.dk), static_cast<float*>(b.dk_after),
                        {p.u, b.dout, call.result(b.du), call.result(b.dgate)});
}

size_t workspace(const LongConvProblem& p, Direction direction) {
  return Scratch(Layout(p, Device::current().fft_classes), direction, p.D != nullptr, nullptr).bytes;
}

}  // namespace

size_t long_conv_forward_workspace(const LongConvProblem& p) { return workspace(p, Direction::forward); }
size_t long_conv_backward_workspace(const LongConvProblem& p) { return workspace(p, Direction::backward); }

void long_conv_forward(const LongConvForward& f, cudaStream_t stream) {
  check_sizes(f.problem);
  if (empty(f.problem)) return;
  with_element_type(f.problem.dtype, [&]<class T>(std::type_identity<T>) { forward<T>(f, stream); });
}

// Without rows the filter's gradient is zero, and not left out.
void long_conv_backward(const LongConvBackward& b, cudaStream_t stream) {
  const LongConvProblem& p = b.problem;
  check_sizes(p);
  check_stride("dout", b.dout);
  if (!empty(p)) {
    with_element_type(p.dtype, [&]<class T>(std::type_identity<T>) { backward<T>(b, stream); });
    return;
  }
  const auto clear = [&](void* to, int64_t count) {
    if (to && count > 0) check_cuda(cudaMemsetAsync(to, 0, size_t(count) * sizeof(float), stream), "long conv");
  };
  clear(b.dk, p.channels * p.taps), clear(b.dk_after, p.k_after ? p.channels * p.taps_after : 0);
  clear(b.dD, p.D ? p.channels : 0);
}

}  // namespace packseq
