// Products with constant weights: how a weight is packed, and the kernels that read it.
//
// Every instruction set gives one table of these functions; callers choose a table once. Nothing here knows threads:
// a caller hands out groups of outputs (or rows) as it likes. The order of the sums of an output depends on the
// instruction set and the weight alone, never on how many rows share a call or where they are cut, so a row's result
// is the same bits in any company.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lockstep {

constexpr int kGroup = 16;  // outputs that are interleaved: one 512-bit register of 32-bit lanes
constexpr int kBlock = 32;  // inputs that share a block

enum class Store : uint8_t {
  kU4,    // q in 0..15, two inputs a byte
  kU8,    // q in 0..255
  kBF16,  // plain values
};

// A weight [outputs, inputs] in groups of 16 outputs x blocks of 32 inputs; block b of group g lies at
// data + (g * num_blocks + b) * block_bytes. Both sizes are padded with zeros that add nothing.
//
// value = scale * (q - zero), or scale * q + minimum where has_minimum. A block holds
//   kU4:   4 x 64 bytes; byte 4 * row + j of vector k has q[4 k + j] low and q[16 + 4 k + j] high
//   kU8:   8 x 64 bytes; byte 4 * row + j of vector k is q[4 k + j]
//   kBF16: 16 x 64 bytes; bfloat16 2 * row + j of vector k is w[2 k + j]; no scales
// then, for each run of scale_inputs (16 or 32) inputs, float16[16] scales; then, where has_minimum, as many minima.
struct Weight {
  Store store;
  bool has_minimum;
  int32_t scale_inputs;
  int32_t zero;
  int32_t num_outputs, num_inputs;
  int32_t num_groups, num_blocks;
  int64_t block_bytes;
  const uint8_t* data;  // 64-byte aligned

  const uint8_t* block(int group, int index) const {
    return data + (static_cast<int64_t>(group) * num_blocks + index) * block_bytes;
  }
};

struct ProductKernels {
  const char* name;  // of the instruction set

  // Bytes of one prepared row of activations for this weight's store and number of inputs; a multiple of 64.
  int64_t (*row_bytes)(const Weight& weight);

  // Turns num_inputs floats into the form that `product` reads: for kU4 and kU8 int8 with one float scale per block
  // (round to nearest even, within +-127; a block of zeros has scale 0) and the integer sums that `zero` and minima
  // need; for kBF16 bfloat16, or float where the instruction set has no bfloat16 product.
  // Weights of one class (quantised, bfloat16) and equal num_inputs accept each other's rows.
  void (*prepare)(const Weight& weight, const float* x, uint8_t* row);

  // out[r * out_stride + 16 * g + lane] = sum over inputs, for rows [0, num_rows) that lie row_bytes apart and groups
  // [first_group, end_group). All 16 lanes of a group are written: rows of `out` are padded.
  void (*product)(const Weight& weight, int first_group, int end_group, const uint8_t* rows, int num_rows, float* out,
                  int64_t out_stride);

  // One output's weights as num_inputs floats: the embedding that is tied to a head.
  void (*gather)(const Weight& weight, int output, float* values);

  // What rounding took from num_inputs floats: x less what its prepared row of kU4 or kU8 stands for.
  void (*remainder)(const Weight& weight, const float* x, const uint8_t* row, float* values);
};

// Null when this build does not have the instruction set at all.
const ProductKernels* product_scalar();
const ProductKernels* product_avx2();
const ProductKernels* product_avx_vnni();     // AVX2 and the 256-bit VNNI
const ProductKernels* product_avx512();       // F, BW, DQ, VL, VNNI
const ProductKernels* product_avx512_bf16();  // the same and BF16
const ProductKernels* product_amx();          // the same and tiles of int8 and bfloat16
const ProductKernels* product_neon();

// Bytes of a packed weight, and packing: q [outputs, inputs] (row after row), scale and minimum
// [outputs, inputs / scale_inputs] as float32, minimum null where the format has none. `weight` names everything but
// data, num_groups, num_blocks and block_bytes, which `shape_weight` fills in. Groups [first_group, end_group) are
// written, so that several threads may share the work.
void shape_weight(Weight& weight);
int64_t weight_bytes(const Weight& weight);
void pack_quantised(const Weight& weight, const uint8_t* q, const float* scale, const float* minimum, int first_group,
                    int end_group, uint8_t* data);
void pack_bf16(const Weight& weight, const uint16_t* values, int first_group, int end_group, uint8_t* data);

}  // namespace lockstep
