// Products with AMX: 16 rows times 16 outputs of a block at once. Fewer than 32 rows of quantised weights are
// product_avx512.cpp's, which adds up the same values in the same order: on a Xeon 17 rows took 0.73 of the time there,
// 32 rows 0.84 of it here.
#include "product.h"

// Clang's older name of __AMX_TILE__ lacks an underscore. int8 and bfloat16 come with it: see CMakeLists.txt's flags.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) &&                                                                         \
    (defined(LOCKSTEP_EMULATED_TILES) || defined(__AMX_TILE__) || defined(__AMXTILE__))

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
#include "tiles.inc"

inline int smaller(int a, int b) { return a < b ? a : b; }

// Quantised weights. Sums of a run are integers that the tiles leave in memory, 16 rows x 16 outputs; there they are
// scaled and added up in registers, a run behind the tiles.
template <Store kStore, bool kMinimum, int kRuns>
class Packed {
 public:
  // With at least kTileHeight rows.
  static void multiply(const Weight& weight, int first_group, int end_group, const uint8_t* rows, int num_rows,
                       int64_t row_stride, float* out, int64_t out_stride) {
    const TilesInUse tiles(shapes());
    alignas(64) uint8_t q[kChunkBlocks * kUnpackedBytes];
    const int offset = offset_of(weight);
    for (int group = first_group; group < end_group; ++group) {
      for (int first = 0; first < weight.num_blocks; first += kChunkBlocks) {
        const int num_blocks = smaller(kChunkBlocks, weight.num_blocks - first);
        const uint8_t* packed = weight.block(group, first);
        for (int b = 0; b < num_blocks; ++b) unpack(packed + b * kBlockBytes, offset, q + b * kUnpackedBytes);
        const Chunk chunk{packed, q, num_blocks, first == 0, offset - (kMinimum ? 0 : weight.zero)};
        for (int row = 0; row < num_rows; row += kTileHeight) {
          // The last tile begins earlier where rows are not a multiple, and keeps what it has of its own.
          const int top = smaller(row, num_rows - kTileHeight);
          const uint8_t* x = rows + top * row_stride + first * int64_t{sizeof(Activations)};
          add_chunk(chunk, x, row_stride, out + top * out_stride + group * kGroup, out_stride, row - top);
        }
      }
    }
  }

 private:
  enum { kSums, kX, kQ };
  static constexpr int kBlockBytes = packed_bytes<kStore, kMinimum, kRuns>();
  static constexpr int kUnpackedBytes = kBlock * kGroup, kRunBytes = kUnpackedBytes / kRuns;
  // 16 KiB of a group, which all rows pass while it is in the first-level cache.
  static constexpr int kChunkBlocks = 32;

  struct Chunk {
    const uint8_t* packed;  // for its scales
    const uint8_t* q;
    int num_blocks;
    bool is_first;       // of its group: sums begin at zero
    int32_t correction;  // times the sum of a row's inputs: what unpacking subtracted too much
  };
  using Sums = int32_t[kTileHeight][kGroup];

  static TileShapes shapes() {
    TileShapes shapes;
    shapes.set(kSums, kTileHeight, 64);
    shapes.set(kX, kTileHeight, kBlock / kRuns);
    shapes.set(kQ, kBlock / kRuns / 4, 64);
    return shapes;
  }

  // What is subtracted from each q so that it is a signed byte: the zero, where that suffices.
  static int offset_of(const Weight& weight) {
    if (kStore == Store::kU8) return 128;
    return !kMinimum && weight.zero >= 0 && weight.zero < 16 ? weight.zero : 0;
  }

  static void unpack(const uint8_t* packed, int offset, uint8_t* q) {
    const __m512i low = _mm512_set1_epi8(15), less = _mm512_set1_epi8(static_cast<char>(offset));
    for (int v = 0; v < 8; ++v) {
      __m512i values = load_bytes(packed + 64 * (kStore == Store::kU8 ? v : v % 4));
      if (kStore == Store::kU4) values = _mm512_and_si512(v < 4 ? values : _mm512_srli_epi16(values, 4), low);
      _mm512_storeu_si512(q + 64 * v, _mm512_sub_epi8(values, less));
    }
  }

