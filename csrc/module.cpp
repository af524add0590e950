// The Python module lockstep.native._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "bind.h"
#include "features.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lockstep {
namespace {

// The set of this name that the processor can run: a caller may ask for a poorer one, never for a richer one.
const InstructionSet& usable(const std::string& name) {
  static const std::vector<std::string> names = usable_instruction_sets(processor_features());
  if (std::find(names.begin(), names.end(), name) != names.end()) return *instruction_set(name);
  throw std::invalid_argument("this build or this processor has no instruction set " + name);
}

}  // namespace

const ProductKernels& products_named(const std::string& instruction_set) {
  return *usable(instruction_set).products;
}

const RowKernels& rows_named(const std::string& instruction_set) { return *usable(instruction_set).rows; }

}  // namespace lockstep

NB_MODULE(_native, m) {
  m.doc() = "Kernels for processors, and what this processor has.";
  m.def("processor_features", lockstep::processor_features,
        "Instruction-set extensions that the processor has and the system lets it use.");
  m.def("usable_instruction_sets", lockstep::usable_instruction_sets, "features"_a,
        "Instruction sets of this build that these features suffice for, best first.");
  lockstep::bind_packed(m);
  lockstep::bind_product(m);
  lockstep::bind_rows(m);
  lockstep::bind_decoder(m);
}
