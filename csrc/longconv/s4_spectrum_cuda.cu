// The spectrum of S4's filters on the GPU, host side.
#include "core/check.h"
#include "core/dispatch.h"
#include "core/workspace.h"
#include "longconv/s4_spectrum_backward.cuh"
#include "longconv/s4_spectrum_forward.cuh"

namespace packseq {
namespace {

void check_problem(const S4Problem& p) {
  check(p.real == Dtype::f32, "s4_spectrum: on a GPU float32 only, got ", name_of(p.real));
  check(p.poles >= 1 && p.poles <= kMostPoles, "s4_spectrum: poles must be between 1 and ", kMostPoles, ", got ",
        p.poles);
  check(p.length >= 1, "s4_spectrum: length must be at least 1, got ", p.length);
}

S4Call call_of(const S4Problem& p) {
  return {.w = static_cast<const Complex*>(p.w),
          .P = static_cast<const Complex*>(p.P),
          .B = static_cast<const Complex*>(p.B),
          .C = static_cast<const Complex*>(p.C),
          .dt = static_cast<const float*>(p.dt),
          .filters = p.filters,
          .channels = p.channels,
          .length = p.length,
          .poles = p.poles};
}

int64_t tiles_of(const S4Problem& p, int64_t tile) { return (p.length / 2 + tile) / tile; }

}  // namespace

void s4_spectrum(const S4Spectrum& f, cudaStream_t stream) {
  const S4Problem& p = f.problem;
  check_problem(p);
  if (p.filters == 0) return;
  dispatch<0, 1, 2>("rank", p.rank, [&](auto rank) {
    dispatch<1, 2>("filters", p.filters == 1 ? 1 : 2, [&](auto filters) {
      const S4Forward params = {
          .call = call_of(p), .out = static_cast<Complex*>(f.out), .tiles = tiles_of(p, kS4ForwardTile)};
      launch("s4_spectrum", s4_spectrum_kernel<rank, filters>, p.channels * params.tiles, kS4Threads, 0, stream,
             params);
    });
  });
}

size_t s4_spectrum_backward_workspace(const S4Problem& p) {
  Workspace pieces(nullptr);
  dispatch<0, 1, 2>("rank", p.rank, [&](auto rank) {
    pieces.take<float>(p.filters * tiles_of(p, kS4Tile) * p.channels * kS4Fields<rank> * p.poles);
  });
  return pieces.used();
}

void s4_spectrum_backward(const S4SpectrumBackward& b, cudaStream_t stream) {
  const S4Problem& p = b.problem;
  check_problem(p);
  dispatch<0, 1, 2>("rank", p.rank, [&](auto rank) {
    const S4Backward params = {.call = call_of(p),
                               .dout = static_cast<const Complex*>(b.dout),
                               .shares = static_cast<float*>(b.workspace),
                               .tiles = tiles_of(p, kS4Tile),
                               .dw = static_cast<Complex*>(b.dw),
                               .dP = static_cast<Complex*>(b.dP),
                               .dB = static_cast<Complex*>(b.dB),
                               .dC = static_cast<Complex*>(b.dC),
                               .ddt = static_cast<float*>(b.ddt)};
    launch("s4_spectrum backward", s4_spectrum_backward_kernel<rank>, p.filters * p.channels * params.tiles, kS4Threads,
           sizeof(S4BackwardMemory<rank>), stream, params);
    launch("s4_spectrum backward: parameters", s4_parameter_gradients_kernel<rank>, p.channels, kS4Threads, 0, stream,
           params);
  });
}

}  // namespace packseq
