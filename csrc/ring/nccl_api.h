// The part of NCCL's C interface that the ring uses, found when the program runs: packseq builds without NCCL, and
// works with the one that torch has loaded. Names, values and layouts are NCCL's own.
#pragma once
#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;

namespace packseq {

struct NcclUniqueId {
  char bytes[128];
};

enum NcclResult : int { kNcclSuccess = 0, kNcclInvalidArgument = 4, kNcclRemoteError = 6, kNcclInProgress = 7 };

constexpr int kNcclInt8 = 0;
constexpr int kNcclNoColor = -1;
constexpr int kNcclShrinkAbort = 1;  // ends what the parent has in flight first

// As of NCCL 2.14: NCCL reads `size` bytes, and takes what a configuration of this version lacks for not given.
struct NcclConfig {
  size_t size = offsetof(NcclConfig, blocking) + sizeof(int);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;  // no call waits for other ranks: comm_get_async_error tells when it is through
};

struct NcclComm;  // opaque

struct NcclApi {
  std::string path;  // of the library
  int version;       // 22809 is 2.28.9

  NcclResult (*get_unique_id)(NcclUniqueId*);
  NcclResult (*comm_init_rank_config)(NcclComm**, int size, NcclUniqueId, int rank, NcclConfig*);
  NcclResult (*comm_split)(NcclComm*, int color, int key, NcclComm** child, NcclConfig*);
  NcclResult (*comm_count)(const NcclComm*, int* size);
  NcclResult (*comm_user_rank)(const NcclComm*, int* rank);
  NcclResult (*comm_get_async_error)(NcclComm*, NcclResult*);
  NcclResult (*comm_destroy)(NcclComm*);
  NcclResult (*comm_abort)(NcclComm*);
  NcclResult (*group_start)();
  NcclResult (*group_end)();
  NcclResult (*send)(const void*, size_t count, int dtype, int peer, NcclComm*, CUstream_st*);
  NcclResult (*recv)(void*, size_t count, int dtype, int peer, NcclComm*, CUstream_st*);
  const char* (*get_error_string)(NcclResult);
  const char* (*get_last_error)(const NcclComm*);

  // Null where the library is older.
  NcclResult (*comm_shrink)(NcclComm*, int* lost, int count, NcclComm** child, NcclConfig*, int flags);  // 2.27
  NcclResult (*comm_revoke)(NcclComm*, int flags);                                                       // 2.28.7

  std::string version_text() const;

  // What a call's result means, with the last error that NCCL wrote down.
  std::string explain(NcclResult) const;
};

// Throws std::runtime_error where there is no such library, it is no NCCL, or one before 2.18. An empty path finds the
// libnccl.so.2 that the process has loaded, else the one on the loader's path.
NcclApi load_nccl(const std::string& path);

// The process's one NCCL, loaded by the first call; PACKSEQ_NCCL in the environment names another library.
const NcclApi& nccl();

}  // namespace packseq
