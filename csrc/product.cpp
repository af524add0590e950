// How a weight is laid out and packed. Runs once, when a model is loaded.
#include "product.h"

#include <cstring>

namespace lockstep {
namespace {

int divide_up(int value, int by) { return (value + by - 1) / by; }

int quantised_bytes(Store store) { return kGroup * kBlock / (store == Store::kU4 ? 2 : 1); }

// Rounds to nearest even. Infinity where float16 has no value that large.
uint16_t half_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {
    // Adding one half moves the last bit that float16 keeps of such a small value to float32's last bit.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    uint32_t sum;
    std::memcpy(&sum, &magnitude, sizeof sum);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000));
  }
  const uint32_t is_odd = bits >> 13 & 1;
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + is_odd) >> 13));
}

uint32_t load_word(const uint8_t* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

// The outputs of one group that exist, and the inputs of one block that exist.
struct Part {
  int first_output, num_outputs;
  int first_input, num_inputs;

  Part(const Weight& weight, int group, int block)
      : first_output(group * kGroup),
        num_outputs(weight.num_outputs - first_output < kGroup ? weight.num_outputs - first_output : kGroup),
        first_input(block * kBlock),
        num_inputs(weight.num_inputs - first_input < kBlock ? weight.num_inputs - first_input : kBlock) {}
};

// A block's values, row after row, zeros where there are none.
template <class Value>
void copy_part(const Weight& weight, const Part& part, const Value* values, Value (&block)[kGroup][kBlock]) {
  std::memset(block, 0, sizeof block);
  for (int lane = 0; lane < part.num_outputs; ++lane) {
    const int64_t output = part.first_output + lane;
    std::memcpy(block[lane], values + output * weight.num_inputs + part.first_input,
                static_cast<size_t>(part.num_inputs) * sizeof(Value));
  }
}

void pack_nibbles(const uint8_t (&q)[kGroup][kBlock], uint8_t* out) {
  for (int k = 0; k < 4; ++k) {
    for (int lane = 0; lane < kGroup; ++lane, out += 4) {
      const uint32_t word = load_word(q[lane] + 4 * k) | load_word(q[lane] + 16 + 4 * k) << 4;
      std::memcpy(out, &word, sizeof word);
    }
  }
}

void pack_bytes(const uint8_t (&q)[kGroup][kBlock], uint8_t* out) {
  for (int k = 0; k < 8; ++k) {
    for (int lane = 0; lane < kGroup; ++lane, out += 4) std::memcpy(out, q[lane] + 4 * k, 4);
  }
}

// One half for each run of the block and each output, runs first.
void pack_halves(const Weight& weight, const Part& part, const float* values, uint8_t* out) {
  const int num_columns = divide_up(weight.num_inputs, weight.scale_inputs);
  for (int at = 0; at < kBlock; at += weight.scale_inputs) {
    for (int lane = 0; lane < kGroup; ++lane, out += 2) {
      const bool exists = lane < part.num_outputs && at < part.num_inputs;
      const int64_t output = part.first_output + lane;
      const int column = (part.first_input + at) / weight.scale_inputs;
      const uint16_t half = exists ? half_from_float(values[output * num_columns + column]) : uint16_t{0};
      std::memcpy(out, &half, sizeof half);
    }
  }
}

}  // namespace

void shape_weight(Weight& weight) {
  weight.num_groups = divide_up(weight.num_outputs, kGroup);
  weight.num_blocks = divide_up(weight.num_inputs, kBlock);
  if (weight.store == Store::kBF16) {
    weight.block_bytes = kGroup * kBlock * 2;
    return;
  }
  const int halves_bytes = kBlock / weight.scale_inputs * kGroup * 2;
  weight.block_bytes = quantised_bytes(weight.store) + halves_bytes * (weight.has_minimum ? 2 : 1);
}

int64_t weight_bytes(const Weight& weight) {
  return weight.block_bytes * weight.num_groups * weight.num_blocks;
}

void pack_quantised(const Weight& weight, const uint8_t* q, const float* scale, const float* minimum,
                    int first_group, int end_group, uint8_t* data) {
  const int halves_bytes = kBlock / weight.scale_inputs * kGroup * 2;
  uint8_t block[kGroup][kBlock];
  for (int group = first_group; group < end_group; ++group) {
    uint8_t* out = data + static_cast<int64_t>(group) * weight.num_blocks * weight.block_bytes;
    for (int index = 0; index < weight.num_blocks; ++index, out += weight.block_bytes) {
      const Part part(weight, group, index);
      copy_part(weight, part, q, block);
      uint8_t* halves = out + quantised_bytes(weight.store);
      weight.store == Store::kU4 ? pack_nibbles(block, out) : pack_bytes(block, out);
      pack_halves(weight, part, scale, halves);
      if (weight.has_minimum) pack_halves(weight, part, minimum, halves + halves_bytes);
    }
  }
}

void pack_bf16(const Weight& weight, const uint16_t* values, int first_group, int end_group, uint8_t* data) {
  uint16_t block[kGroup][kBlock];
  for (int group = first_group; group < end_group; ++group) {
    uint8_t* out = data + static_cast<int64_t>(group) * weight.num_blocks * weight.block_bytes;
    for (int index = 0; index < weight.num_blocks; ++index) {
      copy_part(weight, Part(weight, group, index), values, block);
      for (int k = 0; k < 16; ++k) {
        for (int lane = 0; lane < kGroup; ++lane, out += 4) std::memcpy(out, block[lane] + 2 * k, 4);
      }
    }
  }
}

}  // namespace lockstep
