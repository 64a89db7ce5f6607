// The communicator over a fake CUDA runtime and a fake NCCL, with threads for ranks: everything but the GPU's work.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cmath>

#include "fake_nccl.h"
#include "ring/communicator.h"
#include "ring/nccl_api.h"

namespace packseq::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;
using Clock = Communicator::Clock;

constexpr double kPlenty = 30;  // seconds: no test waits for this
constexpr double kShort = 0.2;

FakeNccl& fake() {
  static void* const library = dlopen(FAKE_NCCL, RTLD_NOW);
  return *static_cast<FakeNccl*>(dlsym(library, "fake_nccl"));
}

class Ring : public ::testing::Test {
 protected:
  void SetUp() override { reset(); }
  void TearDown() override { reset(); }

  static void reset() {
    fake().version = 22809;
    fake().broken_rank = -1;
    fake().hangs = false;
    fake().aborted = fake().destroyed = fake().revoked = 0;
    fake_cuda::set_error(cudaSuccess);
  }

  // f(rank) on a thread each.
  template <class F>
  static void on_ranks(int size, const F& f) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) threads.emplace_back([&f, rank] { f(rank); });
    for (std::thread& thread : threads) thread.join();
  }

  std::vector<std::unique_ptr<Communicator>> join(int size, double timeout = kPlenty) {
    const std::string id = Communicator::unique_id(api_);
    std::vector<std::unique_ptr<Communicator>> ring(static_cast<size_t>(size));
    on_ranks(size, [&](int r) { ring[size_t(r)] = std::make_unique<Communicator>(id, r, size, 0, timeout, api_); });
    return ring;
  }

  NcclApi api_ = load_nccl(FAKE_NCCL);
};

struct Stream {
  Stream() { cudaStreamCreateWithPriority(&handle, 0, 0); }
  Stream(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(handle); }
  operator cudaStream_t() const { return handle; }
  cudaStream_t handle;
};

template <class T>
Transfer transfer(std::vector<T>& data, int peer) {
  return {data.data(), int64_t(data.size() * sizeof(T)), peer};
}

// One step round the ring: what came from the rank before.
int pass_on(Communicator& ring, int value) {
  const Stream stream;
  const int next = (ring.rank() + 1) % ring.size(), before = (ring.rank() + ring.size() - 1) % ring.size();
  std::vector<int> given{value}, got{-1};
  ring.synchronize(ring.exchange({transfer(given, next)}, {transfer(got, before)}, stream));
  return got[0];
}

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

// Whether f throws an Error whose message has all these parts.
template <class Error, class F>
AssertionResult throws(const F& f, const std::vector<std::string>& parts) {
  try {
    f();
  } catch (const Error& error) {
    for (const std::string& part : parts) {
      if (std::string(error.what()).find(part) == std::string::npos) {
        return AssertionFailure() << "no '" << part << "' in: " << error.what();
      }
    }
    return AssertionSuccess();
  }
  return AssertionFailure() << "no error";
}

template <class F, class... Parts>
AssertionResult runtime_error(const F& f, const Parts&... parts) {
  return throws<std::runtime_error>(f, {parts...});
}

template <class F, class... Parts>
AssertionResult bad_argument(const F& f, const Parts&... parts) {
  return throws<std::invalid_argument>(f, {parts...});
}

// ---- finding NCCL

TEST_F(Ring, SaysWhichNcclItFound) {
  EXPECT_EQ(api_.version_text(), "2.28.9");
  EXPECT_EQ(api_.path, FAKE_NCCL);
  EXPECT_NE(api_.comm_shrink, nullptr);
  EXPECT_NE(api_.comm_revoke, nullptr);
  EXPECT_EQ(api_.explain(kNcclRemoteError), "remote error; the last words of NCCL");
}

TEST_F(Ring, TheEnvironmentNamesTheLibrary) {
  setenv("PACKSEQ_NCCL", FAKE_NCCL, 1);
  EXPECT_EQ(nccl().path, FAKE_NCCL);
}

