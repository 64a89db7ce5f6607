#include "ring/communicator.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <system_error>

#include "core/check.h"
#include "core/check_cuda.h"

namespace packseq {
namespace {

using namespace std::chrono_literals;
using Clock = Communicator::Clock;

constexpr auto kLook = 10ms;    // between two looks at what runs on the GPU
constexpr auto kPatience = 5s;  // for NCCL to end a communicator; then it goes on by itself
constexpr int kSpins = 2000;    // before a wait for NCCL begins to sleep: a launch takes some tens of microseconds

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_;
};

// Lets this thread ask after events while any thread captures a graph.
class BesideCapture {
 public:
  BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Clock::duration duration_of(double timeout) {
  check(timeout > 0 && timeout < 1e6, "Communicator: timeout must be from 0 to 1e6 seconds, got ", timeout);
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout));
}

uint64_t capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

std::string seconds(Clock::duration time) { return text_of(std::chrono::duration<double>(time).count()) + " s"; }

// "rank 3", "ranks 3 and 5", "ranks 1, 3 and 5"
std::string text_of_ranks(const std::set<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (auto rank = ranks.begin(); rank != ranks.end(); ++rank) {
    if (rank != ranks.begin()) text += std::next(rank) == ranks.end() ? " and " : ", ";
    text += std::to_string(*rank);
  }
  return text;
}

std::string text_of_step(int64_t ticket, const std::string& label, const std::vector<Transfer>& sends,
                         const std::vector<Transfer>& receives) {
  std::set<int> peers;
  for (const auto* transfers : {&sends, &receives}) {
    for (const Transfer& t : *transfers) {
      if (t.bytes > 0) peers.insert(t.peer);
    }
  }
  std::string text = "step " + std::to_string(ticket) + " (";
  if (!label.empty()) text += label + ", ";
  return text + (peers.empty() ? "nothing to exchange" : "exchange with " + text_of_ranks(peers)) + ")";
}

void check_transfers(const char* name, const std::vector<Transfer>& transfers, int size) {
  for (const Transfer& t : transfers) {
    check(t.peer >= 0 && t.peer < size, "exchange: ", name, " must name peers from 0 to ", size - 1, ", got ", t.peer);
    check(t.bytes >= 0, "exchange: ", name, " must have at least 0 bytes each, got ", t.bytes);
    check(t.bytes == 0 || t.data != nullptr, "exchange: ", name, " must point to memory, got null for peer ", t.peer);
  }
}

std::vector<Transfer> with_peer(const std::vector<Transfer>& transfers, int peer) {
  std::vector<Transfer> found;
  std::copy_if(transfers.begin(), transfers.end(), std::back_inserter(found),
               [peer](const Transfer& t) { return t.peer == peer && t.bytes > 0; });
  return found;
}

}  // namespace

// ---- making and ending

std::string Communicator::unique_id(const NcclApi& nccl) {
  NcclUniqueId id;
  const NcclResult result = nccl.get_unique_id(&id);
  if (result != kNcclSuccess) throw std::runtime_error("ring: ncclGetUniqueId: " + nccl.explain(result));
  return {id.bytes, sizeof id.bytes};
}

Communicator::Communicator(const std::string& id, int rank, int size, int device, double timeout, const NcclApi& nccl)
    : Communicator(nullptr, rank, size, device, duration_of(timeout), nccl) {
  NcclUniqueId unique;
  check(id.size() == sizeof unique.bytes, "Communicator: id must be what unique_id() made, ", sizeof unique.bytes,
        " bytes, got ", id.size());
  check(size > 0 && rank >= 0 && rank < size, "Communicator: rank must be from 0 to size - 1, got ", rank, " of ",
        size);
  std::memcpy(unique.bytes, id.data(), id.size());

  const OnDevice on(device_);
  NcclConfig config;
  NcclResult result = nccl_.comm_init_rank_config(&comm_, size_, unique, rank_, &config);
  if (result == kNcclInProgress || result == kNcclSuccess) result = settle(Clock::now() + timeout_);
  if (result != kNcclSuccess) {
    const std::string why = result == kNcclInProgress
                                ? "not all ranks joined within " + seconds(timeout_) + "; a rank is lost or late"
                                : nccl_.explain(result);
    end(/*abort=*/true);
    throw std::runtime_error("ring: no communicator " + on_rank() + ": " + why);
  }
  start();
}

Communicator::Communicator(NcclComm* comm, int rank, int size, int device, Clock::duration timeout, const NcclApi& nccl)
    : nccl_(nccl), rank_(rank), size_(size), device_(device), timeout_(timeout), comm_(comm) {}

