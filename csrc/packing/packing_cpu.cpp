// Packing on the CPU. Rows are copied in runs: tokens that stand together in the padded batch stand together packed,
// so a batch padded at one end is one copy a sequence.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/check.h"
#include "core/divide_up.h"
#include "core/packed.h"
#include "packing/packing.h"

namespace packseq {
namespace {

constexpr int64_t kChunk = 4096;                // rows whose tokens are counted together
constexpr int64_t kBytesPerThread = 64 * 1024;  // less is not worth a thread

int64_t grain_for(int64_t row_bytes) { return std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(8, row_bytes)); }

void copy_rows(void* to, int64_t to_row, const void* from, int64_t from_row, int64_t rows, int64_t row_bytes) {
  if (rows * row_bytes == 0) return;
  std::memcpy(static_cast<char*>(to) + to_row * row_bytes, static_cast<const char*>(from) + from_row * row_bytes,
              size_t(rows * row_bytes));
}

// Rows of a pattern of 16 bytes, each begun anew; of zeros where it is nullptr.
void fill_rows(void* to, int64_t first, int64_t rows, int64_t row_bytes, const void* fill) {
  if (rows * row_bytes == 0) return;
  char* const begin = static_cast<char*>(to) + first * row_bytes;
  if (!fill) {
    std::memset(begin, 0, size_t(rows * row_bytes));
    return;
  }
  for (int64_t at = 0; at < row_bytes; at += 16)
    std::memcpy(begin + at, fill, size_t(std::min<int64_t>(16, row_bytes - at)));
  for (int64_t done = 1; done < rows; done *= 2)
    copy_rows(begin, done, begin, 0, std::min(done, rows - done), row_bytes);
}

// f(begin, end) for each run of tokens among rows begin .. end of sequence b.
template <class Integer, class F>
void for_marked(const Integer* mask, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const Integer* const first = std::find_if(mask + begin, mask + end, [](Integer x) { return x != 0; });
    const Integer* const last = std::find(first, mask + end, Integer(0));
    if (first != last) f(first - mask, last - mask);
    begin = last - mask;
  }
}

int64_t length_of(const TokenRows& keep, int64_t b) {
  return keep.length_bytes == 4 ? static_cast<const int32_t*>(keep.lengths)[b]
                                : static_cast<const int64_t*>(keep.lengths)[b];
}

template <class F>
void for_runs(const PaddedShape& shape, const TokenRows& keep, int64_t b, int64_t begin, int64_t end, const F& f) {
  if (keep.lengths) {
    end = std::min(end, length_of(keep, b));
    if (begin < end) f(begin, end);
    return;
  }
  const auto in_row = [&](auto integer) {
    for_marked(static_cast<const decltype(integer)*>(keep.mask) + b * shape.length, begin, end, f);
  };
  switch (keep.mask_bytes) {
    case 1:
      return in_row(uint8_t{});
    case 2:
      return in_row(uint16_t{});
    case 4:
      return in_row(uint32_t{});
    default:
      return in_row(uint64_t{});
  }
}

// f(b, begin, end) for each sequence's part of the flat rows first .. last.
template <class F>
void for_sequences(const PaddedShape& shape, int64_t first, int64_t last, const F& f) {
  while (first < last) {
    const int64_t b = first / shape.length, begin = first % shape.length;
    const int64_t rows = std::min(shape.length - begin, last - first);
    f(b, begin, begin + rows);
    first += rows;
  }
}

int64_t chunks_of(const PaddedShape& shape) { return divide_up(shape.rows(), kChunk); }

template <class F>
void for_chunk(const PaddedShape& shape, int64_t c, const F& f) {
  for_sequences(shape, c * kChunk, std::min((c + 1) * kChunk, shape.rows()), f);
}

// Element c: the tokens before row c * kChunk of the batch; one more for all of them.
std::vector<int64_t> tokens_before_chunks(const PaddedShape& shape, const TokenRows& keep, Executor executor) {
  std::vector<int64_t> before(size_t(chunks_of(shape)) + 1, 0);
  executor.parallel_for(chunks_of(shape), 8, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      int64_t& count = before[size_t(c) + 1];
      for_chunk(shape, c, [&](int64_t b, int64_t begin, int64_t end) {
        for_runs(shape, keep, b, begin, end, [&](int64_t from, int64_t to) { count += to - from; });
      });
    }
  });
  for (size_t c = 1; c < before.size(); ++c) before[c] += before[c - 1];
  return before;
}

std::vector<int64_t> checked_tokens_before_chunks(const PaddedShape& shape, const TokenRows& keep, int64_t capacity,
                                                  Executor executor) {
  for (int64_t b = 0; keep.lengths && b < shape.batch; ++b) {
    const int64_t length = length_of(keep, b);
    check(length >= 0 && length <= shape.length, "pack: lengths must be within 0 and the padded length ", shape.length,
          ", got ", length, " at position ", b);
  }
  std::vector<int64_t> before = tokens_before_chunks(shape, keep, executor);
  check(before.back() <= capacity, "pack: capacity must be at least the number of tokens, ", before.back(), ", got ",
        capacity);
  return before;
}

// An index as a number that grows from token to token: slack's -1 is the largest.
uint64_t ordered(int64_t index) { return uint64_t(index); }

}  // namespace

void check_tokens(const PaddedShape& shape, const TokenRows& keep, int64_t capacity, Executor executor) {
  checked_tokens_before_chunks(shape, keep, capacity, executor);
}

