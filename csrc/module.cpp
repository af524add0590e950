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

// The table of this name that the processor can run: a caller may ask for a poorer one, never for a richer one.
template <class Table>
const Table& named(const std::string& name, std::initializer_list<const Table*> tables) {
  static const std::vector<std::string> usable = usable_instruction_sets(processor_features());
  if (std::find(usable.begin(), usable.end(), name) != usable.end()) {
    for (const Table* table : tables) {
      if (table != nullptr && name == table->name) return *table;
    }
  }
  throw std::invalid_argument("this build or this processor has no instruction set " + name);
}

}  // namespace

const ProductKernels& products_named(const std::string& instruction_set) {
  return named(instruction_set,
               {product_scalar(), product_avx2(), product_avx512(), product_avx512_bf16(), product_neon()});
}

const RowKernels& rows_named(const std::string& instruction_set) {
  return named(instruction_set, {rows_scalar(), rows_avx2(), rows_avx512(), rows_avx512_bf16(), rows_neon()});
}

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