TEST_F(Ring, AnUnusableLibraryIsNamed) {
  EXPECT_TRUE(runtime_error([] { load_nccl("no/such/libnccl.so.2"); }, "could not be loaded", "no/such/libnccl.so.2",
                            "PACKSEQ_NCCL"));
  EXPECT_TRUE(runtime_error([] { load_nccl(FAKE_CUDA); }, "is not NCCL", FAKE_CUDA));
  fake().version = 21703;
  EXPECT_TRUE(runtime_error([] { load_nccl(FAKE_NCCL); }, "needs NCCL 2.18.0 or later", "found 2.17.3", FAKE_NCCL));
}

// ---- joining

TEST_F(Ring, RanksThatDoNotComeAreWaitedForUntilTheTimeout) {
  const std::string id = Communicator::unique_id(api_);
  const auto start = Clock::now();
  EXPECT_TRUE(runtime_error([&] { Communicator(id, 1, 3, 0, kShort, api_); }, "on rank 1 of 3",
                            "not all ranks joined within 0.2 s"));
  EXPECT_LT(Clock::now() - start, 3s);
  EXPECT_EQ(fake().aborted, 1);
}

TEST_F(Ring, BadArgumentsAreNamed) {
  const std::string id = Communicator::unique_id(api_);
  EXPECT_TRUE(bad_argument([&] { Communicator("short", 0, 1, 0, 1, api_); }, "id must be", "128 bytes, got 5"));
  EXPECT_TRUE(bad_argument([&] { Communicator(id, 2, 2, 0, 1, api_); }, "rank must be", "got 2 of 2"));
  EXPECT_TRUE(bad_argument([&] { Communicator(id, 0, 1, 0, 0, api_); }, "timeout must be", "got 0"));
  EXPECT_TRUE(bad_argument([&] { Communicator(id, 0, 1, 0, NAN, api_); }, "timeout must be", "got nan"));
}

// ---- exchanging

TEST_F(Ring, EachGetsWhatTheOneBeforeGave) {
  const auto ring = join(4);
  on_ranks(4, [&](int r) {
    Communicator& one = *ring[size_t(r)];
    EXPECT_EQ(one.rank(), r);
    EXPECT_EQ(one.size(), 4);
    EXPECT_EQ(one.timeout(), kPlenty);
    int value = r;
    for (int step = 1; step <= 8; ++step) {
      value = pass_on(one, value);
      EXPECT_EQ(value, (r + 8 - step) % 4);
    }
    one.poll();
  });
}

TEST_F(Ring, OneStepSendsInAllDirectionsInOrder) {
  const auto ring = join(3);
  on_ranks(3, [&](int r) {
    const Stream stream;
    std::vector<std::vector<int64_t>> given, got;
    std::vector<Transfer> sends, receives;
    for (int peer = 0; peer < 3; ++peer) {  // itself too
      for (int i = 0; i < 2; ++i) {
        given.push_back(std::vector<int64_t>(size_t(5 * i), 100 * r + 10 * peer + i));  // the first is empty
        got.push_back(std::vector<int64_t>(size_t(5 * i), -1));
      }
    }
    for (size_t i = 0; i < given.size(); ++i) {
      sends.push_back(transfer(given[i], int(i) / 2));
      receives.push_back(transfer(got[i], int(i) / 2));
    }
    ring[size_t(r)]->synchronize(ring[size_t(r)]->exchange(sends, receives, stream));
    for (int peer = 0; peer < 3; ++peer) {
      EXPECT_EQ(got[size_t(2 * peer + 1)], std::vector<int64_t>(5, 100 * peer + 10 * r + 1));
    }
  });
}

