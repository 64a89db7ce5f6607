// How many pieces of a size something takes.
#pragma once
#include "core/packed.h"

namespace packseq {

PACKSEQ_HOST_DEVICE int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

}  // namespace packseq
