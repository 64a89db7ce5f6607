// Products of spectra of sequences in blocks: a short convolution over the blocks, for every frequency by itself.
//
// With U the blocks of the input and F those of the filter, the output's are
//   Y[o] = sum over i of U[i] W[o - i],  W[d] = F[d] + (-1)^k F[d - 1]
// where the second term is what a product of two blocks adds to the next block. Correlation with the filter, for the
// input's gradient, takes conj(W[i - o]). A thread has one pair of frequencies of one channel, makes eight outputs at a
// time and reads every input once for them.
#include "core/launch.h"
#include "longconv/long_conv_launch.h"
#include "longconv/long_conv_tiles.cuh"

namespace packseq::longconv {
namespace {

constexpr int kThreads = 128;
constexpr int kOutputs = 8;  // at a time

// Two frequencies; the first may be two real numbers.
struct Pair {
  float2 a, b;

  __device__ static Pair load(const float4* p) {
    const float4 x = *p;
    return {{x.x, x.y}, {x.z, x.w}};
  }
  __device__ void store(float4* p) const { *p = {a.x, a.y, b.x, b.y}; }
};

// c + x y
__device__ Pair multiply_add(Pair x, Pair y, Pair c, bool two_reals) {
  const float2 real = {fmaf(x.a.x, y.a.x, c.a.x), fmaf(x.a.y, y.a.y, c.a.y)};
  return {two_reals ? real : fft::multiply_add(x.a, y.a, c.a), fft::multiply_add(x.b, y.b, c.b)};
}

__device__ Pair conjugate(Pair x, bool two_reals) {
  return {two_reals ? x.a : fft::conjugate(x.a), fft::conjugate(x.b)};
}

// A thread's element of one block's spectrum.
struct Element {
  int64_t size, place;  // elements of a spectrum
  bool two_reals;
  float sign;  // (-1)^k

  __device__ static Element of(int64_t place, int64_t channels, int lines) {
    const int64_t line = place / channels % lines;
    return {lines * (kPoints / 2) * channels, place, place < channels, line % 2 ? -1.f : 1.f};
  }
};

struct Weights {
  const BlockProductParams& p;
  const Element& e;

