// NCCL's interface between threads of one process, over memory: what a rank sends is copied when its stream gets there,
// and what it receives when it has come.
#include "fake_nccl.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "ring/nccl_api.h"

using namespace packseq;

extern "C" FakeNccl fake_nccl;
FakeNccl fake_nccl;

namespace {

struct Applicant {  // for a communicator made of another
  NcclComm* parent;
  int color, key;
  NcclComm** made;
};

struct World {
  int size, joined = 0;
  std::map<std::pair<int, int>, std::deque<std::string>> mail;  // by sender and receiver
  std::vector<Applicant> applicants;
};

std::map<std::string, std::shared_ptr<World>> worlds;  // by unique id

}  // namespace

namespace packseq {

struct NcclComm {
  std::shared_ptr<World> world;
  int rank;
  bool ended = false, waits = false;  // waits for the other applicants
  int launching = 0;                  // answers "in progress" so many times more
};

}  // namespace packseq

namespace {

std::vector<std::unique_ptr<NcclComm>> comms;  // ended ones too: tasks may hold them

NcclComm* add_comm(std::shared_ptr<World> world, int rank) {
  comms.push_back(std::make_unique<NcclComm>(NcclComm{.world = std::move(world), .rank = rank}));
  return comms.back().get();
}

struct Operation {
  NcclComm* comm;
  cudaStream_t stream;
  bool sends;
  char* data;
  size_t bytes;
  int peer;
  bool done = false;
};

thread_local int depth = 0;
thread_local std::vector<Operation> group;

NcclResult add(Operation operation) {
  if (depth == 0 || operation.comm->ended) return kNcclInvalidArgument;
  group.push_back(operation);
  return kNcclSuccess;
}

bool run(Operation& o) {
  World& world = *o.comm->world;
  if (o.sends) {
    world.mail[{o.comm->rank, o.peer}].emplace_back(o.data, o.bytes);
    return true;
  }
  auto& box = world.mail[{o.peer, o.comm->rank}];
  if (box.empty()) return false;
  std::memcpy(o.data, box.front().data(), std::min(o.bytes, box.front().size()));
  box.pop_front();
  return true;
}

NcclResult apply(Applicant applicant, int expected) {
  const std::lock_guard lock(fake_cuda::mutex());
  World& world = *applicant.parent->world;
  world.applicants.push_back(applicant);
  applicant.parent->waits = true;
  if (int(world.applicants.size()) < expected) return kNcclInProgress;

  std::sort(world.applicants.begin(), world.applicants.end(), [](const Applicant& a, const Applicant& b) {
    return std::tuple(a.color, a.key, a.parent->rank) < std::tuple(b.color, b.key, b.parent->rank);
  });
  std::map<int, std::shared_ptr<World>> made;
  for (const Applicant& a : world.applicants) {
    a.parent->waits = false;
    if (a.color < 0) continue;
    auto& child = made[a.color];
    if (child == nullptr) child = std::make_shared<World>(World{.size = 0, .mail = {}, .applicants = {}});
    *a.made = add_comm(child, child->size++);
    ++child->joined;
  }
  world.applicants.clear();
  return kNcclInProgress;
}

void end(NcclComm* comm) {
  while (fake_nccl.hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const std::lock_guard lock(fake_cuda::mutex());
  comm->ended = true;
}

}  // namespace

extern "C" {

NcclResult ncclGetVersion(int* version) { return *version = fake_nccl.version, kNcclSuccess; }

NcclResult ncclGetUniqueId(NcclUniqueId* id) {
  static std::atomic<int> last{0};
  std::memset(id, 0, sizeof *id);
  id->bytes[0] = char(++last);
  id->bytes[100] = 'x';  // behind a zero
  return kNcclSuccess;
}

NcclResult ncclCommInitRankConfig(NcclComm** comm, int size, NcclUniqueId id, int rank, NcclConfig* config) {
  if (config->magic != 0xcafebeef || config->size != 20 || config->blocking != 0) return kNcclInvalidArgument;
  const std::lock_guard lock(fake_cuda::mutex());
  auto& world = worlds[std::string(id.bytes, sizeof id.bytes)];
  if (world == nullptr) world = std::make_shared<World>(World{.size = size, .mail = {}, .applicants = {}});
  ++world->joined;
  *comm = add_comm(world, rank);
  return kNcclInProgress;
}

NcclResult ncclCommSplit(NcclComm* comm, int color, int key, NcclComm** made, NcclConfig*) {
  return apply({comm, color, key, made}, comm->world->size);
}

NcclResult ncclCommShrink(NcclComm* comm, int*, int count, NcclComm** made, NcclConfig*, int flags) {
  if (flags == kNcclShrinkAbort) {
    const std::lock_guard lock(fake_cuda::mutex());
    comm->ended = true;
  }
  return apply({comm, 0, comm->rank, made}, comm->world->size - count);
}

NcclResult ncclCommRevoke(NcclComm* comm, int) {
  ++fake_nccl.revoked;
  const std::lock_guard lock(fake_cuda::mutex());
  comm->ended = true;
  return kNcclInProgress;
}

NcclResult ncclCommCount(const NcclComm* comm, int* size) { return *size = comm->world->size, kNcclSuccess; }
NcclResult ncclCommUserRank(const NcclComm* comm, int* rank) { return *rank = comm->rank, kNcclSuccess; }

NcclResult ncclCommGetAsyncError(NcclComm* comm, NcclResult* error) {
  const std::lock_guard lock(fake_cuda::mutex());
  if (comm->launching > 0) --comm->launching;
  const bool through = comm->world->joined == comm->world->size && !comm->waits && comm->launching == 0;
  *error = comm->rank == fake_nccl.broken_rank ? kNcclRemoteError : through ? kNcclSuccess : kNcclInProgress;
  return kNcclSuccess;
}

NcclResult ncclCommDestroy(NcclComm* comm) { return end(comm), ++fake_nccl.destroyed, kNcclSuccess; }
NcclResult ncclCommAbort(NcclComm* comm) { return end(comm), ++fake_nccl.aborted, kNcclSuccess; }

NcclResult ncclGroupStart() { return ++depth, kNcclSuccess; }

NcclResult ncclGroupEnd() {
  --depth;
  if (group.empty()) return kNcclSuccess;
  NcclComm* const comm = group.front().comm;
  const cudaStream_t stream = group.front().stream;
  fake_cuda::enqueue(stream, [comm, operations = std::move(group)]() mutable {
    if (comm->ended) return true;
    for (Operation& o : operations) o.done = o.done || run(o);
    return std::all_of(operations.begin(), operations.end(), [](const Operation& o) { return o.done; });
  });
  group.clear();
  const std::lock_guard lock(fake_cuda::mutex());
  comm->launching = 3;
  return kNcclInProgress;
}

NcclResult ncclSend(const void* data, size_t count, int, int peer, NcclComm* comm, CUstream_st* stream) {
  return add({comm, stream, true, static_cast<char*>(const_cast<void*>(data)), count, peer});
}

NcclResult ncclRecv(void* data, size_t count, int, int peer, NcclComm* comm, CUstream_st* stream) {
  return add({comm, stream, false, static_cast<char*>(data), count, peer});
}

const char* ncclGetErrorString(NcclResult result) { return result == kNcclRemoteError ? "remote error" : "error"; }
const char* ncclGetLastError(const NcclComm*) { return "the last words of NCCL"; }

}  // extern "C"
