#include "core/cpu/isa.h"

#include <cstdlib>
#include <string_view>

#include "core/check.h"

namespace packseq {

namespace {

Isa best_isa() {
#if PACKSEQ_X86_KERNELS
  __builtin_cpu_init();
  const auto avx2 = [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  };
  const auto avx512 = [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  };
  if (avx2()) return avx512() ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::baseline;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("PACKSEQ_CPU_ISA");
  if (!asked || !*asked) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (name_of(isa) == std::string_view(asked)) return isa < best ? isa : best;
  }
  fail("PACKSEQ_CPU_ISA: got '", asked, "', must be baseline, avx2 or avx512");
}

}  // namespace

const char* name_of(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

Isa cpu_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace packseq
