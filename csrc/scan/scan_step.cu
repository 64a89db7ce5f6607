#include "scan/scan_step.cuh"

namespace packseq {
template void launch_scan_step<SmallMapping>(const ScanStep&, cudaStream_t);
template void launch_scan_step<LargeMapping>(const ScanStep&, cudaStream_t);
template void launch_scan_step<SmallComplexMapping>(const ScanStep&, cudaStream_t);
template void launch_scan_step<LargeComplexMapping>(const ScanStep&, cudaStream_t);
}  // namespace packseq
