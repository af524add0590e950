#include "rows.h"

namespace lockstep {
namespace {

#include "rows_types.h"
#include "rows_lanes_scalar.inc"

struct FloatProduct;
using BF16Product = FloatProduct;

#include "rows.inc"

constexpr RowKernels kKernels = kernels_named("scalar");

}  // namespace

const RowKernels* rows_scalar() { return &kKernels; }

}  // namespace lockstep
