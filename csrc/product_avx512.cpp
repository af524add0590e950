// Products with AVX-512 (F, BW, DQ, VL, VNNI): a register holds 16 outputs x 4 inputs, added into 16 sums.
#include "product.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)

// gcc 12 warns of registers that its own header leaves undefined on purpose.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

namespace lockstep {
namespace {

#include "product_common.inc"
#include "product_x86.inc"
#include "product_avx512.inc"

inline __m512 load_halves(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

// Vector v of a packed block: inputs [4 v, 4 v + 4) of 16 outputs.
template <Store kStore>
inline __m512i load_q(const uint8_t* block, int v) {
  if constexpr (kStore == Store::kU8) return load_bytes(block + 64 * v);
  const __m512i both = load_bytes(block + 64 * (v % 4));
  const __m512i low = _mm512_set1_epi8(15);
  return _mm512_and_si512(v < 4 ? both : _mm512_srli_epi16(both, 4), low);
}

// One block of a group times one run of each row. `Format` reads blocks: load_q, load_scale, load_minimum.
template <class Format, int kRows, int kGroups>
inline void multiply_run(const uint8_t* const (&block)[kGroups], const Activations* const (&row)[kRows],
                         int run, __m512i zero, __m512 (&acc)[kRows][kGroups]) {
  constexpr int kVectors = 8 / Format::kRuns;
  const int at = sum_index<Format::kRuns>(run);
  __m512i sum[kRows][kGroups];
  LOCKSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const __m512i start = Format::kMinimum ? _mm512_setzero_si512()
                                           : _mm512_mullo_epi32(zero, _mm512_set1_epi32(row[r]->sum[at]));
    LOCKSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) sum[r][g] = start;
  }
  LOCKSTEP_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    // Vectors 0, 4, 1, 5...: both nibbles of a byte after one load.
    const int v = Format::kRuns == 1 ? i % 2 * 4 + i / 2 : run * kVectors + i;
    __m512i q[kGroups];
    LOCKSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) q[g] = Format::load_q(block[g], v);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = _mm512_set1_epi32(load<int32_t>(row[r]->q + 4 * v));
      LOCKSTEP_UNROLL
      for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_dpbusd_epi32(sum[r][g], q[g], x);
    }
  }
  LOCKSTEP_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const __m512 scale = Format::load_scale(block[g], run);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(row[r]->scale));
      acc[r][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][g]), both, acc[r][g]);
    }
    if constexpr (Format::kMinimum) {
      const __m512 minimum = Format::load_minimum(block[g], run);
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        acc[r][g] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(row[r]->scaled_sum[at]), acc[r][g]);
      }
    }
  }
}

template <class Format, int kRows, int kGroups>
inline void multiply_tile(const Tile& tile) {
  __m512 acc[kRows][kGroups];
  clear(acc);
  const __m512i zero = _mm512_set1_epi32(-tile.zero);
  for (int b = 0; b < tile.num_blocks; ++b) {
    const uint8_t* block[kGroups];
    const Activations* row[kRows];
    LOCKSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) block[g] = tile.weights + g * tile.group_stride + b * Format::kBlockBytes;
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row[r] = reinterpret_cast<const Activations*>(tile.rows + r * tile.row_stride) + b;
    }
    prefetch<Format::kBlockBytes>(tile, block);
    LOCKSTEP_UNROLL
    for (int run = 0; run < Format::kRuns; ++run) multiply_run<Format>(block, row, run, zero, acc);
  }
  store_sums(tile, acc);
}

// Blocks as they are packed.
template <Store kStore, bool kMinimum_, int kRuns_>
struct Packed {
  static constexpr bool kMinimum = kMinimum_;
  static constexpr int kRuns = kRuns_;
  static constexpr int kBlockBytes = packed_bytes<kStore, kMinimum, kRuns>();
  static constexpr int kTileRows = 4, kPanelGroups = 3, kRowsAlone = kStore == Store::kU4 ? 3 : 4;

  static __m512i load_q(const uint8_t* block, int v) { return lockstep::load_q<kStore>(block, v); }
  static __m512 load_scale(const uint8_t* block, int run) {
    return load_halves(block + quantised_bytes<kStore>() + 32 * run);
  }
  static __m512 load_minimum(const uint8_t* block, int run) { return load_scale(block, kRuns + run); }

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    multiply_tile<Packed, kRows, kGroups>(tile);
  }
};

// bfloat16 weights as floats: each lane of 32 bits holds two inputs of one output.
struct Plain {
  static constexpr int kRowBlockBytes = kBlock * 4;
  // One group alone would wait for each sum before it adds to it.
  static constexpr int kTileRows = 4, kPanelGroups = 3, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    __m512 acc[kRows][kGroups];
    clear(acc);
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    for (int pair = 0; pair < tile.num_blocks * kBlock / 2; ++pair) {
      __m512 first[kGroups], second[kGroups];
      LOCKSTEP_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const __m512i both = load_bytes(tile.weights + g * tile.group_stride + 64 * pair);
        first[g] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        second[g] = _mm512_castsi512_ps(_mm512_and_si512(both, high));
      }
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* x = tile.rows + r * tile.row_stride + 8 * pair;
        const __m512 x0 = _mm512_set1_ps(load<float>(x)), x1 = _mm512_set1_ps(load<float>(x + 4));
        LOCKSTEP_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          acc[r][g] = _mm512_fmadd_ps(second[g], x1, _mm512_fmadd_ps(first[g], x0, acc[r][g]));
        }
      }
    }
    store_sums(tile, acc);
  }
};

inline void quantise(const float* x, int num_inputs, Activations& block) {
  const __mmask32 exists = static_cast<__mmask32>((uint64_t{1} << num_inputs) - 1);
  const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(exists), x);
  const __m512 last = _mm512_maskz_loadu_ps(static_cast<__mmask16>(exists >> 16), x + 16);
  // As integers, so that NaN is the largest.
  const __m512i largest_bits =
      _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(first)), _mm512_castps_si512(_mm512_abs_ps(last)));
  const uint32_t bits = largest_of(
      _mm256_max_epu32(_mm512_castsi512_si256(largest_bits), _mm512_extracti64x4_epi64(largest_bits, 1)));
  const float largest = load<float>(&bits);
  const __m512 inverse = _mm512_set1_ps(inverse_scale(largest));
  const __m128i first_q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(first, inverse)));
  const __m128i last_q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(last, inverse)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(block.q), first_q);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(block.q + 16), last_q);
  finish_block(block, largest, sum_of_bytes(first_q), sum_of_bytes(last_q));
}

constexpr ProductKernels kKernels = {"avx512",
                                     float_row_bytes,
                                     prepare_floats<quantise>,
                                     multiply_weight<Packed, Plain>,
                                     no_scratch_bytes,
                                     gather,
                                     quantised_remainder};

}  // namespace

const ProductKernels* product_avx512() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_avx512() { return nullptr; }

}  // namespace lockstep

#endif
