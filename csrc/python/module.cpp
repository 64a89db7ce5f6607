// What Python needs that is no tensor operator. Importing this module also loads the operators.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
#if PACKSEQ_HAS_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
