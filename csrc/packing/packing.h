// Padded batches to packed tokens and back: the C++ API.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/executor.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {}  // namespace packseq
