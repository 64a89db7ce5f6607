// NCCL between the ranks of a group: exchanges on a stream of their own that overlap what the caller's stream computes,
// and failures that become exceptions instead of hanging.
//
// Every wait for other ranks ends after the timeout. An exchange's time counts from when the GPU could begin it, so
// work queued before it costs it nothing. When one takes too long, or NCCL reports an error, a thread of the
// communicator's own ends what NCCL has on the GPU, so that nothing hangs there, and every later call throws the
// reason. What an exchange received is good only if synchronize() returns, or a poll() after the GPU is known to have
// got there.
//
// Under CUDA graph capture an exchange becomes part of the graph. A replay is not timed: a rank that is lost while the
// others replay leaves them waiting until abort(). Graphs must be destroyed before the communicator.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ring/nccl_api.h"

namespace packseq {

// Memory on the communicator's GPU that goes to, or comes from, another rank.
struct Transfer {
  void* data;
  int64_t bytes;
  int peer;
};

// Safe to call from several threads; exchanges of one communicator run in the order of the calls, which must be the
// same on all ranks.
class Communicator {
 public:
  using Clock = std::chrono::steady_clock;

  // What one rank makes and gives to all.
  static std::string unique_id(const NcclApi& = nccl());

  // Returns when all `size` ranks have joined with the same id; throws std::runtime_error after `timeout` seconds.
  Communicator(const std::string& id, int rank, int size, int device, double timeout, const NcclApi& = nccl());

  // Ends NCCL's part, without waiting for other ranks. Neither throws nor hangs.
  ~Communicator();

  int rank() const { return rank_; }
  int size() const { return size_; }
  int device() const { return device_; }
  double timeout() const { return std::chrono::duration<double>(timeout_).count(); }
  cudaStream_t stream() const { return stream_; }

  // Enqueues all transfers as one step, behind what `stream` has been given so far, and returns its ticket: 1, 2, ...
  // Between two ranks sends meet receives in order, with equal bytes; a rank may send to itself. Transfers of no bytes
  // are left out, on both sides. `label` says in errors what the step was for. The memory must live until the step is
  // through.
  int64_t exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives, cudaStream_t stream,
                   std::string label = "");

  // Makes `stream` wait for the step, without waiting on the host.
  void wait(int64_t ticket, cudaStream_t stream);

  // Waits on the host for the step. Not for steps that were captured.
  void synchronize(int64_t ticket);

  // Throws what has gone wrong, if anything has.
  void poll();

  // Ends what runs on the GPU. Every later call throws.
  void abort();

  // A communicator of the ranks that give the same color, ordered by key, then rank; null where the color is negative.
  // All ranks must call it.
  std::unique_ptr<Communicator> split(int color, int key);

  // Whether NCCL itself can make the communicator without the lost ranks: it is 2.27 or later, and this one's state
  // allows it (after a failure only with NCCL 2.28.7 or later, and no network error).
  bool can_shrink();

  // A communicator without the lost ranks, in their old order; the others must all call it. This one's exchanges are
  // ended, and it is of no use afterwards.
  std::unique_ptr<Communicator> shrink(std::vector<int> lost);

 private:
  class Event {  // without timing; owned
   public:
    Event();
    Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
    Event& operator=(Event&& other) noexcept {
      std::swap(event_, other.event_);
      return *this;
    }
    ~Event();
    void record(cudaStream_t stream) const;
    void hold(cudaStream_t stream) const;  // until the event
    bool over() const;

   private:
    cudaEvent_t event_ = nullptr;
  };

  struct Step {
    int64_t ticket;
    std::string text;                        // for errors
    uint64_t capture;                        // the id of the capture it belongs to, or 0
    Event ready, ended;                      // ready: the caller's stream got to it
    std::optional<Clock::time_point> begun;  // when it was seen that nothing but the transfers was missing
  };

  Communicator(NcclComm*, int rank, int size, int device, Clock::duration timeout, const NcclApi&);

  void start();
  void watch();
  void look();
  void raise() const;
  void fail(std::string reason, bool settled);
  void let_go(bool abort);
  void end(bool abort);
  void launch(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives, const Step&);
  NcclResult settle(Clock::time_point deadline);
  std::unique_ptr<Communicator> child(const char* what, Clock::duration patience,
                                      const std::function<NcclResult(NcclComm**)>& call);
  std::shared_future<void> aside(std::function<void()> call) const;
  Step* find(int64_t ticket);
  std::string on_rank() const;

  const NcclApi& nccl_;
  const int rank_, size_, device_;
  const Clock::duration timeout_;
  cudaStream_t stream_ = nullptr;

  std::mutex mutex_;                 // held by every call, and by the watching thread while it looks
  std::condition_variable changed_;  // there is something to watch, or the end
  NcclComm* comm_ = nullptr;         // null once it is given to ncclCommAbort or ncclCommDestroy
  std::deque<Step> steps_;           // not yet seen to be over, oldest first
  std::vector<Step> captured_;       // of the capture under way
  int64_t last_ticket_ = 0;
  std::string last_text_;
  std::string failure_;
  std::shared_future<void> ending_;  // NCCL's last call, on a thread of its own
  std::shared_ptr<void> given_up_;   // where NCCL may write a child that came too late, until it has ended
  std::atomic<bool> leaving_{false};
  bool closing_ = false;
  std::thread watcher_;
};

}  // namespace packseq