  // Adds a chunk's products to the sums of 16 rows; those before `first_kept` are left as they are.
  static void add_chunk(const Chunk& chunk, const uint8_t* rows, int64_t row_stride, float* out, int64_t out_stride,
                        int first_kept) {
    alignas(64) Sums sums[2];
    __m512 acc[kTileHeight];
    LOCKSTEP_UNROLL
    for (int r = 0; r < kTileHeight; ++r) {
      acc[r] = chunk.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * out_stride);
    }
    const int num_runs = chunk.num_blocks * kRuns;
    multiply_run(chunk, rows, row_stride, 0, sums[0]);
    for (int run = 0; run < num_runs; ++run) {
      if (run + 1 < num_runs) multiply_run(chunk, rows, row_stride, run + 1, sums[(run + 1) % 2]);
      scale_run(chunk, rows, row_stride, run, sums[run % 2], acc);
    }
    LOCKSTEP_UNROLL
    for (int r = 0; r < kTileHeight; ++r) {
      if (r >= first_kept) _mm512_storeu_ps(out + r * out_stride, acc[r]);
    }
  }

  static void multiply_run(const Chunk& chunk, const uint8_t* rows, int64_t row_stride, int run, Sums& sums) {
    zero_tile<kSums>();
    load_tile<kX>(rows + run / kRuns * sizeof(Activations) + run % kRuns * (kBlock / kRuns), row_stride);
    load_tile<kQ>(chunk.q + run * kRunBytes, 64);
    add_byte_products<kSums, kX, kQ>();
    store_tile<kSums>(sums, 64);
  }

  static void scale_run(const Chunk& chunk, const uint8_t* rows, int64_t row_stride, int run, const Sums& sums,
                        __m512 (&acc)[kTileHeight]) {
    const int block = run / kRuns, at = sum_index<kRuns>(run % kRuns);
    const uint8_t* halves = chunk.packed + block * kBlockBytes + quantised_bytes<kStore>() + run % kRuns * kGroup * 2;
    const __m512 scale = load_halves(halves);
    [[maybe_unused]] const __m512 minimum = load_halves(kMinimum ? halves + kRuns * kGroup * 2 : halves);
    rows += block * sizeof(Activations);
    LOCKSTEP_UNROLL
    for (int r = 0; r < kTileHeight; ++r, rows += row_stride) {
      const auto* x = reinterpret_cast<const Activations*>(rows);
      __m512i sum = _mm512_load_si512(sums[r]);
      if (chunk.correction != 0) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(chunk.correction * x->sum[at]));
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x->scale));
      acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, acc[r]);
      if constexpr (kMinimum) acc[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x->scaled_sum[at]), acc[r]);
    }
  }

  static __m512 load_halves(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
};

// bfloat16 weights, as they are packed: up to 2 x 2 tiles of sums that pass all inputs.
class Pairs {
 public:
  static constexpr int kRowBlockBytes = kBlock * 2;

  static void multiply(const Weight& weight, int first_group, int end_group, const uint8_t* rows, int num_rows,
                       int64_t row_stride, float* out, int64_t out_stride) {
    const int height = smaller(num_rows, kTileHeight), last = num_rows - height;
    const TilesInUse tiles(shapes(height));
    for (int group = first_group; group < end_group; group += 2) {
      for (int row = 0; row < num_rows; row += 2 * kTileHeight) {
        // The last tile begins earlier where rows are not a multiple: some are computed twice, to the same bits.
        const int top[2] = {smaller(row, last), smaller(row + kTileHeight, last)};
        const Operands operands{{weight.block(group, 0), weight.block(smaller(group + 1, end_group - 1), 0)},
                                {rows + top[0] * row_stride, rows + top[1] * row_stride},
                                row_stride,
                                weight.num_blocks};
        float* const at[2] = {out + top[0] * out_stride + group * kGroup, out + top[1] * out_stride + group * kGroup};
        if (top[0] == top[1]) {
          group + 1 < end_group ? multiply<1, 2>(operands, at, out_stride) : multiply<1, 1>(operands, at, out_stride);
        } else {
          group + 1 < end_group ? multiply<2, 2>(operands, at, out_stride) : multiply<2, 1>(operands, at, out_stride);
        }
      }
    }
  }

