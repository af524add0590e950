#include "rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

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

// Products of bfloat16 pairs, summed in float32. Keys and values of a bfloat16 pool are exact, and so is a
// query in two parts, but for 2^-16 of it; weights are rounded.
struct BF16Product {
  using Value = uint32_t;
  using Operand = __m512bh;
  static constexpr int kDepth = 2;

  static Operand column(const Value* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static Operand broadcast(const Value* x) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*x)); }
  static Lanes add(Lanes sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }

  static void store_step(Value* to, const Lanes (&inputs)[kDepth]) {
    _mm512_storeu_si512(to, pairs(inputs[0], inputs[1]));
  }
  static bool store_rest(Value* to, const Lanes (&inputs)[kDepth]) {
    const __m512i kept = pairs(inputs[0], inputs[1]);
    const Lanes even = inputs[0] - _mm512_castsi512_ps(_mm512_slli_epi32(kept, 16));
    const Lanes odd = inputs[1] - _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32(-65536)));
    const __m512i rest = pairs(even, odd);
    _mm512_storeu_si512(to, rest);
    return _mm512_test_epi32_mask(rest, rest) != 0;
  }

  static void copy_key(const BF16* from, int head_dim, Value* to) {
    for (int d = 0; d < head_dim; d += 16) store_half(to + d / 2, load_half(from + d));
  }
  static void copy_values(const BF16* const (&from)[kDepth], int head_dim, Value* to) {
    for (int d = 0; d < head_dim; d += 16) {
      const __m512i even = _mm512_cvtepu16_epi32(load_half(from[0] + d));
      const __m512i odd = _mm512_cvtepu16_epi32(load_half(from[1] + d));
      _mm512_storeu_si512(to + d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }

 private:
  static __m512i pairs(Lanes even, Lanes odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};

#include "rows.inc"

constexpr RowKernels kKernels = kernels_named("avx512_bf16");

}  // namespace

const RowKernels* rows_avx512_bf16() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {
const RowKernels* rows_avx512_bf16() { return nullptr; }
}  // namespace lockstep

#endif
