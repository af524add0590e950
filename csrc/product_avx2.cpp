// Products with AVX2: a register holds 8 outputs x 4 inputs, multiplied to 16-bit sums of two.
#include "product.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace lockstep {
namespace {

#include "product_common.inc"
#include "product_x86.inc"
#include "product_avx2.inc"

// Keeps a compiler from adding up a run as a tree: that needs more registers than there are.
inline void add_now(__m256i& sum) { __asm__("" : "+x"(sum)); }

// 8 sums of two products of 0..15 and -127..127 stay below 2^15.
template <int kRuns, int kRows>
struct RunSums<Store::kU4, kRuns, kRows> {
  static constexpr int kOffset = 0;

  static void multiply(const uint8_t* block, const Activations* const (&row)[kRows], int run,
                       __m256i (&sum)[kRows]) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i pairs[kRows];
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) pairs[r] = _mm256_setzero_si256();
    LOCKSTEP_UNROLL
    for (int i = 0; i < 8 / kRuns; ++i) {
      // Vectors 0, 4, 1, 5...: both nibbles of a byte after one load.
      const int v = kRuns == 1 ? i % 2 * 4 + i / 2 : run * 4 + i;
      const __m256i both = load_bytes(block + v % 4 * 64);
      const __m256i q = _mm256_and_si256(v < 4 ? both : _mm256_srli_epi16(both, 4), low);
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = _mm256_set1_epi32(load<int32_t>(row[r]->q + 4 * v));
        pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(q, x));
        add_now(pairs[r]);
      }
    }
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1)));
    }
  }
};

// q - 128 lies in -128..127: its magnitude is multiplied with x that takes its sign. Two products fit 16 bits.
template <int kRuns, int kRows>
struct RunSums<Store::kU8, kRuns, kRows> {
  static constexpr int kOffset = 128;

  static void multiply(const uint8_t* block, const Activations* const (&row)[kRows], int run,
                       __m256i (&sum)[kRows]) {
    LOCKSTEP_UNROLL
    for (int v = run * (8 / kRuns); v < (run + 1) * (8 / kRuns); ++v) {
      const __m256i q = _mm256_xor_si256(load_bytes(block + v * 64), _mm256_set1_epi8(-128));
      const __m256i magnitude = _mm256_abs_epi8(q);
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = _mm256_set1_epi32(load<int32_t>(row[r]->q + 4 * v));
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, q));
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        add_now(sum[r]);
      }
    }
  }
};

constexpr ProductKernels kKernels = {
    "avx2", float_row_bytes, prepare_floats<quantise>, multiply_weight<Packed, Plain>, gather, quantised_remainder};

}  // namespace

const ProductKernels* product_avx2() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_avx2() { return nullptr; }

}  // namespace lockstep

#endif
