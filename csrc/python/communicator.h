// The ring's communicator for Python. Memory and streams travel as the numbers that torch gives for them.
#pragma once
#include <pybind11/pybind11.h>

namespace packseq {

void bind_communicator(pybind11::module_&);

}  // namespace packseq
