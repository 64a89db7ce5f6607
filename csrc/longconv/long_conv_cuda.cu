// The long convolution on the GPU, host side: what is launched, in which order, and where it keeps things.
//
// A call first lists the sequences class by class and transforms the filter once for every class in use; then one
// kernel convolves all sequences that are a single transform or a direct sum. Longer ones are cut into blocks, whose
// spectra go through device memory, a slab of channels after the other so that they never take much of it. Kernels
// whose sequences do not occur leave at once.
//
// The gradient of the input is the convolution of dout in reversed time, so it is the same kernel. With E elements of B
// bytes, the forward moves 2 E B bytes at the least, the backward 5 E B, and sequences in blocks add 32 E in the
// forward.
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

  static Device current() {
    int device = 0, processors = 0;
    check_cuda(cudaGetDevice(&device), "long conv");
    check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "long conv");
    const bool large = most_shared_memory("long conv") >= conv_shared_bytes(conv_threads(kLargeClass));
    return {processors, large ? kLargeClass : kSmallClass};
  }
};

enum class Direction { forward, backward };

// Spectra of sequences in blocks are kept for as many channels at a time as this holds, or for 32.
constexpr int64_t kSlabBytes = int64_t(512) << 20;

// The workspace, as pieces; with a null base only their sizes.
struct Scratch {
  Plan* plan;
  int32_t* list;
  LongBlock* blocks;
  float2* table;
  float4* spectra;
  float* lags;
  // Of the backward.
  float* direct_sums;
  float4* sums;
  float* skip_sums;
  // Of sequences in blocks, for `slab` channels.
  int64_t slab;
  float4 *filter_blocks, *input_blocks, *dout_blocks, *output_blocks, *block_sums;
  size_t bytes;

  Scratch(const Layout& l, Direction direction, bool has_skip, void* base) {
    Workspace w(base);
    const bool backward = direction == Direction::backward;
    plan = w.take<Plan>(1);
    list = w.take<int32_t>(l.sequences);
    blocks = w.take<LongBlock>(l.most_long_blocks());
    table = w.take<float2>(kTableSize);
    spectra = w.take<float4>(l.spectra() / 2 * l.channels);
    lags = w.take<float>(kDirectLags * l.channels);
    // Malformed boundaries can make all sequences short, however many rows there are.
    const int64_t chunks = std::min<int64_t>(kDirectChunks, l.sequences);
    direct_sums = w.take<float>(backward ? chunks * kLagGroups * kBlockLags * l.channels : 0);
    sums = w.take<float4>(backward ? divide_up(l.chunk_sums(), 2) * l.channels : 0);
    skip_sums = w.take<float>(backward && has_skip ? divide_up(l.total, kSkipRows) * l.channels : 0);

    const int64_t of_block = l.block() / 2, most = l.most_long_blocks();
    const int64_t filter = l.filter_blocks(), inputs = most * (backward ? 2 : 1), outputs = l.taps_after ? most : 0;
    const int64_t distances = backward && most ? filter + 1 : 0;
    const int64_t bytes_of_channel = (filter + inputs + outputs + distances) * of_block * int64_t(sizeof(float4));
    slab = bytes_of_channel == 0 ? l.channels : kSlabBytes / bytes_of_channel / 32 * 32;
    slab = std::min(l.channels, std::max<int64_t>(slab, 32));
    const auto take = [&](int64_t count) { return w.take<float4>(count * of_block * slab); };
    filter_blocks = take(filter), input_blocks = take(most), dout_blocks = take(backward ? most : 0);
    output_blocks = take(outputs), block_sums = take(distances);
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

  template <class T>
  void convolve_short(const ConvCall& call) const {
    convolve<T>(
        {.shape = shape, .call = call, .spectra = scratch.spectra, .lags = scratch.lags, .two_sided = two_sided()},
        device.processors, stream);
  }

  // f(first channel, channels) for each slab, where its part of the filter is transformed.
  template <class F>
  void for_slabs(const F& f) const {
    if (!has_long()) return;
    for (int64_t first = 0; first < p.channels; first += scratch.slab) {
      const int64_t channels = std::min(scratch.slab, p.channels - first);
      filter_block_spectra({.shape = shape,
                            .filter = filter(),
                            .channel0 = first,
                            .channels = channels,
                            .blocks_before = layout.blocks_before(),
                            .blocks = layout.filter_blocks(),
                            .spectra = scratch.filter_blocks},
                           stream);
      f(first, channels);
    }
  }

  BlockParams blocks(const ConvCall& call, int64_t first, int64_t channels, float4* spectra) const {
    return {.shape = shape, .call = call, .channel0 = first, .channels = channels, .spectra = spectra};
  }

  // From the spectra of a slab's input to rows of the output.
  template <class T>
  void finish_blocks(const ConvCall& call, int64_t first, int64_t channels, float4* input, bool correlate) const {
    float4* const output = two_sided() ? scratch.output_blocks : input;
    multiply_blocks({.shape = shape,
                     .channels = channels,
                     .blocks_before = layout.blocks_before(),
                     .blocks_after = layout.blocks_after(),
                     .filter = scratch.filter_blocks,
                     .input = input,
                     .output = output,
                     .correlate = correlate},
                    16 * device.processors, stream);
    inverse_blocks<T>(blocks(call, first, channels, output), device.processors, stream);
  }
};

void check_sizes(const LongConvProblem& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(p.taps >= 1, "long_conv: k must have at least 1 tap, got ", p.taps);
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
  call.for_slabs([&](int64_t first, int64_t channels) {
    transform_blocks<T>(call.blocks(conv, first, channels, call.scratch.input_blocks), call.device.processors, stream);
    call.finish_blocks<T>(conv, first, channels, call.scratch.input_blocks, false);
  });
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
                             .out = b.dgate,
                             .out_other = nullptr,
                             .reverse = p.reverse};
  call.prepare_filter();
  ConvCall reversed = to_du;
  reversed.reverse = !p.reverse;
  call.convolve_short<T>(reversed);
  if (p.gate.data) call.convolve_short<T>(to_dgate);
  gradient_sums<T>({.shape = call.shape,
                    .x = to_dgate,
                    .dy = to_du,
                    .two_sided = call.two_sided(),
                    .direct_sums = scratch.direct_sums,
                    .sums = scratch.sums},
                   call.device.processors, stream);
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
  call.for_slabs([&](int64_t first, int64_t channels) {
    transform_blocks<T>(call.blocks(to_dgate, first, channels, scratch.input_blocks), call.device.processors, stream);
    transform_blocks<T>(call.blocks(to_du, first, channels, scratch.dout_blocks), call.device.processors, stream);
    const int64_t before = call.layout.blocks_before(), blocks = call.layout.filter_blocks();
    sum_block_products({.shape = call.shape,
                        .channels = channels,
                        .blocks_before = before,
                        .distances = blocks + 1,
                        .input = scratch.input_blocks,
                        .dout = scratch.dout_blocks,
                        .sums = scratch.block_sums},
                       16 * call.device.processors, stream);
    filter_block_gradient({.shape = call.shape,
                           .taps = p.taps,
                           .taps_after = call.layout.taps_after,
                           .channel0 = first,
                           .channels = channels,
                           .blocks_before = before,
                           .blocks = blocks,
                           .sums = scratch.block_sums,
                           .dk = static_cast<float*>(b.dk),
                           .dk_after = static_cast<float*>(b.dk_after)},
                          stream);
    call.finish_blocks<T>(to_du, first, channels, scratch.dout_blocks, true);
    if (p.gate.data) call.finish_blocks<T>(to_dgate, first, channels, scratch.input_blocks, false);
  });
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
