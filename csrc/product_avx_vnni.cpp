// Products with AVX2 and the VNNI of processors that lack AVX-512: a register holds 8 outputs x 4 inputs, added into 8
// sums at once.
#include "product.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)

#include <immintrin.h>

namespace lockstep {
namespace {

#include "product_common.inc"
#include "product_x86.inc"
#include "product_avx2.inc"

template <Store kStore, int kRuns, int kRows>
struct RunSums {
  static constexpr int kOffset = 0;

  static void multiply(const uint8_t* block, const Activations* const (&row)[kRows], int run,
                       __m256i (&sum)[kRows]) {
    constexpr int kVectors = 8 / kRuns;
    LOCKSTEP_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      // Vectors 0, 4, 1, 5...: both nibbles of a byte after one load.
      const int v = kRuns == 1 ? i % 2 * 4 + i / 2 : run * kVectors + i;
      const __m256i q = load_q(block, v);
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = _mm256_set1_epi32(load<int32_t>(row[r]->q + 4 * v));
        sum[r] = _mm256_dpbusd_avx_epi32(sum[r], q, x);
      }
    }
  }

 private:
  static __m256i load_q(const uint8_t* block, int v) {
    if constexpr (kStore == Store::kU8) return load_bytes(block + 64 * v);
    const __m256i both = load_bytes(block + 64 * (v % 4));
    return _mm256_and_si256(v < 4 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
  }
};

constexpr ProductKernels kKernels = {"avx_vnni", float_row_bytes, prepare_floats<quantise>,
                                     multiply_weight<Packed, Plain>, gather, quantised_remainder};

}  // namespace

const ProductKernels* product_avx_vnni() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_avx_vnni() { return nullptr; }

}  // namespace lockstep

#endif
