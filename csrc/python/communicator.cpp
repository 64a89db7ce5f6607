#include "python/communicator.h"

#include <pybind11/stl.h>

#if PACKSEQ_HAS_CUDA
#include "ring/communicator.h"
#endif

namespace py = pybind11;

namespace packseq {

#if PACKSEQ_HAS_CUDA

namespace {

using Address = uintptr_t;
using Triples = std::vector<std::tuple<Address, int64_t, int>>;  // address, bytes, peer

cudaStream_t stream_at(Address address) { return reinterpret_cast<cudaStream_t>(address); }

std::vector<Transfer> transfers(const Triples& triples) {
  std::vector<Transfer> all;
  for (const auto& [address, bytes, peer] : triples) {
    all.push_back({.data = reinterpret_cast<void*>(address), .bytes = bytes, .peer = peer});
  }
  return all;
}

}  // namespace

void bind_communicator(py::module_& m) {
  using WithoutGil = py::call_guard<py::gil_scoped_release>;

  py::class_<Communicator>(m, "Communicator", py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const std::string& id, int rank, int size, int device, double timeout) {
             return std::make_unique<Communicator>(id, rank, size, device, timeout);
           }),
           py::arg("id"), py::arg("rank"), py::arg("size"), py::arg("device"), py::arg("timeout"), WithoutGil(),
           "Joins the ranks that hold the same id. Raises RuntimeError when they are not all there after timeout "
           "seconds.")
      .def_static(
          "unique_id", [] { return py::bytes(Communicator::unique_id()); },
          "What one rank makes and gives to all, 128 bytes.")
      .def_static(
          "nccl", [] { return py::make_tuple(nccl().version_text(), nccl().path); },
          "NCCL's version, and the library it was found in.")
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def_property_readonly("device", &Communicator::device)
      .def_property_readonly("timeout", &Communicator::timeout)
      .def_property_readonly("stream", [](const Communicator& c) { return reinterpret_cast<Address>(c.stream()); })
      .def(
          "exchange",
          [](Communicator& c, const Triples& sends, const Triples& receives, Address stream, std::string label) {
            return c.exchange(transfers(sends), transfers(receives), stream_at(stream), std::move(label));
          },
          py::arg("sends"), py::arg("receives"), py::arg("stream"), py::arg("label") = "", WithoutGil(),
          "Enqueues (address, bytes, peer) transfers as one step behind the stream's work; returns its ticket.")
      .def(
          "wait", [](Communicator& c, int64_t ticket, Address stream) { c.wait(ticket, stream_at(stream)); },
          py::arg("ticket"), py::arg("stream"), WithoutGil(), "Makes the stream wait for the step.")
      .def("synchronize", &Communicator::synchronize, py::arg("ticket"), WithoutGil(), "Waits for the step.")
      .def("poll", &Communicator::poll, WithoutGil(), "Raises what has gone wrong, if anything has.")
      .def("abort", &Communicator::abort, WithoutGil(), "Ends what runs on the GPU. Every later call raises.")
      .def("split", &Communicator::split, py::arg("color"), py::arg("key"), WithoutGil(),
           "A communicator of the ranks with the same color, ordered by key; None for a negative color.")
      .def("can_shrink", &Communicator::can_shrink, WithoutGil(), "Whether NCCL itself can leave out lost ranks.")
      .def("shrink", &Communicator::shrink, py::arg("lost"), WithoutGil(), "A communicator without the lost ranks.");
}

#else

void bind_communicator(py::module_& m) {
  struct Communicator {};
  const auto refuse = [](const py::args&, const py::kwargs&) -> std::unique_ptr<Communicator> {
    throw std::runtime_error(
        "packseq was built without CUDA, so it has no communicator: put nvcc on PATH and install packseq again");
  };
  py::class_<Communicator>(m, "Communicator")
      .def(py::init(refuse))
      .def_static("unique_id", refuse)
      .def_static("nccl", refuse);
}

#endif

}  // namespace packseq