void Communicator::start() {
  const OnDevice on(device_);
  int lowest = 0, highest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest), "cudaStreamCreateWithPriority");
  watcher_ = std::thread([this] { watch(); });
}

Communicator::~Communicator() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    changed_.notify_all();
  }
  if (watcher_.joinable()) watcher_.join();
  try {
    if (failure_.empty() && comm_ != nullptr) look();
    end(/*abort=*/!failure_.empty() || !steps_.empty());
  } catch (const std::system_error&) {  // no thread could be made: NCCL's part is left behind
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);  // what still runs on it runs on
}

// NCCL may wait in here for the GPU, for graphs that hold the communicator, or for a thread of its own. So that the
// caller never does, it gets a thread.
std::shared_future<void> Communicator::aside(std::function<void()> call) const {
  std::packaged_task<void()> task([call = std::move(call), device = device_] {
    cudaSetDevice(device);
    call();
  });
  std::shared_future<void> done = task.get_future().share();
  std::thread(std::move(task)).detach();
  return done;
}

void Communicator::let_go(bool abort) {
  NcclComm* const comm = std::exchange(comm_, nullptr);
  if (comm == nullptr) return;
  ending_ = aside([&nccl = nccl_, comm, abort, before = ending_, held = given_up_] {
    if (before.valid()) before.wait_for(kPatience);
    abort ? nccl.comm_abort(comm) : nccl.comm_destroy(comm);
  });
}

void Communicator::end(bool abort) {
  let_go(abort);
  if (ending_.valid()) ending_.wait_for(kPatience);
}

void Communicator::abort() {
  leaving_ = true;  // makes settle() give up the lock
  const std::lock_guard lock(mutex_);
  if (failure_.empty()) failure_ = "ring: the communicator " + on_rank() + " was aborted";
  end(/*abort=*/true);
  steps_.clear();
}

// ---- exchanging

int64_t Communicator::exchange(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives,
                               cudaStream_t stream, std::string label) {
  check_transfers("sends", sends, size_);
  check_transfers("receives", receives, size_);
  const std::vector<Transfer> from_self = with_peer(sends, rank_), to_self = with_peer(receives, rank_);
  check(std::equal(from_self.begin(), from_self.end(), to_self.begin(), to_self.end(),
                   [](const Transfer& a, const Transfer& b) { return a.bytes == b.bytes; }),
        "exchange: what rank ", rank_, " sends to itself must be what it receives from itself, in order and bytes");

  const std::lock_guard lock(mutex_);
  raise();
  const OnDevice on(device_);
  const int64_t ticket = ++last_ticket_;
  Step step{.ticket = ticket,
            .text = text_of_step(ticket, label, sends, receives),
            .capture = capture_of(stream),
            .ready = {},
            .ended = {},
            .begun = {}};
  last_text_ = step.text;
  step.ready.record(stream);
  step.ready.hold(stream_);
  for (size_t i = 0; i < from_self.size(); ++i) {
    check_cuda(cudaMemcpyAsync(to_self[i].data, from_self[i].data, size_t(to_self[i].bytes), cudaMemcpyDeviceToDevice,
                               stream_),
               "cudaMemcpyAsync");
  }
  launch(sends, receives, step);
  step.ended.record(stream_);

  std::erase_if(captured_, [&step](const Step& other) { return other.capture != step.capture; });
  if (step.capture != 0) {
    captured_.push_back(std::move(step));
  } else {
    steps_.push_back(std::move(step));
    changed_.notify_all();
  }
  return ticket;
}

void Communicator::launch(const std::vector<Transfer>& sends, const std::vector<Transfer>& receives, const Step& step) {
  const auto elsewhere = [this](const Transfer& t) { return t.bytes > 0 && t.peer != rank_; };
  if (std::none_of(sends.begin(), sends.end(), elsewhere) &&
      std::none_of(receives.begin(), receives.end(), elsewhere)) {
    return;
  }
  NcclResult result = kNcclSuccess;
  const auto note = [&result](NcclResult one) {
    if (result == kNcclSuccess && one != kNcclInProgress) result = one;
  };
  note(nccl_.group_start());
  for (const Transfer& t : sends) {
    if (elsewhere(t)) note(nccl_.send(t.data, size_t(t.bytes), kNcclInt8, t.peer, comm_, stream_));
  }
  for (const Transfer& t : receives) {
    if (elsewhere(t)) note(nccl_.recv(t.data, size_t(t.bytes), kNcclInt8, t.peer, comm_, stream_));
  }
  note(nccl_.group_end());
  // A thread of NCCL's launches the kernel, and the first time connects to the peers. Only then may the event follow.
  if (result == kNcclSuccess) result = settle(Clock::now() + timeout_);
  if (result == kNcclSuccess) return;

  const std::string why =
      result != kNcclInProgress ? ": " + nccl_.explain(result)
      : leaving_                ? " was aborted"
                 : " could not begin within " + seconds(timeout_) + ": a rank is lost, or has not come to this step";
  fail("ring: " + step.text + " " + on_rank() + why, /*settled=*/false);
  raise();
}

