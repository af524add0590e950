#include "rows.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of registers that its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

namespace lockstep {
namespace {

#include "rows_types.h"
#include "rows_lanes_avx512.inc"

struct FloatProduct;
using BF16Product = FloatProduct;

#include "rows.inc"

constexpr RowKernels kKernels = kernels_named("avx512");

}  // namespace

const RowKernels* rows_avx512() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {
const RowKernels* rows_avx512() { return nullptr; }
}  // namespace lockstep

#endif
