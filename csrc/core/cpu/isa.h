// The instruction sets that CPU kernels are compiled for, and the one that this machine runs.
//
// Hot code is written once, over vectors of the width that the compiler is told of (vector.h), in *_cpu.cpp.in files.
// CMake compiles each such file for every instruction set, in a namespace of its own, with PACKSEQ_ISA as its name.
// Such a file must not emit inline functions that other files share: the linker keeps one copy of those, and it could
// be one that an older machine cannot run. So it uses no class of the standard library.
#pragma once

namespace packseq {

enum class Isa { baseline, avx2, avx512 };

// The best that this machine has and that was built. PACKSEQ_CPU_ISA=baseline or avx2 in the environment asks for less.
Isa cpu_isa();

const char* name_of(Isa);

// Calls the function of that name in the namespace of this machine's instruction set.
#if PACKSEQ_X86_KERNELS
#define PACKSEQ_BY_ISA(call) \
  (cpu_isa() == Isa::avx512 ? avx512::call : cpu_isa() == Isa::avx2 ? avx2::call : baseline::call)
#else
#define PACKSEQ_BY_ISA(call) baseline::call
#endif

}  // namespace packseq
