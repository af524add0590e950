// Products in plain C++: what every processor can run.
#include "product.h"

namespace lockstep {
namespace {

#include "product_common.inc"

// One row times one group.
template <int kRows, int kGroups>
struct Sums {
  static_assert(kRows == 1 && kGroups == 1, "larger tiles bring nothing here");
  float lane[kGroup];

  Sums() {
    for (int i = 0; i < kGroup; ++i) lane[i] = 0.0f;
  }

  void store(const Tile& tile) const {
    for (int i = 0; i < kGroup; ++i) tile.out[i] = lane[i];
  }
};

template <Store kStore, bool kMinimum, int kRuns>
struct Packed {
  static constexpr int kBlockBytes = packed_bytes<kStore, kMinimum, kRuns>();
  static constexpr int kTileRows = 1, kPanelGroups = 1, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    Sums<kRows, kGroups> sums;
    for (int b = 0; b < tile.num_blocks; ++b) {
      const uint8_t* block = tile.weights + b * kBlockBytes;
      const Activations& row = reinterpret_cast<const Activations*>(tile.rows)[b];
      for (int run = 0; run < kRuns; ++run) multiply_run(block, row, run, tile.zero, sums.lane);
    }
    sums.store(tile);
  }

  static void multiply_run(const uint8_t* block, const Activations& row, int run, int32_t zero, float* acc) {
    constexpr int kInputs = kBlock / kRuns;
    const int at = sum_index<kRuns>(run);
    const uint8_t* halves = block + quantised_bytes<kStore>() + run * kGroup * 2;
    for (int lane = 0; lane < kGroup; ++lane, halves += 2) {
      int32_t sum = kMinimum ? 0 : -zero * row.sum[at];
      for (int i = run * kInputs; i < (run + 1) * kInputs; ++i) {
        sum += stored_q(kStore, block, lane, i) * row.q[i];
      }
      acc[lane] += static_cast<float>(sum) * (half_value(load<uint16_t>(halves)) * row.scale);
      if (kMinimum) acc[lane] += half_value(load<uint16_t>(halves + kRuns * kGroup * 2)) * row.scaled_sum[at];
    }
  }
};

struct Plain {
  static constexpr int kRowBlockBytes = kBlock * 4;
  static constexpr int kTileRows = 1, kPanelGroups = 1, kRowsAlone = 0;

  template <int kRows, int kGroups>
  static void tile(const Tile& tile) {
    Sums<kRows, kGroups> sums;
    for (int input = 0; input < tile.num_blocks * kBlock; ++input) {
      const uint8_t* weights = tile.weights + input / 2 * 64 + input % 2 * 2;
      const float x = load<float>(tile.rows + 4 * input);
      for (int lane = 0; lane < kGroup; ++lane) {
        sums.lane[lane] += bf16_value(load<uint16_t>(weights + 4 * lane)) * x;
      }
    }
    sums.store(tile);
  }
};

constexpr ProductKernels kKernels = {"scalar",
                                     float_row_bytes,
                                     prepare_floats<quantise_block>,
                                     multiply_weight<Packed, Plain>,
                                     gather,
                                     quantised_remainder};

}  // namespace

const ProductKernels* product_scalar() { return &kKernels; }

}  // namespace lockstep
