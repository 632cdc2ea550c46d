// A Python module of the kernels' occupancy, for `vmae doctor` and the benchmarks. It is optional, built where pybind11
// is, and for one Python; nothing but those lines needs it.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace {

void append(void* context, const vmae::Occupancy& kernel) {
  py::dict facts;
  facts["kernel"] = kernel.kernel;
  facts["math"] = kernel.math;
  facts["tile"] = py::make_tuple(kernel.rows, kernel.columns, kernel.depth, kernel.stages);
  facts["registers"] = kernel.registers;
  facts["local_bytes"] = kernel.local_bytes;
  facts["shared_bytes"] = kernel.shared_bytes;
  facts["blocks"] = kernel.blocks;
  static_cast<py::list*>(context)->append(facts);
}

py::list occupancy(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  using Each = const char* (*)(void (*)(void*, const vmae::Occupancy&), void*);
  auto each = reinterpret_cast<Each>(dlsym(handle, "vmae_csrc_occupancy"));
  if (each == nullptr) throw std::runtime_error(library + " was built without CUDA");
  py::list found;
  if (const char* problem = each(append, &found)) throw std::runtime_error(problem);
  return found;
}

}  // namespace

PYBIND11_MODULE(_csrc_occupancy, m) {
  m.doc() = "The compiled kernels on the current CUDA device.";
  m.def("occupancy", &occupancy, py::arg("library"),
        "Of each kernel in the library: its tile (rows, columns, depth, stages), registers, bytes of local and shared\n"
        "memory, and blocks that a multiprocessor holds. RuntimeError without a GPU, or in a build without CUDA.");
}
