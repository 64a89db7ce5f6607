// Lists the sequences class by class and the blocks of the long ones, in their own order; and the table of roots.
//
// One block of threads makes the lists. Each thread owns a run of sequences and reads it twice: it counts its sequences
// of every class, finds by a prefix sum over the threads where its own begin, and writes them.
#include "core/launch.h"
#include "longconv/long_conv_prepare.h"

namespace packseq::longconv {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kCounters = kClasses + 1;  // the last counts blocks
constexpr unsigned kAll = ~0u;

// From each thread's counts to the counts of all threads before it; the totals go to `totals`.
__device__ void prefix_sums(int64_t (&counts)[kCounters], int64_t* parts, int64_t* totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < kCounters; ++c) {
    const int64_t own = counts[c];
    int64_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) parts[c * kWarps + warp] = sum;
    counts[c] = sum - own;
  }
  __syncthreads();
  if (threadIdx.x < kCounters) {
    int64_t sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int64_t part = parts[threadIdx.x * kWarps + w];
      parts[threadIdx.x * kWarps + w] = sum;
      sum += part;
    }
    totals[threadIdx.x] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCounters; ++c) counts[c] += parts[c * kWarps + warp];
}

__device__ void write_plan(const PrepareParams& p, const int64_t* totals, int64_t most_rows, Plan& plan) {
  int64_t first = 0, sums = 0;
  for (int c = 0; c < kClasses; ++c) {
    const int64_t count = totals[c], size = size_of_class(c);
    plan.first[c] = int32_t(first), plan.count[c] = int32_t(count), plan.sums[c] = sums;
    first += count;
    if (c == 0) {
      plan.chunk_rows[c] = int32_t(max(int64_t(1), divide_up(count, kDirectChunks)));
      plan.chunks[c] = int32_t(divide_up(count, plan.chunk_rows[c]));
    } else if (c < kLong) {  // malformed boundaries can claim more than there is room for
      plan.chunk_rows[c] = kChunkSequences;
      plan.chunks[c] = int32_t(min(divide_up(count, kChunkSequences), (p.chunk_sums - sums) / size));
      sums += plan.chunks[c] * size;
    } else {
      plan.chunk_rows[c] = plan.chunks[c] = 0;
    }
  }
  plan.long_blocks = int32_t(min(totals[kClasses], p.most_long_blocks));
  plan.most_blocks = int32_t(divide_up(most_rows, size_of_class(p.shape.fft_classes)));
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ PrepareParams p) {
  extern __shared__ float4 shared_memory[];
  const Shape& shape = p.shape;
  if (blockIdx.x > 0) {
    const int m = int(blockIdx.x - 1) * kThreads + int(threadIdx.x);
    float sine, cosine;
    sincospif(float(m) / float(kTableSize / 2), &sine, &cosine);
    const_cast<float2*>(shape.table)[m] = {cosine, -sine};
    return;
  }
  int64_t* const parts = reinterpret_cast<int64_t*>(shared_memory);
  int64_t* const totals = parts + kCounters * kWarps;
  unsigned long long* const most_rows = reinterpret_cast<unsigned long long*>(totals + kCounters);
  Plan* const plan = reinterpret_cast<Plan*>(most_rows + 1);
  if (threadIdx.x == 0) *most_rows = 0;
  const int64_t run = divide_up(shape.sequences, kThreads);
  const int64_t begin = min(threadIdx.x * run, shape.sequences), end = min(begin + run, shape.sequences);
  const int64_t block = size_of_class(shape.fft_classes);

  int64_t counts[kCounters] = {};
  int64_t most = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t rows = span_of(shape.cu_seqlens, shape.sequences, shape.total, i).size();
    const int of = class_of(rows, shape.fft_classes);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) counts[c] += of == c;
    if (of == kLong) counts[kClasses] += divide_up(rows, block);
    most = max(most, rows);
  }
  __syncthreads();
  atomicMax(most_rows, static_cast<unsigned long long>(most));
  prefix_sums(counts, parts, totals);
  if (threadIdx.x == 0) {
    write_plan(p, totals, int64_t(*most_rows), *plan);
    *const_cast<Plan*>(shape.plan) = *plan;
  }
  __syncthreads();

  int64_t next[kCounters];
#pragma unroll
  for (int c = 0; c < kCounters; ++c) next[c] = counts[c] + (c < kClasses ? plan->first[c] : 0);
  for (int64_t i = begin; i < end; ++i) {
    const Span span = span_of(shape.cu_seqlens, shape.sequences, shape.total, i);
    const int64_t rows = span.size();
    const int of = class_of(rows, shape.fft_classes);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      if (of == c) const_cast<ListedRows*>(shape.list)[next[c]++] = {int32_t(span.begin), int32_t(span.end)};
    }
    if (of != kLong) continue;
    const int64_t count = divide_up(rows, block);
    for (int64_t b = 0; b < count && next[kClasses] + b < p.most_long_blocks; ++b) {
      const_cast<LongBlock*>(shape.blocks)[next[kClasses] + b] = {
          {int32_t(span.begin), int32_t(span.end)}, int32_t(b), int32_t(count)};
    }
    next[kClasses] += count;
  }
}

}  // namespace

void prepare(const PrepareParams& p, cudaStream_t stream) {
  const size_t shared = (kCounters * (kWarps + 1) + 1) * sizeof(int64_t) + sizeof(Plan);
  launch("long conv: plan", prepare_kernel, 1 + kTableSize / kThreads, kThreads, shared, stream, p);
}

}  // namespace packseq::longconv