void Communicator::wait(int64_t ticket, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  raise();
  const OnDevice on(device_);
  if (const Step* step = find(ticket)) step->ended.hold(stream);
}

void Communicator::synchronize(int64_t ticket) {
  for (int spins = 0;; ++spins) {
    {
      const std::lock_guard lock(mutex_);
      raise();
      look();
      raise();
      const Step* const step = find(ticket);
      if (step == nullptr) return;
      check(step->capture == 0, "synchronize: ticket must be of a step that was not captured into a graph, got ",
            ticket);
    }
    spins < kSpins ? std::this_thread::yield() : std::this_thread::sleep_for(100us);
  }
}

void Communicator::poll() {
  const std::lock_guard lock(mutex_);
  raise();
  look();
  raise();
}

// The step, or null when it is over.
Communicator::Step* Communicator::find(int64_t ticket) {
  check(ticket > 0 && ticket <= last_ticket_, "ticket must be one that exchange() gave, 1 to ", last_ticket_, ", got ",
        ticket);
  const auto is_it = [ticket](const Step& step) { return step.ticket == ticket; };
  if (const auto step = std::find_if(steps_.begin(), steps_.end(), is_it); step != steps_.end()) return &*step;
  const auto step = std::find_if(captured_.begin(), captured_.end(), is_it);
  return step != captured_.end() ? &*step : nullptr;
}

// ---- failing

void Communicator::watch() {
  cudaSetDevice(device_);  // else asking after an event would make a context on the first GPU
  std::unique_lock lock(mutex_);
  while (!closing_) {
    if (steps_.empty() || !failure_.empty()) {
      changed_.wait(lock);
    } else {
      look();
      changed_.wait_for(lock, kLook);
    }
  }
}

// Forgets the steps that are over, and fails if the oldest takes too long or NCCL reports an error.
void Communicator::look() {
  const BesideCapture relaxed;
  try {
    while (!steps_.empty() && steps_.front().ended.over()) steps_.pop_front();
    if (!steps_.empty()) {
      Step& oldest = steps_.front();
      if (!oldest.begun && oldest.ready.over()) oldest.begun = Clock::now();
      if (oldest.begun && Clock::now() - *oldest.begun > timeout_) {
        return fail("ring: " + oldest.text + " did not end within " + seconds(timeout_) + " " + on_rank() +
                        ": a rank is lost, or has not come to this step",
                    /*settled=*/true);
      }
    }
    NcclResult result = kNcclSuccess;
    nccl_.comm_get_async_error(comm_, &result);
    if (result != kNcclSuccess) {
      std::string when;
      if (last_ticket_ > 0) when = steps_.empty() ? " after " + last_text_ : " during " + steps_.front().text;
      fail("ring: NCCL reported an error" + when + " " + on_rank() + ": " + nccl_.explain(result), /*settled=*/true);
    }
  } catch (const std::exception& error) {
    fail("ring: the GPU reported an error " + on_rank() + ": " + error.what(), /*settled=*/true);
  }
}

