// What Python needs that is no tensor operator: what was built, and what GPUs are here. Importing this module also
// loads the operators (it is linked to their library). Nothing here touches a GPU before it is asked to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/build_info.h"
#include "python/communicator.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  const packseq::BuildInfo& build = packseq::build_info();
  const auto or_none = [](const std::string& text) -> py::object {
    return text.empty() ? py::object(py::none()) : py::str(text);
  };

  m.attr("version") = build.version;
  m.attr("commit") = or_none(build.commit);
  m.attr("compiler") = build.compiler;
  m.attr("cuda") = or_none(build.cuda);
  m.attr("has_cuda") = !build.cuda.empty();
  m.attr("architectures") = build.architectures;

  py::class_<packseq::Device>(m, "Device")
      .def_readonly("name", &packseq::Device::name)
      .def_property_readonly("capability", [](const packseq::Device& d) { return py::make_tuple(d.major, d.minor); })
      .def_readonly("problem", &packseq::Device::problem);
  m.def("devices", &packseq::devices, "The visible GPUs, and whether this build has code for them.");
  m.def("check_device", &packseq::check_device, py::arg("index"),
        "Raises RuntimeError when the kernels cannot run there.");
  m.def("misfit", &packseq::misfit, py::arg("architectures"), py::arg("gpu"), py::arg("major"), py::arg("minor"),
        "Why code built for these architectures does not run on such a GPU; empty where it does.");

  packseq::bind_communicator(m);
}