TEST_F(Ring, TheCallersStreamWaitsForTheStep) {
  const auto ring = join(2);
  std::atomic<bool> late_rank_may_go{false};
  on_ranks(2, [&](int r) {
    const Stream stream;
    std::vector<int> given{r}, got{-1}, copy{-2};
    if (r == 1) fake_cuda::enqueue(stream, [&] { return late_rank_may_go.load(); });  // what the step comes after
    const int64_t ticket = ring[size_t(r)]->exchange({transfer(given, 1 - r)}, {transfer(got, 1 - r)}, stream);
    ring[size_t(r)]->wait(ticket, stream);
    cudaMemcpyAsync(copy.data(), got.data(), sizeof(int), cudaMemcpyDeviceToDevice, stream);
    if (r == 0) {
      ring[0]->poll();
      EXPECT_EQ(copy[0], -2);
      late_rank_may_go = true;
    }
    ring[size_t(r)]->synchronize(ticket);
    cudaEvent_t end;
    cudaEventCreateWithFlags(&end, 0);
    cudaEventRecord(end, stream);
    while (cudaEventQuery(end) != cudaSuccess) std::this_thread::yield();
    cudaEventDestroy(end);
    EXPECT_EQ(copy[0], 1 - r);
    ring[size_t(r)]->wait(ticket, stream);  // of a step that is over: nothing to wait for
  });
}

TEST_F(Ring, BadTransfersAreNamed) {
  const auto ring = join(1);
  Communicator& one = *ring[0];
  const Stream stream;
  std::vector<int> a{1}, b{2, 3};
  EXPECT_TRUE(bad_argument([&] { one.exchange({transfer(a, 1)}, {}, stream); }, "sends", "from 0 to 0, got 1"));
  EXPECT_TRUE(bad_argument([&] { one.exchange({}, {{a.data(), -4, 0}}, stream); }, "receives", "0 bytes each, got -4"));
  EXPECT_TRUE(bad_argument([&] { one.exchange({{nullptr, 4, 0}}, {}, stream); }, "sends", "got null for peer 0"));
  EXPECT_TRUE(
      bad_argument([&] { one.exchange({transfer(a, 0)}, {transfer(b, 0)}, stream); }, "rank 0 sends to itself"));
  EXPECT_TRUE(bad_argument([&] { one.wait(1, stream); }, "ticket must be", "1 to 0, got 1"));
  one.poll();  // none of it has harmed it
}

TEST_F(Ring, CapturedStepsAreNotTimed) {
  const auto ring = join(2, kShort);
  const Stream stream;
  std::vector<int> got{-1};
  fake_cuda::set_capture(stream, 7);
  const int64_t ticket = ring[0]->exchange({}, {transfer(got, 1)}, stream);  // that is never sent
  ring[0]->wait(ticket, stream);
  std::this_thread::sleep_for(500ms);
  ring[0]->poll();
  EXPECT_TRUE(bad_argument([&] { ring[0]->synchronize(ticket); }, "not captured", "got 1"));
  fake_cuda::set_capture(stream, 0);
  ring[0]->abort();
}

// ---- failing

TEST_F(Ring, ALostRankIsAnErrorOnEveryOther) {
  const auto ring = join(4, kShort);
  const auto start = Clock::now();
  on_ranks(4, [&](int r) {
    Communicator& one = *ring[size_t(r)];
    EXPECT_EQ(pass_on(one, r), (r + 3) % 4);
    if (r == 2) return;  // lost
    const Stream stream;
    std::vector<int> given{r}, got{-1};
    const int64_t ticket = one.exchange({transfer(given, 2)}, {transfer(got, 2)}, stream, "keys");
    const std::string text = error_of([&] { one.synchronize(ticket); });
    EXPECT_EQ(text, "ring: step 2 (keys, exchange with rank 2) did not end within 0.2 s on rank " + std::to_string(r) +
                        " of 4: a rank is lost, or has not come to this step");
    EXPECT_EQ(error_of([&] { one.poll(); }), text);
    EXPECT_EQ(error_of([&] { one.wait(ticket, stream); }), text);
    EXPECT_EQ(error_of([&] { one.exchange({}, {}, stream); }), text);
    EXPECT_EQ(error_of([&] { one.split(0, 0); }), text);
    one.abort();
    EXPECT_EQ(error_of([&] { one.poll(); }), text);
  });
  EXPECT_LT(Clock::now() - start, 3s);
}

