// The CPU implementation of packing, against its definition.

#include "executors.h"
#include "guarded.h"
#include "packing_case.h"

namespace packseq::testing {
namespace {

// As DeviceArray, on the host.
template <class T>
class HostArray {
 public:
  explicit HostArray(int64_t count) : memory_(size_t(count) * sizeof(T)) {}
  explicit HostArray(const std::vector<T>& values) : HostArray(int64_t(values.size())) {
    if (!values.empty()) std::memcpy(memory_.data(), values.data(), memory_.bytes());
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> values() const {
    EXPECT_TRUE(memory_.intact()) << "written outside the array";
    return {data(), data() + memory_.bytes() / sizeof(T)};
  }

 private:
  mutable Guarded memory_;
};

struct Serial {
  template <class T>
  using Array = HostArray<T>;
  static void run(const Pack& p) { pack(p, Executor::serial()); }
  static void run(const Unpack& p) { unpack(p, Executor::serial()); }
  static void run(const UnpackBackward& p) { unpack_backward(p, Executor::serial()); }
};

struct Threaded {
  template <class T>
  using Array = HostArray<T>;
  static void run(const Pack& p) { pack(p, threaded()); }
  static void run(const Unpack& p) { unpack(p, threaded()); }
  static void run(const UnpackBackward& p) { unpack_backward(p, threaded()); }
};

TEST(PackingCpu, EveryCase) {
  for (const PackCase& c : pack_cases()) PackingRun<Serial>{c}.expect_right();
}

TEST(PackingCpu, EveryCaseInThreads) {
  for (const PackCase& c : pack_cases()) PackingRun<Threaded>{c}.expect_right();
}

TEST(PackingCpu, BoundariesLongerThanTheBatchAreCut) {
  const std::vector<int32_t> cu_seqlens{0, 5, 6};
  const Bytes tokens = random_bytes(8, 3), padded = random_bytes(6, 4);
  const TokenPlaces places = {.indices = nullptr, .cu_seqlens = cu_seqlens.data()};
  Bytes out(6), back(8, 0xff);
  unpack({{2, 3}, 1, 8, places, tokens.data(), out.data(), nullptr}, Executor::serial());
  EXPECT_EQ(out, (Bytes{tokens[0], tokens[1], tokens[2], tokens[5], 0, 0}));
  unpack_backward({{2, 3}, 1, 8, places, padded.data(), back.data()}, Executor::serial());
  EXPECT_EQ(back, (Bytes{padded[0], padded[1], padded[2], 0, 0, padded[3], 0, 0}));
}

std::string error_of(const TokenRows& keep, int64_t capacity) {
  try {
    check_tokens({2, 3}, keep, capacity, Executor::serial());
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(PackingCpu, BadContentsAreNamed) {
  const std::vector<uint8_t> mask{1, 1, 1, 1, 0, 1};
  const std::vector<int64_t> lengths{2, 4}, negative{-1, 3};
  EXPECT_EQ(error_of({mask.data(), nullptr, 1, 0}, 5), "");
  EXPECT_EQ(error_of({mask.data(), nullptr, 1, 0}, 4),
            "pack: capacity must be at least the number of tokens, 5, got 4");
  EXPECT_EQ(error_of({nullptr, lengths.data(), 0, 8}, 6),
            "pack: lengths must be within 0 and the padded length 3, got 4 at position 1");
  EXPECT_EQ(error_of({nullptr, negative.data(), 0, 8}, 6),
            "pack: lengths must be within 0 and the padded length 3, got -1 at position 0");
}

}  // namespace
}  // namespace packseq::testing