void Communicator::raise() const {
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

// Keeps the reason, and has NCCL end what it runs on the GPU. A revoked communicator can still be shrunk, an aborted
// one cannot; but NCCL 2.28 frees the job of a launch that has not settled twice when it is revoked.
void Communicator::fail(std::string reason, bool settled) {
  failure_ = std::move(reason);
  if (settled && nccl_.comm_shrink != nullptr && nccl_.comm_revoke != nullptr) {
    ending_ = aside([&nccl = nccl_, comm = comm_] { nccl.comm_revoke(comm, 0); });
  } else {
    let_go(/*abort=*/true);
  }
}

// Waits until NCCL is through with what was begun. In progress means that it is not.
NcclResult Communicator::settle(Clock::time_point deadline) {
  for (int spins = 0;; ++spins) {
    NcclResult state = kNcclSuccess;
    const NcclResult result = nccl_.comm_get_async_error(comm_, &state);
    if (result != kNcclSuccess) return result;
    if (state != kNcclInProgress || leaving_ || Clock::now() > deadline) return state;
    spins < kSpins ? std::this_thread::yield() : std::this_thread::sleep_for(100us);
  }
}

// ---- communicators of fewer ranks

std::unique_ptr<Communicator> Communicator::split(int color, int key) {
  const std::lock_guard lock(mutex_);
  raise();
  try {
    return child("split", timeout_, [=, this](NcclComm** made) {
      return nccl_.comm_split(comm_, color < 0 ? kNcclNoColor : color, key, made, nullptr);
    });
  } catch (const std::exception& error) {
    fail(error.what(), /*settled=*/false);
    throw;
  }
}

bool Communicator::can_shrink() {
  const std::lock_guard lock(mutex_);
  if (comm_ == nullptr || nccl_.comm_shrink == nullptr) return false;
  const Clock::time_point deadline = Clock::now() + timeout_;
  if (ending_.valid() && ending_.wait_until(deadline) != std::future_status::ready) return false;
  return settle(deadline) == kNcclSuccess;
}

std::unique_ptr<Communicator> Communicator::shrink(std::vector<int> lost) {
  std::sort(lost.begin(), lost.end());
  lost.erase(std::unique(lost.begin(), lost.end()), lost.end());
  check(!lost.empty() && lost.front() >= 0 && lost.back() < size_, "shrink: lost must name ranks from 0 to ",
        size_ - 1);
  check(!std::binary_search(lost.begin(), lost.end(), rank_), "shrink: lost must not name rank ", rank_,
        ", which calls");
  if (!can_shrink()) {
    throw std::runtime_error("ring: NCCL " + nccl_.version_text() + " cannot shrink the communicator " + on_rank() +
                             (comm_ == nullptr ? ", which was aborted" : " in its state"));
  }
  const std::lock_guard lock(mutex_);
  if (failure_.empty())
    failure_ = "ring: the communicator " + on_rank() + " was shrunk: use the one that shrink() gave";
  // Others may need a timeout to notice that a rank is lost.
  return child("shrink", 2 * timeout_, [=, this](NcclComm** made) mutable {
    return nccl_.comm_shrink(comm_, lost.data(), int(lost.size()), made, nullptr, kNcclShrinkAbort);
  });
}

std::unique_ptr<Communicator> Communicator::child(const char* what, Clock::duration patience,
                                                  const std::function<NcclResult(NcclComm**)>& call) {
  struct Made {
    NcclComm* comm = nullptr;
    NcclResult result = kNcclInProgress;
  };
  const auto made = std::make_shared<Made>();
  const Clock::time_point deadline = Clock::now() + patience;
  const std::shared_future<void> called = aside([made, call] { made->result = call(&made->comm); });
  NcclResult result = kNcclInProgress;
  if (called.wait_until(deadline) == std::future_status::ready) {
    result = made->result;
    if (result == kNcclSuccess || result == kNcclInProgress) result = settle(deadline);
  }
  if (result != kNcclSuccess) {
    given_up_ = made;
    throw std::runtime_error(std::string("ring: ") + what + " " + on_rank() + ": " +
                             (result == kNcclInProgress
                                  ? "not all ranks came to it within " + seconds(patience) + "; a rank is lost or late"
                                  : nccl_.explain(result)));
  }
  NcclComm* const comm = made->comm;
  if (comm == nullptr) return nullptr;

  int rank = 0, size = 0;
  nccl_.comm_user_rank(comm, &rank);
  nccl_.comm_count(comm, &size);
  std::unique_ptr<Communicator> communicator(new Communicator(comm, rank, size, device_, timeout_, nccl_));
  communicator->start();
  return communicator;
}

// ---- pieces

std::string Communicator::on_rank() const {
  return "on rank " + std::to_string(rank_) + " of " + std::to_string(size_);
}

Communicator::Event::Event() {
  check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
}

Communicator::Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

void Communicator::Event::record(cudaStream_t stream) const {
  check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
}

void Communicator::Event::hold(cudaStream_t stream) const {
  check_cuda(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

bool Communicator::Event::over() const {
  const cudaError_t state = cudaEventQuery(event_);
  if (state == cudaErrorNotReady) cudaGetLastError();  // else a later check would find it
  if (state == cudaErrorNotReady || state == cudaErrorCudartUnloading) return false;
  check_cuda(state, "cudaEventQuery");
  return true;
}

}  // namespace packseq