TEST_F(Ring, TheThreadThatWatchesEndsWhatRunsOnTheGpu) {
  const auto ring = join(2, kShort);
  const Stream stream;
  std::vector<int> got{-1};
  ring[0]->wait(ring[0]->exchange({}, {transfer(got, 1)}, stream), stream);
  cudaEvent_t end;
  cudaEventCreateWithFlags(&end, 0);
  cudaEventRecord(end, stream);
  const auto start = Clock::now();
  while (cudaEventQuery(end) != cudaSuccess && Clock::now() - start < 5s) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(cudaEventQuery(end), cudaSuccess);  // as if the program had only synchronized its own stream
  EXPECT_GT(Clock::now() - start, 150ms);
  cudaEventDestroy(end);
  EXPECT_TRUE(runtime_error([&] { ring[0]->poll(); }, "step 1 (exchange with rank 1)"));
}

TEST_F(Ring, TimeCountsFromWhenTheStepCouldBegin) {
  const auto ring = join(2, kShort);
  std::atomic<bool> computed{false};
  on_ranks(2, [&](int r) {
    const Stream stream;
    std::vector<int> given{r}, got{-1};
    fake_cuda::enqueue(stream, [&] { return computed.load(); });
    const int64_t ticket = ring[size_t(r)]->exchange({transfer(given, 1 - r)}, {transfer(got, 1 - r)}, stream);
    std::this_thread::sleep_for(600ms);
    ring[size_t(r)]->poll();
    computed = true;
    ring[size_t(r)]->synchronize(ticket);
    EXPECT_EQ(got[0], 1 - r);
  });
}

TEST_F(Ring, ErrorsOfNcclAndOfTheGpuNameTheStep) {
  auto ring = join(4);
  const Stream stream;
  std::vector<int> got{-1};
  fake().broken_rank = 0;
  EXPECT_TRUE(runtime_error([&] { ring[0]->poll(); }, "NCCL reported an error on rank 0 of 4", "the last words"));
  EXPECT_TRUE(runtime_error([&] { ring[0]->poll(); }, "the last words"));
  fake().broken_rank = -1;

  const int64_t ticket = ring[1]->exchange({}, {transfer(got, 0), transfer(got, 2)}, stream);
  fake().broken_rank = 1;
  EXPECT_TRUE(runtime_error([&] { ring[1]->synchronize(ticket); }, "during step 1 (exchange with ranks 0 and 2)"));
  fake().broken_rank = -1;

  ring[3]->synchronize(ring[3]->exchange({transfer(got, 2)}, {}, stream));
  fake().broken_rank = 3;
  EXPECT_TRUE(runtime_error([&] { ring[3]->poll(); }, "error after step 1 (exchange with rank 2) on rank 3 of 4"));
  fake().broken_rank = -1;

  ring[2]->exchange({}, {transfer(got, 0)}, stream);
  fake_cuda::set_error(cudaErrorUnknown);
  EXPECT_TRUE(runtime_error([&] { ring[2]->poll(); }, "GPU reported an error on rank 2 of 4", "a made-up error"));
}

TEST_F(Ring, AnAbortFromAnotherThreadEndsAWait) {
  const auto ring = join(2);
  const Stream stream;
  std::vector<int> got{-1};
  const int64_t ticket = ring[0]->exchange({}, {transfer(got, 1)}, stream);
  std::thread other([&] {
    std::this_thread::sleep_for(50ms);
    ring[0]->abort();
  });
  EXPECT_TRUE(runtime_error([&] { ring[0]->synchronize(ticket); }, "rank 0 of 2 was aborted"));
  other.join();
  ring[0]->abort();  // again does nothing
  EXPECT_EQ(fake().aborted, 1);
}

