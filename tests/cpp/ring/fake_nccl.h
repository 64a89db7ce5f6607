// What a test can set in the fake NCCL, and read from it. The test gets it by dlsym("fake_nccl").
#pragma once
#include <atomic>

struct FakeNccl {
  std::atomic<int> version{22809};
  std::atomic<int> broken_rank{-1};  // reports a remote error from now on
  std::atomic<bool> hangs{false};    // aborting and destroying do not return
  std::atomic<int> aborted{0}, destroyed{0}, revoked{0};
};
