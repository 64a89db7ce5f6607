// Packing on the GPU, against its definition.
#include "device_array.cuh"
#include "packing_case.h"

namespace packseq::testing {
namespace {

struct OnGpu {
  template <class T>
  using Array = DeviceArray<T>;
  static void run(Pack p) {
    const DeviceArray<char> workspace(int64_t(pack_workspace(p)));
    p.workspace = workspace.data();
    pack(p, nullptr);
    workspace.values();
  }
  static void run(const Unpack& p) { unpack(p, nullptr); }
  static void run(const UnpackBackward& p) { unpack_backward(p, nullptr); }
};

class PackingCuda : public GpuTest {};

TEST_F(PackingCuda, EveryCase) {
  for (const PackCase& c : pack_cases()) PackingRun<OnGpu>{c}.expect_right();
}

TEST_F(PackingCuda, TokensBeyondTheCapacityAreCut) {
  for (PackCase c : pack_cases()) {
    if (c.count() == 0) continue;
    c.capacity = c.count() * 2 / 3;
    PackingRun<OnGpu>{c}.expect_right();
  }
}

TEST_F(PackingCuda, MoreThanAThousandParts) {
  PackCase c{{3, 2'000'003}, 2, 0, std::vector<char>(6'000'009)};
  for (size_t i = 0; i < c.tokens.size(); ++i) c.tokens[i] = i % 7 < 4 || i % 1'000'003 < 5000;
  c.capacity = c.count() + 1000;
  PackingRun<OnGpu>{c}.expect_right();
}

// Lengths and places of any kind: nothing outside the arrays is read into them or written.
TEST_F(PackingCuda, MalformedContents) {
  constexpr int64_t kBatch = 40, kLength = 100, kCapacity = 3000, kRowBytes = 16;
  std::mt19937 random(5);
  const DeviceArray<uint8_t> padded(random_bytes(kBatch * kLength * kRowBytes, 1)), tokens(kCapacity * kRowBytes);
  std::vector<int64_t> wild(kCapacity), lengths(kBatch);
  std::vector<int32_t> cu(kBatch + 1);
  for (int round = 0; round < 3; ++round) {
    for (auto& x : wild) x = round == 0 ? int64_t(random()) - (1ll << 31) : int64_t(random() % (kBatch * kLength));
    for (auto& x : lengths) x = int64_t(random() % 400) - 150;
    for (auto& x : cu) x = round == 0 ? int32_t(random()) : int32_t(random() % (2 * kCapacity));
    const DeviceArray<int64_t> indices(wild), device_lengths(lengths), out_indices(kCapacity);
    const DeviceArray<int32_t> cu_seqlens(cu), out_cu(kBatch + 1);
    for (const TokenPlaces& places : {TokenPlaces{indices.data(), nullptr}, TokenPlaces{nullptr, cu_seqlens.data()}}) {
      OnGpu::run(UnpackBackward{{kBatch, kLength}, kRowBytes, kCapacity, places, padded.data(), tokens.data()});
      tokens.values();
      OnGpu::run(Unpack{{kBatch, kLength}, kRowBytes, kCapacity, places, tokens.data(), padded.data(), nullptr});
      padded.values();
    }
    OnGpu::run(Pack{.shape = {kBatch, kLength},
                    .row_bytes = kRowBytes,
                    .capacity = kCapacity,
                    .keep = {nullptr, device_lengths.data(), 0, 8},
                    .padded = padded.data(),
                    .tokens = tokens.data(),
                    .cu_seqlens = out_cu.data(),
                    .indices = out_indices.data(),
                    .workspace = nullptr});
    tokens.values();
    out_indices.values();
    const std::vector<int32_t> got = out_cu.values();
    EXPECT_TRUE(std::is_sorted(got.begin(), got.end()) && got[0] == 0 && got[kBatch] <= kCapacity);
  }
}

}  // namespace
}  // namespace packseq::testing
