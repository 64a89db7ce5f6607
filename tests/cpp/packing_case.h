// Packing's cases, and what comes out of them by definition; run by the tests of the CPU and of the GPU.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "packing/packing.h"

namespace packseq::testing {

using Bytes = std::vector<uint8_t>;

inline Bytes random_bytes(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(static_cast<size_t>(count));
  for (uint8_t& x : bytes) x = uint8_t(random() % 255 + 1);  // never zero, which slack and padding are
  return bytes;
}

struct PackCase {
  PaddedShape shape;
  int64_t row_bytes, capacity;
  std::vector<char> tokens;              // [batch * length], whether the row is one
  int mask_bytes = 1, length_bytes = 0;  // with length_bytes, tokens are the first rows of each sequence
  int offset = 0;                        // bytes by which the rows miss the best alignment

  int64_t count() const { return std::count(tokens.begin(), tokens.end(), 1); }
  std::string name() const {
    return std::to_string(shape.batch) + " x " + std::to_string(shape.length) + " rows of " +
           std::to_string(row_bytes) + " bytes, " + std::to_string(count()) + " tokens, capacity " +
           std::to_string(capacity) + ", mask " + std::to_string(mask_bytes) + ", lengths " +
           std::to_string(length_bytes) + ", offset " + std::to_string(offset);
  }

  // The mask as integers of mask_bytes; marked rows hold any number but zero.
  Bytes mask() const {
    Bytes bytes(tokens.size() * size_t(mask_bytes), 0);
    for (size_t i = 0; i < tokens.size(); ++i) bytes[i * mask_bytes + i % mask_bytes] = tokens[i] ? 1 + i % 255 : 0;
    return bytes;
  }
  Bytes lengths() const {
    Bytes bytes(size_t(shape.batch) * length_bytes);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const auto row = tokens.begin() + b * shape.length;
      const int64_t length = std::count(row, row + shape.length, 1);
      std::memcpy(&bytes[size_t(b * length_bytes)], &length, size_t(length_bytes));  // little-endian
    }
    return bytes;
  }
};

struct Packed3 {
  Bytes tokens;
  std::vector<int32_t> cu_seqlens;
  std::vector<int64_t> indices;
};

// By definition. What is beyond the capacity is cut off.
inline Packed3 packed_by_definition(const PackCase& c, const Bytes& padded) {
  Packed3 out{Bytes(size_t(c.capacity * c.row_bytes), 0), {0}, std::vector<int64_t>(size_t(c.capacity), -1)};
  int64_t t = 0;
  for (int64_t b = 0; b < c.shape.batch; ++b) {
    for (int64_t row = b * c.shape.length; row < (b + 1) * c.shape.length; ++row) {
      if (!c.tokens[size_t(row)] || t == c.capacity) continue;
      std::copy_n(padded.begin() + row * c.row_bytes, c.row_bytes, out.tokens.begin() + t * c.row_bytes);
      out.indices[size_t(t++)] = row;
    }
    out.cu_seqlens.push_back(int32_t(t));
  }
  return out;
}

inline Bytes unpacked_by_definition(const PackCase& c, const Packed3& packed, const Bytes* fill) {
  Bytes padded(size_t(c.shape.rows() * c.row_bytes), 0);
  for (size_t i = 0; fill && i < padded.size(); ++i) padded[i] = (*fill)[i % size_t(c.row_bytes) % 16];
  for (int64_t t = 0; t < c.capacity; ++t) {
    const int64_t row = packed.indices[size_t(t)];
    if (row >= 0) std::copy_n(packed.tokens.begin() + t * c.row_bytes, c.row_bytes, padded.begin() + row * c.row_bytes);
  }
  return padded;
}

// Every shape, pattern, row size, mask type and alignment worth a look, not all combined.
inline std::vector<PackCase> pack_cases() {
  std::vector<PackCase> cases;
  std::mt19937 random(7);
  const auto add = [&](int64_t batch, int64_t length, int64_t row_bytes, double density, int64_t spare) -> PackCase& {
    PackCase c{{batch, length}, row_bytes, 0, std::vector<char>(size_t(batch * length), 0)};
    for (char& x : c.tokens) x = std::uniform_real_distribution<>()(random) < density;
    c.capacity = c.count() + spare;
    return cases.emplace_back(c);
  };
  for (auto [batch, length] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 20000}, {7, 33}, {500, 1}, {3, 4096}, {2, 4097}, {40, 513}}) {
    for (double density : {0.0, 0.02, 0.5, 1.0}) add(batch, length, 8, density, density == 0.5 ? 0 : batch + 5);
  }
  for (int64_t row_bytes : {0, 1, 2, 3, 4, 6, 12, 16, 24, 100, 1536, 40000, 100008}) add(4, 17, row_bytes, 0.6, 9);
  for (int mask_bytes : {1, 2, 4, 8}) {
    for (int offset : {0, 1, 2, 4, 8}) {
      PackCase& c = add(5, 2000, 32, 0.7, 100);
      c.mask_bytes = mask_bytes, c.offset = offset;
    }
  }
  for (int64_t batch : {0, 5}) {
    for (int64_t length : {0, 6}) {
      for (int64_t spare : {0, 4}) {
        if (batch * length == 0) add(batch, length, 16, 0, spare);
      }
    }
  }
  const auto one_sided = [&](int64_t batch, int64_t length, bool left, int length_bytes) {
    PackCase& c = add(batch, length, 48, 0, 0);
    c.length_bytes = length_bytes;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t tokens = int64_t(random() % uint64_t(length + 1)), first = left ? length - tokens : 0;
      std::fill_n(c.tokens.begin() + b * length + first, tokens, 1);
    }
    c.capacity = c.shape.rows();
  };
  for (auto [batch, length] : {std::pair<int64_t, int64_t>{3, 50}, {64, 200}, {300, 3}, {2, 30000}}) {
    one_sided(batch, length, true, 0);
    for (int length_bytes : {0, 4, 8}) one_sided(batch, length, false, length_bytes);
  }
  return cases;
}

