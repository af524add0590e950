// Products with AVX2: a register holds 8 outputs x 4 inputs, multiplied to 16-bit sums of two.
#include "product.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace lockstep {
namespace {

#include "product_common.inc"
#include "product_x86.inc"

constexpr int kHalf = kGroup / 2;  // outputs of a register

inline __m256i load_bytes(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

inline __m256 load_halves(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// Fetches the block that is read when memory has answered.
template <int kBytes>
inline void prefetch(const uint8_t* block) {
  LOCKSTEP_UNROLL
  for (int line = 0; line < kBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block + 9216 + line), _MM_HINT_T0);
  }
}

template <int kRows, int kHalves>
inline void clear(__m256 (&acc)[kRows][kHalves]) {
  LOCKSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LOCKSTEP_UNROLL
    for (int h = 0; h < kHalves; ++h) acc[r][h] = _mm256_setzero_ps();
  }
}

template <int kRows, int kHalves>
inline void store_sums(const Tile& tile, int first, const __m256 (&acc)[kRows][kHalves]) {
  LOCKSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LOCKSTEP_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      _mm256_storeu_ps(tile.out + r * tile.out_stride + (first + h) * kHalf, acc[r][h]);
    }
  }
}

// Keeps a compiler from adding up a run as a tree: that needs more registers than there are.
inline void add_now(__m256i& sum) { __asm__("" : "+x"(sum)); }

// Sums of q * x of one run, for 8 outputs and each row. `block` is the first of the half's bytes.
template <Store kStore, int kRuns, int kRows>
struct RunSums;

// 8 sums of two products of 0..15 and -127..127 stay below 2^15.
template <int kRuns, int kRows>
struct RunSums<Store::kU4, kRuns, kRows> {
  static constexpr int kOffset = 0;  // what is subtracted from each q

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

template <Store kStore, bool kMinimum, int kRuns>
struct Packed {
  static constexpr int kBlockBytes = packed_bytes<kStore, kMinimum, kRuns>();
  static constexpr int kTileRows = 4, kPanelGroups = 1, kRowsAlone = 0;

  // One register of outputs after the other: the second finds the group in the cache, and more rows fit the
  // registers.
  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    multiply_half<kRows, true>(tile, 0);
    multiply_half<kRows, false>(tile, 1);
  }

 private:
  template <int kRows, bool kFirst>
  static void multiply_half(const Tile& tile, int which) {
    __m256 acc[kRows][1];
    clear(acc);
    for (int b = 0; b < tile.num_blocks; ++b) {
      const uint8_t* block = tile.weights + b * kBlockBytes;
      const Activations* row[kRows];
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        row[r] = reinterpret_cast<const Activations*>(tile.rows + r * tile.row_stride) + b;
      }
      if constexpr (kFirst) prefetch<kBlockBytes>(block);
      LOCKSTEP_UNROLL
      for (int run = 0; run < kRuns; ++run) multiply_run(block, which, row, run, tile.zero, acc);
    }
    store_sums(tile, which, acc);
  }

  template <int kRows>
  static void multiply_run(const uint8_t* block, int which, const Activations* const (&row)[kRows], int run,
                           int32_t zero, __m256 (&acc)[kRows][1]) {
    using Sums = RunSums<kStore, kRuns, kRows>;
    const int at = sum_index<kRuns>(run);
    const uint8_t* halves = block + quantised_bytes<kStore>() + (run * kGroup + which * kHalf) * 2;
    const __m256i offset = _mm256_set1_epi32(Sums::kOffset - (kMinimum ? 0 : zero));
    __m256i sum[kRows];
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const bool starts_at_zero = kMinimum && Sums::kOffset == 0;
      sum[r] = starts_at_zero ? _mm256_setzero_si256()
                              : _mm256_mullo_epi32(offset, _mm256_set1_epi32(row[r]->sum[at]));
    }
    Sums::multiply(block + which * 32, row, run, sum);
    const __m256 scale = load_halves(halves);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(row[r]->scale));
      acc[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), both, acc[r][0]);
    }
    if constexpr (kMinimum) {
      const __m256 minimum = load_halves(halves + kRuns * kGroup * 2);
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        acc[r][0] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(row[r]->scaled_sum[at]), acc[r][0]);
      }
    }
  }
};

// bfloat16 weights as floats: each lane of 32 bits holds two inputs of one output.
struct Plain {
  static constexpr int kRowBlockBytes = kBlock * 4;
  // One group alone would wait for each sum before it adds to it.
  static constexpr int kTileRows = 3, kPanelGroups = 2, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    constexpr int kHalves = 2 * kGroups;
    __m256 acc[kRows][kHalves];
    clear(acc);
    for (int pair = 0; pair < tile.num_blocks * kBlock / 2; ++pair) {
      LOCKSTEP_UNROLL
      for (int h = 0; h < kHalves; ++h) {
        const uint8_t* weights = tile.weights + h / 2 * tile.group_stride + 64 * pair + h % 2 * 32;
        const __m256i both = load_bytes(weights);
        const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        const __m256 second = _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_setzero_si256(), both, 0xaa));
        LOCKSTEP_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* x = tile.rows + r * tile.row_stride + 8 * pair;
          acc[r][h] = _mm256_fmadd_ps(first, _mm256_set1_ps(load<float>(x)), acc[r][h]);
          acc[r][h] = _mm256_fmadd_ps(second, _mm256_set1_ps(load<float>(x + 4)), acc[r][h]);
        }
      }
    }
    store_sums(tile, 0, acc);
  }
};

inline void quantise(const float* x, int num_inputs, Activations& block) {
  if (num_inputs < kBlock) return quantise_block(x, num_inputs, block);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256 values[4];
  __m256i q[4], largest_bits = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    values[i] = _mm256_loadu_ps(x + 8 * i);
    // As integers, so that NaN is the largest.
    largest_bits = _mm256_max_epu32(largest_bits, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude));
  }
  const uint32_t bits = largest_of(largest_bits);
  const float largest = load<float>(&bits);
  const __m256 inverse = _mm256_set1_ps(inverse_scale(largest));
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
  // Packing keeps to 128-bit halves: the permutation brings their runs of four back into order.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(packed, order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.q), bytes);
  finish_block(block, largest, sum_of_bytes(_mm256_castsi256_si128(bytes)),
               sum_of_bytes(_mm256_extracti128_si256(bytes, 1)));
}

constexpr ProductKernels kKernels = {
    "avx2",           float_row_bytes, prepare_floats<quantise>, multiply_weight<Packed, Plain>,
    no_scratch_bytes, gather,          quantised_remainder};

}  // namespace

const ProductKernels* product_avx2() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_avx2() { return nullptr; }

}  // namespace lockstep

#endif
