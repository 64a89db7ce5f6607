#include "core/build_info.h"

#include <atomic>
#include <charconv>
#include <stdexcept>

#include "core/build_config.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {

const BuildInfo& build_info() {
  static const BuildInfo info{.version = PACKSEQ_VERSION,
                              .commit = PACKSEQ_COMMIT,
                              .compiler = PACKSEQ_COMPILER,
                              .cuda = PACKSEQ_CUDA_VERSION,
                              .architectures = PACKSEQ_ARCHITECTURES};
  return info;
}

namespace {

// One entry of the list: "80", "80-real", "90a-real", "90-virtual".
bool one_runs_on(std::string_view one, int major, int minor) {
  int number = 0;
  const char* rest = std::from_chars(one.data(), one.data() + one.size(), number).ptr;
  const int built_major = number / 10, built_minor = number % 10;
  const std::string_view suffix(rest, size_t(one.data() + one.size() - rest));
  const bool same_major = major == built_major && minor >= built_minor;

  if (suffix.starts_with('a')) return same_major && minor == built_minor;
  if (suffix.starts_with('f') || suffix == "-real") return same_major;
  return same_major || major > built_major;  // there is PTX
}

bool runs_on(std::string_view architectures, int major, int minor) {
  while (!architectures.empty()) {
    const size_t end = architectures.find(';');
    if (one_runs_on(architectures.substr(0, end), major, minor)) return true;
    architectures.remove_prefix(end == std::string_view::npos ? architectures.size() : end + 1);
  }
  return false;
}

}  // namespace

std::string misfit(std::string_view architectures, const std::string& gpu, int major, int minor) {
  if (runs_on(architectures, major, minor)) return "";
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  return "packseq was built for the CUDA architectures " + std::string(architectures) + ", none of which runs on the " +
         gpu + " with its compute capability " + capability + ": " +
         (major < 8 ? "packseq needs 8.0 or later" : "install packseq again with TORCH_CUDA_ARCH_LIST=" + capability);
}

#if PACKSEQ_HAS_CUDA

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
}

// Turns what the driver answers into the sentence a user can act on.
void check_driver(cudaError_t error) {
  if (error == cudaSuccess) return;
  int driver = 0;
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) {
    throw std::runtime_error("packseq was built with CUDA " + build_info().cuda +
                             ", but the GPU's driver supports CUDA " + version_text(driver) +
                             " at most: update the driver, or build packseq with an older CUDA");
  }
  throw std::runtime_error(std::string("packseq: the GPU cannot be used: ") + cudaGetErrorString(error));
}

Device device(int index) {
  cudaDeviceProp properties;
  check_driver(cudaGetDeviceProperties(&properties, index));
  return {.name = properties.name,
          .major = properties.major,
          .minor = properties.minor,
          .problem = misfit(build_info().architectures, properties.name, properties.major, properties.minor)};
}

}  // namespace

std::vector<Device> devices() {
  int count = 0, driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return {};  // no driver, so no GPU
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) return {};
  check_driver(error);

  std::vector<Device> found;
  for (int i = 0; i < count; ++i) found.push_back(device(i));
  return found;
}

void check_device(int index) {
  static std::atomic<uint64_t> good{0};  // one bit a device
  const uint64_t bit = index < 64 ? uint64_t(1) << index : 0;
  if (good.load(std::memory_order_relaxed) & bit) return;

  const Device d = device(index);
  if (!d.problem.empty()) throw std::runtime_error(d.problem);
  good.fetch_or(bit, std::memory_order_relaxed);
}

#else

std::vector<Device> devices() { return {}; }

void check_device(int) {
  throw std::runtime_error(
      "packseq was built without CUDA, but got a CUDA tensor: put nvcc on PATH and install packseq again, or move the "
      "tensors to the CPU");
}

#endif

}  // namespace packseq
