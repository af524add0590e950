// Products with NEON and its dot products: a register holds 4 outputs x 4 inputs, added into 4 sums.
#include "product.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

namespace lockstep {
namespace {

#include "product_common.inc"

constexpr int kQuarters = 4;  // registers of outputs in a group

inline float32x4_t load_halves(const uint8_t* at) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))); }

template <int kRows>
inline void clear(float32x4_t (&acc)[kRows][kQuarters]) {
  LOCKSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LOCKSTEP_UNROLL
    for (int quarter = 0; quarter < kQuarters; ++quarter) acc[r][quarter] = vdupq_n_f32(0);
  }
}

template <int kRows>
inline void store_sums(const Tile& tile, const float32x4_t (&acc)[kRows][kQuarters]) {
  LOCKSTEP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LOCKSTEP_UNROLL
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      vst1q_f32(tile.out + r * tile.out_stride + quarter * 4, acc[r][quarter]);
    }
  }
}

// q, less kOffset, as signed bytes: vector `i` of the first or last 16 inputs, from a quarter's first byte.
template <Store kStore>
inline int8x16_t load_q(const uint8_t* block, bool last, int i) {
  if constexpr (kStore == Store::kU8) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(block + (last ? 4 + i : i) * 64), vdupq_n_u8(128)));
  }
  const uint8x16_t both = vld1q_u8(block + i * 64);
  return vreinterpretq_s8_u8(last ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15)));
}

template <Store kStore, bool kMinimum, int kRuns>
struct Packed {
  static constexpr int kBlockBytes = packed_bytes<kStore, kMinimum, kRuns>();
  static constexpr int kOffset = kStore == Store::kU8 ? 128 : 0;  // what load_q subtracts
  static constexpr int kTileRows = 4, kPanelGroups = 1, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    float32x4_t acc[kRows][kQuarters];
    clear(acc);
    for (int b = 0; b < tile.num_blocks; ++b) {
      const uint8_t* block = tile.weights + b * kBlockBytes;
      const Activations* row[kRows];
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        row[r] = reinterpret_cast<const Activations*>(tile.rows + r * tile.row_stride) + b;
      }
      LOCKSTEP_UNROLL
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        multiply_quarter(block, quarter, row, tile.zero, acc);
      }
    }
    store_sums(tile, acc);
  }

 private:
  template <int kRows>
  static void multiply_quarter(const uint8_t* block, int quarter, const Activations* const (&row)[kRows],
                               int32_t zero, float32x4_t (&acc)[kRows][kQuarters]) {
    int32x4_t sum[kRows];
    LOCKSTEP_UNROLL
    for (int run = 0; run < kRuns; ++run) {
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = vdupq_n_s32((kOffset - (kMinimum ? 0 : zero)) * row[r]->sum[sum_index<kRuns>(run)]);
      }
      if (kRuns == 1 || run == 0) add_products(block + quarter * 16, false, row, sum);
      if (kRuns == 1 || run == 1) add_products(block + quarter * 16, true, row, sum);
      add_run(block, quarter, row, run, sum, acc);
    }
  }

  // Products of the first or last 16 inputs.
  template <int kRows>
  static void add_products(const uint8_t* block, bool last, const Activations* const (&row)[kRows],
                           int32x4_t (&sum)[kRows]) {
    const int8x16_t q0 = load_q<kStore>(block, last, 0), q1 = load_q<kStore>(block, last, 1);
    const int8x16_t q2 = load_q<kStore>(block, last, 2), q3 = load_q<kStore>(block, last, 3);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int8x16_t x = vld1q_s8(row[r]->q + (last ? 16 : 0));
      sum[r] = vdotq_laneq_s32(sum[r], q0, x, 0);
      sum[r] = vdotq_laneq_s32(sum[r], q1, x, 1);
      sum[r] = vdotq_laneq_s32(sum[r], q2, x, 2);
      sum[r] = vdotq_laneq_s32(sum[r], q3, x, 3);
    }
  }

  template <int kRows>
  static void add_run(const uint8_t* block, int quarter, const Activations* const (&row)[kRows], int run,
                      const int32x4_t (&sum)[kRows], float32x4_t (&acc)[kRows][kQuarters]) {
    const uint8_t* halves = block + quantised_bytes<kStore>() + run * kGroup * 2 + quarter * 8;
    const float32x4_t scale = load_halves(halves);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float32x4_t both = vmulq_n_f32(scale, row[r]->scale);
      acc[r][quarter] = vfmaq_f32(acc[r][quarter], vcvtq_f32_s32(sum[r]), both);
    }
    if constexpr (kMinimum) {
      const float32x4_t minimum = load_halves(halves + kRuns * kGroup * 2);
      LOCKSTEP_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float32x4_t scaled_sum = vdupq_n_f32(row[r]->scaled_sum[sum_index<kRuns>(run)]);
        acc[r][quarter] = vfmaq_f32(acc[r][quarter], minimum, scaled_sum);
      }
    }
  }
};

// bfloat16 weights as floats: each lane of 32 bits holds two inputs of one output.
struct Plain {
  static constexpr int kRowBlockBytes = kBlock * 4;
  static constexpr int kTileRows = 4, kPanelGroups = 1, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    float32x4_t acc[kRows][kQuarters];
    clear(acc);
    for (int pair = 0; pair < tile.num_blocks * kBlock / 2; ++pair) {
      LOCKSTEP_UNROLL
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(tile.weights + 64 * pair + quarter * 16));
        const float32x4_t first = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
        const float32x4_t second = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
        LOCKSTEP_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* x = tile.rows + r * tile.row_stride + 8 * pair;
          acc[r][quarter] = vfmaq_n_f32(acc[r][quarter], first, load<float>(x));
          acc[r][quarter] = vfmaq_n_f32(acc[r][quarter], second, load<float>(x + 4));
        }
      }
    }
    store_sums(tile, acc);
  }
};

constexpr ProductKernels kKernels = {"neon",
                                     float_row_bytes,
                                     prepare_floats<quantise_block>,
                                     multiply_weight<Packed, Plain>,
                                     gather,
                                     quantised_remainder};

}  // namespace

const ProductKernels* product_neon() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_neon() { return nullptr; }

}  // namespace lockstep

#endif
