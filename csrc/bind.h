// The parts of the Python module, and what they share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "product.h"
#include "rows.h"

namespace lockstep {

void bind_product(nanobind::module_& m);
void bind_rows(nanobind::module_& m);
void bind_packed(nanobind::module_& m);  // PackedWeight, of packed.h
void bind_decoder(nanobind::module_& m);

// The functions of a named instruction set. Raises ValueError for a name that this build or this processor lacks.
const ProductKernels& products_named(const std::string& instruction_set);
const RowKernels& rows_named(const std::string& instruction_set);

}  // namespace lockstep
