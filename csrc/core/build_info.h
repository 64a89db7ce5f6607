// What this library was built for, what GPUs are here, and whether the two fit.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace packseq {

// Strings are empty where there is nothing to say: built outside git, or without CUDA.
struct BuildInfo {
  std::string version, commit, compiler;
  std::string cuda;           // of the toolkit, "13.0"
  std::string architectures;  // as CMake writes them, "80-real;90a-real;90-virtual"
};

const BuildInfo& build_info();

// What keeps code built for `architectures` from running on a GPU of compute capability major.minor, as one sentence;
// empty where nothing does. Real code runs on later minors of its major; PTX (virtual) on everything later; with suffix
// a on that chip alone, with f on its major.
std::string misfit(std::string_view architectures, const std::string& gpu, int major, int minor);

struct Device {
  std::string name;
  int major, minor;
  std::string problem;  // why this build cannot use it, or empty
};

// The visible GPUs. Empty where there are none, or CUDA was not built; throws where the driver does not work.
std::vector<Device> devices();

// Throws one sentence when the kernels cannot run on this GPU. Cheap from the second call on.
void check_device(int index);

}  // namespace packseq