  __device__ Pair filter(int64_t d) const {
    if (d < -p.blocks_before || d >= p.blocks_after) return {};
    return Pair::load(p.filter + (d + p.blocks_before) * e.size + e.place);
  }
  __device__ Pair operator()(int64_t d) const {
    if (p.correlate) d = -d;
    const Pair own = filter(d), before = filter(d - 1);
    const Pair sum = {own.a + e.sign * before.a, own.b + e.sign * before.b};
    return p.correlate ? conjugate(sum, e.two_reals) : sum;
  }
};

// f(first place in the list, blocks, element) for each sequence and element that is this thread's turn.
template <class F>
__device__ void for_sequences(const Shape& shape, int64_t channels, const F& f) {
  const int lines = size_of_class(shape.fft_classes) / kPoints;
  const int64_t size = int64_t(lines) * (kPoints / 2) * channels, parts = divide_up(size, kThreads);
  const int64_t blocks = shape.plan->long_blocks;
  for (int64_t item = blockIdx.x; item < blocks * parts; item += gridDim.x) {
    const int64_t first = item / parts, place = item % parts * kThreads + threadIdx.x;
    const LongBlock block = shape.blocks[first];
    if (block.index != 0 || place >= size) continue;
    f(first, min(int64_t(block.count), blocks - first), Element::of(place, channels, lines));
  }
}

// Outputs first ... first + kOutputs of one sequence of `count` blocks.
__device__ void multiply_group(const BlockProductParams& p, const Element& e, int64_t block0, int64_t count,
                               int64_t first) {
  const Weights weights = {p, e};
  const int64_t back = p.correlate ? p.blocks_before : p.blocks_after;  // distances with a weight: -ahead ... back
  const int64_t ahead = p.correlate ? p.blocks_after : p.blocks_before;
  const int64_t begin = max(int64_t(0), first - back), end = min(count, first + kOutputs + ahead);
  Pair sums[kOutputs] = {}, weight[kOutputs];
#pragma unroll
  for (int q = 0; q < kOutputs; ++q) weight[q] = weights(first + q - begin);
  for (int64_t i = begin; i < end; ++i) {
    const Pair x = Pair::load(p.input + (block0 + i) * e.size + e.place);
#pragma unroll
    for (int q = 0; q < kOutputs; ++q) sums[q] = multiply_add(x, weight[q], sums[q], e.two_reals);
#pragma unroll
    for (int q = kOutputs - 1; q > 0; --q) weight[q] = weight[q - 1];
    weight[0] = weights(first - i - 1);
  }
#pragma unroll
  for (int q = 0; q < kOutputs; ++q) {
    if (first + q < count) sums[q].store(p.output + (block0 + first + q) * e.size + e.place);
  }
}

// In an order in which outputs may take the inputs' places where the filter has one side.
__global__ void __launch_bounds__(kThreads) multiply_kernel(const __grid_constant__ BlockProductParams p) {
  for_sequences(p.shape, p.channels, [&](int64_t block0, int64_t count, const Element& e) {
    const int64_t groups = divide_up(count, kOutputs);
    for (int64_t g = 0; g < groups; ++g) {
      multiply_group(p, e, block0, count, (p.correlate ? g : groups - 1 - g) * kOutputs);
    }
  });
}

// Sums of conj(X[i]) dY[i + d] over all sequences' blocks, for eight distances d at a time.
__global__ void __launch_bounds__(kThreads) sum_products_kernel(const __grid_constant__ BlockSumsParams p) {
  const Shape& shape = p.shape;
  const int lines = size_of_class(shape.fft_classes) / kPoints;
  const int64_t size = int64_t(lines) * (kPoints / 2) * p.channels, parts = divide_up(size, kThreads);
  const int64_t blocks = shape.plan->long_blocks;
  if (blocks == 0) return;
  for (int64_t item = blockIdx.x; item < divide_up(p.distances, kOutputs) * parts; item += gridDim.x) {
    const int64_t index = item / parts * kOutputs, place = item % parts * kThreads + threadIdx.x;
    if (place >= size) continue;
    const Element e = Element::of(place, p.channels, lines);
    const int64_t distance = index - p.blocks_before;
    Pair sums[kOutputs] = {};
    for (int64_t block0 = 0; block0 < blocks;) {
      const int64_t count = min(int64_t(shape.blocks[block0].count), blocks - block0);
      const auto dy = [&](int64_t i) {
        if (i < 0 || i >= count) return Pair{};
        return Pair::load(p.dout + (block0 + i) * e.size + e.place);
      };
      const int64_t begin = max(int64_t(0), -distance - kOutputs + 1), end = min(count, count - distance);
      Pair window[kOutputs];
#pragma unroll
      for (int q = 0; q < kOutputs; ++q) window[q] = begin < end ? dy(begin + distance + q) : Pair{};
      for (int64_t i = begin; i < end; ++i) {
        const Pair x = conjugate(Pair::load(p.input + (block0 + i) * e.size + e.place), e.two_reals);
#pragma unroll
        for (int q = 0; q < kOutputs; ++q) sums[q] = multiply_add(x, window[q], sums[q], e.two_reals);
#pragma unroll
        for (int q = 0; q + 1 < kOutputs; ++q) window[q] = window[q + 1];
        window[kOutputs - 1] = dy(i + 1 + distance + kOutputs - 1);
      }
      block0 += count;
    }
#pragma unroll
    for (int q = 0; q < kOutputs; ++q) {
      if (index + q < p.distances) sums[q].store(p.sums + (index + q) * e.size + e.place);
    }
  }
}

}  // namespace

void multiply_blocks(const BlockProductParams& p, int blocks, cudaStream_t stream) {
  launch("long conv: products", multiply_kernel, blocks, kThreads, 0, stream, p);
}

void sum_block_products(const BlockSumsParams& p, int blocks, cudaStream_t stream) {
  launch("long conv: products", sum_products_kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace packseq::longconv