inline bool right_padded(const PackCase& c) {
  for (int64_t i = 1; i < c.shape.rows(); ++i) {
    if (i % c.shape.length && c.tokens[size_t(i)] > c.tokens[size_t(i - 1)]) return false;
  }
  return true;
}

// Backend: Array<T>, an array in its memory between guard bands, and the three functions.
template <class Backend>
struct PackingRun {
  template <class T>
  using Array = typename Backend::template Array<T>;

  const PackCase& c;
  Bytes padded = random_bytes(c.shape.rows() * c.row_bytes, 1);
  Packed3 want = packed_by_definition(c, padded);

  // Rows at c.offset bytes behind where an array begins.
  Bytes moved(const Bytes& rows) const {
    Bytes bytes(size_t(c.offset), 0xff);
    bytes.insert(bytes.end(), rows.begin(), rows.end());
    return bytes;
  }

  Packed3 pack() const {
    const Array<uint8_t> from(moved(padded)), to(c.offset + c.capacity * c.row_bytes);
    const Array<uint8_t> mask(c.length_bytes ? Bytes() : c.mask()), lengths(c.length_bytes ? c.lengths() : Bytes());
    const Array<int32_t> cu_seqlens(c.shape.batch + 1);
    const Array<int64_t> indices(c.capacity);
    Backend::run(Pack{.shape = c.shape,
                      .row_bytes = c.row_bytes,
                      .capacity = c.capacity,
                      .keep = {.mask = c.length_bytes ? nullptr : mask.data(),
                               .lengths = c.length_bytes ? lengths.data() : nullptr,
                               .mask_bytes = c.mask_bytes,
                               .length_bytes = c.length_bytes},
                      .padded = from.data() + c.offset,
                      .tokens = to.data() + c.offset,
                      .cu_seqlens = cu_seqlens.data(),
                      .indices = indices.data(),
                      .workspace = nullptr});
    const Bytes tokens = to.values();
    return {Bytes(tokens.begin() + c.offset, tokens.end()), cu_seqlens.values(), indices.values()};
  }

  template <class Call>
  Bytes move(const Bytes& rows, int64_t bytes, bool boundaries, const Bytes* fill) const {
    const Array<uint8_t> from(moved(rows)), to(c.offset + bytes), pattern(fill ? *fill : Bytes());
    const Array<int32_t> cu_seqlens(want.cu_seqlens);
    const Array<int64_t> indices(want.indices);
    const TokenPlaces places = {.indices = boundaries ? nullptr : indices.data(),
                                .cu_seqlens = boundaries ? cu_seqlens.data() : nullptr};
    if constexpr (std::is_same_v<Call, Unpack>) {
      Backend::run(Unpack{c.shape, c.row_bytes, c.capacity, places, from.data() + c.offset, to.data() + c.offset,
                          fill ? pattern.data() : nullptr});
    } else {
      Backend::run(
          UnpackBackward{c.shape, c.row_bytes, c.capacity, places, from.data() + c.offset, to.data() + c.offset});
    }
    const Bytes moved_rows = to.values();
    return Bytes(moved_rows.begin() + c.offset, moved_rows.end());
  }

  void expect_right() const {
    SCOPED_TRACE(c.name());
    const Packed3 got = pack();
    EXPECT_EQ(got.cu_seqlens, want.cu_seqlens);
    EXPECT_TRUE(got.indices == want.indices) << "indices";
    EXPECT_TRUE(got.tokens == want.tokens) << "tokens";
    const Bytes fill = random_bytes(16, 2);
    for (const bool boundaries : {false, true}) {
      if (boundaries && !right_padded(c)) continue;
      SCOPED_TRACE(boundaries ? "by boundaries" : "by indices");
      for (const Bytes* with : {static_cast<const Bytes*>(nullptr), &fill}) {
        EXPECT_TRUE(move<Unpack>(want.tokens, c.shape.rows() * c.row_bytes, boundaries, with) ==
                    unpacked_by_definition(c, want, with))
            << "unpacked" << (with ? ", filled" : "");
      }
      EXPECT_TRUE(move<UnpackBackward>(padded, c.capacity * c.row_bytes, boundaries, nullptr) == want.tokens)
          << "gathered";
    }
  }
};

}  // namespace packseq::testing
