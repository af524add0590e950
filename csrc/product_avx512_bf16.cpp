// Products with AVX-512 and its bfloat16 products: two inputs of 16 outputs at once. Quantised weights are
// product_avx512.cpp's.
#include "product.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BF16__)

// gcc 12 warns of registers that its own header leaves undefined on purpose.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

namespace lockstep {
namespace {

#include "product_common.inc"
#include "product_avx512.inc"

struct Pairs {
  static constexpr int kBlockBytes = kGroup * kBlock * 2, kRowBlockBytes = kBlock * 2;
  // One group alone would wait for each sum before it adds to it.
  static constexpr int kTileRows = 8, kPanelGroups = 3, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    __m512 acc[kRows][kGroups];
    clear(acc);
    for (int b = 0; b < tile.num_blocks; ++b) {
      const uint8_t* block[kGroups];
      const uint8_t* row[kRows];
      LOCKSTEP_UNROLL
      for (int g = 0; g < kGroups; ++g) block[g] = tile.weights + g * tile.group_stride + b * kBlockBytes;
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) row[r] = tile.rows + r * tile.row_stride + b * kRowBlockBytes;
      prefetch<kBlockBytes>(tile, block);
      for (int pair = 0; pair < kBlock / 2; ++pair) multiply_pair(block, row, pair, acc);
    }
    store_sums(tile, acc);
  }

 private:
  template <int kRows, int kGroups>
  static void multiply_pair(const uint8_t* const (&block)[kGroups], const uint8_t* const (&row)[kRows],
                            int pair, __m512 (&acc)[kRows][kGroups]) {
    __m512bh weights[kGroups];
    LOCKSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) weights[g] = (__m512bh)load_bytes(block[g] + 64 * pair);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(load<int32_t>(row[r] + 4 * pair));
      LOCKSTEP_UNROLL
      for (int g = 0; g < kGroups; ++g) acc[r][g] = _mm512_dpbf16_ps(acc[r][g], weights[g], x);
    }
  }
};

int64_t row_bytes(const Weight& weight) {
  const int64_t bytes = weight.store == Store::kBF16 ? int{Pairs::kRowBlockBytes} : int{sizeof(Activations)};
  return bytes * weight.num_blocks;
}

void prepare(const Weight& weight, const float* x, uint8_t* row) {
  if (weight.store != Store::kBF16) return product_avx512()->prepare(weight, x, row);
  for (int first = 0; first < weight.num_blocks * kBlock; first += 16) {
    const int left = weight.num_inputs - first;
    const __mmask16 exists = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(exists, x + first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + first * 2), (__m256i)values);
  }
}

void product(const Weight& weight, int first_group, int end_group, const uint8_t* rows, int num_rows,
             float* out, int64_t out_stride) {
  if (weight.store != Store::kBF16) {
    return product_avx512()->product(weight, first_group, end_group, rows, num_rows, out, out_stride);
  }
  multiply_panels<Pairs>(weight, first_group, end_group, rows, num_rows, row_bytes(weight), out, out_stride);
}

constexpr ProductKernels kKernels = {"avx512_bf16", row_bytes, prepare, product, gather, quantised_remainder};

}  // namespace

const ProductKernels* product_avx512_bf16() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_avx512_bf16() { return nullptr; }

}  // namespace lockstep

#endif
