#include "rows.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace lockstep {
namespace {

#include "rows_types.h"
#include "rows_lanes_avx2.inc"

struct FloatProduct;
using BF16Product = FloatProduct;

#include "rows.inc"

constexpr RowKernels kKernels = kernels_named("avx2");

}  // namespace

const RowKernels* rows_avx2() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {
const RowKernels* rows_avx2() { return nullptr; }
}  // namespace lockstep

#endif
