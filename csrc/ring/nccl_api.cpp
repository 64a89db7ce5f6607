#include "ring/nccl_api.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace packseq {
namespace {

constexpr int kOldest = 21800;  // the first with ncclCommSplit
constexpr const char* kName = "libnccl.so.2";

std::string text_of_version(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

void* open(const std::string& path) {
  if (!path.empty()) return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* const loaded = dlopen(kName, RTLD_NOW | RTLD_NOLOAD);
  return loaded != nullptr ? loaded : dlopen(kName, RTLD_NOW | RTLD_LOCAL);
}

template <class Function>
void find(void* library, const char* symbol, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, symbol));
}

std::string path_of(void* symbol) {
  Dl_info info;
  return dladdr(symbol, &info) != 0 ? info.dli_fname : kName;
}

}  // namespace

NcclApi load_nccl(const std::string& path) {
  void* const library = open(path);
  if (library == nullptr) {
    throw std::runtime_error(std::string("ring: NCCL could not be loaded (") + dlerror() +
                             "): a CUDA build of torch brings it along; PACKSEQ_NCCL names another library");
  }
  NcclResult (*get_version)(int*);
  find(library, "ncclGetVersion", get_version);
  if (get_version == nullptr) throw std::runtime_error("ring: " + path + " is not NCCL: it has no ncclGetVersion");

  NcclApi api{};
  api.path = path_of(reinterpret_cast<void*>(get_version));
  get_version(&api.version);
  if (api.version < kOldest) {
    throw std::runtime_error("ring: needs NCCL " + text_of_version(kOldest) + " or later, but found " +
                             text_of_version(api.version) + " in " + api.path);
  }

  const auto need = [&](const char* symbol, auto*& function) {
    find(library, symbol, function);
    if (function == nullptr) throw std::runtime_error("ring: the NCCL in " + api.path + " has no " + symbol);
  };
  need("ncclGetUniqueId", api.get_unique_id);
  need("ncclCommInitRankConfig", api.comm_init_rank_config);
  need("ncclCommSplit", api.comm_split);
  need("ncclCommCount", api.comm_count);
  need("ncclCommUserRank", api.comm_user_rank);
  need("ncclCommGetAsyncError", api.comm_get_async_error);
  need("ncclCommDestroy", api.comm_destroy);
  need("ncclCommAbort", api.comm_abort);
  need("ncclGroupStart", api.group_start);
  need("ncclGroupEnd", api.group_end);
  need("ncclSend", api.send);
  need("ncclRecv", api.recv);
  need("ncclGetErrorString", api.get_error_string);
  need("ncclGetLastError", api.get_last_error);
  find(library, "ncclCommShrink", api.comm_shrink);
  find(library, "ncclCommRevoke", api.comm_revoke);
  return api;
}

const NcclApi& nccl() {
  static const NcclApi api = [] {
    const char* const path = std::getenv("PACKSEQ_NCCL");
    return load_nccl(path != nullptr ? path : "");
  }();
  return api;
}

std::string NcclApi::version_text() const { return text_of_version(version); }

std::string NcclApi::explain(NcclResult result) const {
  std::string text = get_error_string(result);
  const char* const last = get_last_error(nullptr);
  if (last != nullptr && *last != '\0') text += std::string("; ") + last;
  return text;
}

}  // namespace packseq
