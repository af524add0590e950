#include "rows.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>

namespace lockstep {
namespace {

#include "rows_types.h"
#include "rows_lanes_neon.inc"

struct FloatProduct;
using BF16Product = FloatProduct;

#include "rows.inc"

constexpr RowKernels kKernels = kernels_named("neon");

}  // namespace

const RowKernels* rows_neon() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {
const RowKernels* rows_neon() { return nullptr; }
}  // namespace lockstep

#endif