TEST_F(Ring, WhatIsIdleIsDestroyedAndWhatWaitsIsAborted) {
  auto ring = join(3);
  const Stream stream;
  std::vector<int> got{-1};
  ring[0]->exchange({}, {transfer(got, 2)}, stream);
  ring[0].reset();
  EXPECT_EQ(fake().aborted, 1);
  ring[1].reset();
  EXPECT_EQ(fake().destroyed, 1);

  fake().hangs = true;
  const auto start = Clock::now();
  ring[2].reset();
  EXPECT_LT(Clock::now() - start, 8s);
  EXPECT_EQ(fake().destroyed, 1);
  fake().hangs = false;
  while (fake().destroyed < 2) std::this_thread::sleep_for(1ms);
}

// ---- fewer ranks

TEST_F(Ring, SplitGroupsByColorAndOrdersByKey) {
  const auto ring = join(5);
  on_ranks(5, [&](int r) {
    const auto part = ring[size_t(r)]->split(r == 4 ? -1 : r % 2, -r);
    EXPECT_EQ(part == nullptr, r == 4);
    if (r == 4) return;
    EXPECT_EQ(part->size(), 2);
    EXPECT_EQ(part->rank(), r < 2 ? 1 : 0);
    EXPECT_EQ(part->timeout(), kPlenty);
    EXPECT_EQ(pass_on(*part, r), (r + 2) % 4);
  });
  on_ranks(5, [&](int r) { EXPECT_EQ(pass_on(*ring[size_t(r)], r), (r + 4) % 5); });  // the whole goes on
}

TEST_F(Ring, ASplitThatNotAllComeToFails) {
  const auto ring = join(2, kShort);
  EXPECT_TRUE(runtime_error([&] { ring[0]->split(0, 0); }, "split on rank 0 of 2", "not all ranks came to it"));
  EXPECT_TRUE(runtime_error([&] { ring[0]->poll(); }, "split on rank 0 of 2"));
}

TEST_F(Ring, TheOthersGoOnWithoutTheLost) {
  const auto ring = join(4, kShort);
  on_ranks(4, [&](int r) {
    if (r == 2) return;
    Communicator& one = *ring[size_t(r)];
    if (r != 0) {  // rank 0 has not noticed anything
      EXPECT_TRUE(runtime_error([&] { pass_on(one, r); }, "step 1"));
    }
    EXPECT_TRUE(one.can_shrink());
    const auto rest = one.shrink({2, 2});
    EXPECT_EQ(rest->size(), 3);
    EXPECT_EQ(rest->rank(), r == 3 ? 2 : r);
    EXPECT_EQ(pass_on(*rest, r), r == 0 ? 3 : r == 1 ? 0 : 1);
    EXPECT_TRUE(runtime_error([&] { one.poll(); }, r == 0 ? "was shrunk" : "step 1"));
  });
  EXPECT_EQ(fake().revoked, 2);
}

TEST_F(Ring, AnOlderNcclIsAbortedAndCannotShrink) {
  api_.comm_revoke = nullptr;
  const auto ring = join(2, kShort);
  EXPECT_TRUE(ring[1]->can_shrink());
  EXPECT_TRUE(runtime_error([&] { pass_on(*ring[0], 0); }, "step 1"));
  EXPECT_FALSE(ring[0]->can_shrink());
  ring[0]->abort();  // waits for what the failure began
  EXPECT_EQ(fake().aborted, 1);
  EXPECT_TRUE(runtime_error([&] { ring[0]->shrink({1}); }, "NCCL 2.28.9 cannot shrink", "which was aborted"));
  EXPECT_TRUE(bad_argument([&] { ring[1]->shrink({1}); }, "lost must not name rank 1"));
  EXPECT_TRUE(bad_argument([&] { ring[1]->shrink({2}); }, "lost must name ranks from 0 to 1"));
}

}  // namespace
}  // namespace packseq::testing