 private:
  enum { kSums, kX = 4, kW = 6 };  // of 2 x 2, 2 and 2 tiles
  static constexpr int kBlockBytes = kGroup * kBlock * 2;

  struct Operands {
    const uint8_t* weights[2];
    const uint8_t* rows[2];
    int64_t row_stride;
    int num_blocks;
  };

  static TileShapes shapes(int height) {
    TileShapes shapes;
    for (int i = 0; i < 4; ++i) shapes.set(kSums + i, height, 64);
    for (int i = 0; i < 2; ++i) shapes.set(kX + i, height, kRowBlockBytes);
    for (int i = 0; i < 2; ++i) shapes.set(kW + i, kBlock / 2, 64);
    return shapes;
  }

  // Fetches the block that is read when memory has answered: few rows wait for it, many find it in the cache.
  static void fetch_ahead(const uint8_t* block) {
    LOCKSTEP_UNROLL
    for (int line = 0; line < kBlockBytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(block + 9216 + line), _MM_HINT_T0);
    }
  }

  template <int kTops, int kGroups>
  static void multiply(const Operands& operands, float* const (&out)[2], int64_t out_stride) {
    zero_tile<kSums>();
    if constexpr (kGroups == 2) zero_tile<kSums + 1>();
    if constexpr (kTops == 2) zero_tile<kSums + 2>();
    if constexpr (kTops == 2 && kGroups == 2) zero_tile<kSums + 3>();
    for (int b = 0; b < operands.num_blocks; ++b) {
      if constexpr (kTops == 1) {
        for (int g = 0; g < kGroups; ++g) fetch_ahead(operands.weights[g] + b * kBlockBytes);
      }
      load_tile<kW>(operands.weights[0] + b * kBlockBytes, 64);
      if constexpr (kGroups == 2) load_tile<kW + 1>(operands.weights[1] + b * kBlockBytes, 64);
      load_tile<kX>(operands.rows[0] + b * kRowBlockBytes, operands.row_stride);
      add_bf16_products<kSums, kX, kW>();
      if constexpr (kGroups == 2) add_bf16_products<kSums + 1, kX, kW + 1>();
      if constexpr (kTops == 1) continue;
      load_tile<kX + 1>(operands.rows[1] + b * kRowBlockBytes, operands.row_stride);
      add_bf16_products<kSums + 2, kX + 1, kW>();
      if constexpr (kGroups == 2) add_bf16_products<kSums + 3, kX + 1, kW + 1>();
    }
    const int64_t stride = out_stride * int64_t{sizeof(float)};
    store_tile<kSums>(out[0], stride);
    if constexpr (kGroups == 2) store_tile<kSums + 1>(out[0] + kGroup, stride);
    if constexpr (kTops == 2) store_tile<kSums + 2>(out[1], stride);
    if constexpr (kTops == 2 && kGroups == 2) store_tile<kSums + 3>(out[1] + kGroup, stride);
  }
};

template <class Format>
struct WithTiles {
  static constexpr Multiply* multiply = Format::multiply;
};

int64_t row_bytes(const Weight& weight) { return product_avx512_bf16()->row_bytes(weight); }

void prepare(const Weight& weight, const float* x, uint8_t* row) { product_avx512_bf16()->prepare(weight, x, row); }

void product(const Weight& weight, int first_group, int end_group, const uint8_t* rows, int num_rows, float* out,
             int64_t out_stride) {
  const bool is_quantised = weight.store != Store::kBF16;
  if (num_rows <= 0 || first_group >= end_group) return;
  if (is_quantised && num_rows < 2 * kTileHeight) {
    return product_avx512()->product(weight, first_group, end_group, rows, num_rows, out, out_stride);
  }
  multiply_weight<Packed, Pairs, WithTiles>(weight, first_group, end_group, rows, num_rows, out, out_stride);
}

constexpr ProductKernels kKernels = {"amx", row_bytes, prepare, product, gather, quantised_remainder};

}  // namespace

const ProductKernels* product_amx() { return &kKernels; }

}  // namespace lockstep

#else

namespace lockstep {

const ProductKernels* product_amx() { return nullptr; }

}  // namespace lockstep

#endif