void pack(const Pack& p, Executor executor) {
  const std::vector<int64_t> before = checked_tokens_before_chunks(p.shape, p.keep, p.capacity, executor);
  const int64_t total = before.back();
  const auto pack_chunk = [&](int64_t c) {
    int64_t at = before[size_t(c)];
    for_chunk(p.shape, c, [&](int64_t b, int64_t begin, int64_t end) {
      if (begin == 0) p.cu_seqlens[b] = int32_t(at);
      for_runs(p.shape, p.keep, b, begin, end, [&](int64_t from, int64_t to) {
        const int64_t place = b * p.shape.length + from;
        copy_rows(p.tokens, at, p.padded, place, to - from, p.row_bytes);
        for (int64_t i = 0; i < to - from; ++i) p.indices[at + i] = place + i;
        at += to - from;
      });
    });
  };
  const int64_t grain = std::max<int64_t>(1, grain_for(p.row_bytes) / kChunk);
  executor.parallel_for(chunks_of(p.shape), grain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) pack_chunk(c);
  });
  if (p.shape.length == 0) std::fill_n(p.cu_seqlens, p.shape.batch, 0);
  p.cu_seqlens[p.shape.batch] = int32_t(total);
  executor.parallel_for(p.capacity - total, grain_for(p.row_bytes), [&](int64_t first, int64_t last) {
    fill_rows(p.tokens, total + first, last - first, p.row_bytes, nullptr);
    std::fill(p.indices + total + first, p.indices + total + last, int64_t(-1));
  });
}

namespace {

// Rows first .. last of the padded batch, from tokens found by their indices.
void unpack_by_indices(const Unpack& p, int64_t first, int64_t last) {
  const int64_t* const indices = p.places.indices;
  const auto smaller = [](int64_t index, int64_t row) { return ordered(index) < ordered(row); };
  int64_t t = std::lower_bound(indices, indices + p.capacity, first, smaller) - indices;
  for (int64_t row = first; row < last;) {
    const int64_t next = t < p.capacity ? int64_t(std::min(ordered(indices[t]), uint64_t(last))) : last;
    fill_rows(p.padded, row, next - row, p.row_bytes, p.fill);
    row = next;
    int64_t run = 0;
    while (row + run < last && t + run < p.capacity && indices[t + run] == row + run) ++run;
    copy_rows(p.padded, row, p.tokens, t, run, p.row_bytes);
    row += run, t += run;
  }
}

void unpack_by_boundaries(const Unpack& p, int64_t first, int64_t last) {
  for_sequences(p.shape, first, last, [&](int64_t b, int64_t begin, int64_t end) {
    const Span span = span_of(p.places.cu_seqlens, p.shape.batch, p.capacity, b);
    const int64_t row = b * p.shape.length, tokens_end = std::clamp(span.size(), begin, end);
    copy_rows(p.padded, row + begin, p.tokens, span.begin + begin, tokens_end - begin, p.row_bytes);
    fill_rows(p.padded, row + tokens_end, end - tokens_end, p.row_bytes, p.fill);
  });
}

// Tokens first .. last.
void gather_by_indices(const UnpackBackward& p, int64_t first, int64_t last) {
  const int64_t* const indices = p.places.indices;
  const auto has_place = [&](int64_t t) { return ordered(indices[t]) < uint64_t(p.shape.rows()); };
  for (int64_t t = first; t < last;) {
    int64_t run = 1;
    if (has_place(t)) {
      while (t + run < last && indices[t + run] == indices[t] + run && has_place(t + run)) ++run;
      copy_rows(p.tokens, t, p.padded, indices[t], run, p.row_bytes);
    } else {
      while (t + run < last && !has_place(t + run)) ++run;
      fill_rows(p.tokens, t, run, p.row_bytes, nullptr);
    }
    t += run;
  }
}

void gather_by_boundaries(const UnpackBackward& p, int64_t first, int64_t last) {
  const int32_t* const cu = p.places.cu_seqlens;
  int64_t b = std::upper_bound(cu, cu + p.shape.batch + 1, first) - cu - 1;
  for (int64_t t = first; t < last; ++b) {
    const bool slack = b == p.shape.batch;
    const Span span = slack ? Span{t, last} : span_of(cu, p.shape.batch, p.capacity, b);
    const int64_t end = std::min(span.end, last);
    const int64_t in_batch = slack ? t : std::clamp(span.begin + p.shape.length, t, end);
    copy_rows(p.tokens, t, p.padded, b * p.shape.length + t - span.begin, in_batch - t, p.row_bytes);
    fill_rows(p.tokens, in_batch, end - in_batch, p.row_bytes, nullptr);
    t = end;
  }
}

}  // namespace

void unpack(const Unpack& p, Executor executor) {
  executor.parallel_for(p.shape.rows(), grain_for(p.row_bytes), [&](int64_t first, int64_t last) {
    p.places.cu_seqlens ? unpack_by_boundaries(p, first, last) : unpack_by_indices(p, first, last);
  });
}

void unpack_backward(const UnpackBackward& p, Executor executor) {
  executor.parallel_for(p.capacity, grain_for(p.row_bytes), [&](int64_t first, int64_t last) {
    p.places.cu_seqlens ? gather_by_boundaries(p, first, last) : gather_by_indices(p, first, last);
  });
}

}  // namespace packseq
