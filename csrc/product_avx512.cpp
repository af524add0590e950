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

#include <cstddef>

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

// Two vectors of four 128-bit lanes become one: each step halves what is left of every input, and its lanes lie
// beside its neighbour's. After four steps lane i is all of input i.
template <class Combine>
inline __m512i halves_32(__m512i a, __m512i b, const Combine& combine) {
  return combine(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
template <class Combine>
inline __m512i halves_64(__m512i a, __m512i b, const Combine& combine) {
  return combine(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Lane i: the largest lane, unsigned, of input i.
inline __m512i largest_of_each(const __m512i (&inputs)[16]) {
  const auto larger = [](__m512i a, __m512i b) { return _mm512_max_epu32(a, b); };
  __m512i four[4];
  for (int i = 0; i < 4; ++i) {
    four[i] = halves_64(halves_32(inputs[4 * i], inputs[4 * i + 1], larger),
                        halves_32(inputs[4 * i + 2], inputs[4 * i + 3], larger), larger);
  }
  __m512i eight[2];
  for (int i = 0; i < 2; ++i) {
    eight[i] = larger(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x44),
                      _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xee));
  }
  return larger(_mm512_shuffle_i32x4(eight[0], eight[1], 0x88), _mm512_shuffle_i32x4(eight[0], eight[1], 0xdd));
}

// Lane i: the sums of the first and of the last 16 q of block i.
inline void sums_of_each(const Activations* blocks, __m512i& first, __m512i& last) {
  const auto sum = [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); };
  const auto q = [blocks](int b) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks[b].q)); };
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i fours[8];  // of two blocks, sums of four q
  for (int i = 0; i < 8; ++i) {
    const int b = i < 4 ? i : i + 4;
    fours[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones,
                                   _mm512_inserti64x4(_mm512_castsi256_si512(q(b)), q(b + 4), 1));
  }
  __m512i sums[2];
  for (int i = 0; i < 2; ++i) {
    sums[i] = halves_64(halves_32(fours[4 * i], fours[4 * i + 1], sum),
                        halves_32(fours[4 * i + 2], fours[4 * i + 3], sum), sum);
  }
  first = _mm512_shuffle_i32x4(sums[0], sums[1], 0x88);
  last = _mm512_shuffle_i32x4(sums[0], sums[1], 0xdd);
}

// Writes lane i of four vectors, one after the other, to `at` + i blocks.
inline void scatter_fours(uint8_t* at, __m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i low[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)};
  const __m512i high[2] = {_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)};
  const __m512i fours[4] = {_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                            _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
  for (int i = 0; i < 4; ++i) {
    const auto store = [&](int lane, __m128i value) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + (4 * lane + i) * sizeof(Activations)), value);
    };
    store(0, _mm512_castsi512_si128(fours[i]));
    store(1, _mm512_extracti32x4_epi32(fours[i], 1));
    store(2, _mm512_extracti32x4_epi32(fours[i], 2));
    store(3, _mm512_extracti32x4_epi32(fours[i], 3));
  }
}

// Sixteen whole blocks as `quantise` leaves them. What a block alone does one lane after the other, its largest
// magnitude, its sums and its scales, is done for all of them side by side.
inline void quantise_sixteen(const float* x, Activations* blocks) {
  __m512i largest_bits[16];
  for (int b = 0; b < 16; ++b) {
    const __m512 first = _mm512_abs_ps(_mm512_loadu_ps(x + b * kBlock));
    const __m512 last = _mm512_abs_ps(_mm512_loadu_ps(x + b * kBlock + 16));
    largest_bits[b] = _mm512_max_epu32(_mm512_castps_si512(first), _mm512_castps_si512(last));
  }
  const __m512 largest = _mm512_castsi512_ps(largest_of_each(largest_bits));
  // Also where it is NaN, which is not below.
  const __mmask16 counts = static_cast<__mmask16>(~_mm512_cmp_ps_mask(largest, _mm512_set1_ps(kTiny), _CMP_LT_OQ));
  alignas(64) float inverse[16];
  _mm512_store_ps(inverse, _mm512_maskz_div_ps(counts, _mm512_set1_ps(127.0f), largest));
  for (int b = 0; b < 16; ++b) {
    const __m512 factor = _mm512_set1_ps(inverse[b]);
    for (int half = 0; half < 2; ++half) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + b * kBlock + 16 * half), factor);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(blocks[b].q + 16 * half),
                       _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
    }
  }
  const __m512 scale = _mm512_maskz_div_ps(counts, largest, _mm512_set1_ps(127.0f));
  __m512i first, last;
  sums_of_each(blocks, first, last);
  const __m512i all = _mm512_add_epi32(first, last);
  const auto scaled = [scale](__m512i sum) {
    return _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum)));
  };
  static_assert(offsetof(Activations, scale) == 32 && offsetof(Activations, scaled_sum) == 48, "what is scattered");
  uint8_t* at = reinterpret_cast<uint8_t*>(blocks);
  scatter_fours(at + 32, _mm512_castps_si512(scale), all, first, last);
  scatter_fours(at + 48, scaled(all), scaled(first), scaled(last), _mm512_setzero_si512());
}

constexpr ProductKernels kKernels = {"avx512",
                                     float_row_bytes,
                                     prepare_floats<quantise, 16, quantise_sixteen>,
                                     multiply_weight<Packed, Plain>,
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
