// Every usable instruction set's products against plain double-precision code, over random shapes.
//
// Usage: test_product [seed]. Exits 1 and names the case when something is wrong.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../features.h"
#include "../product.h"

namespace lockstep {
namespace {

constexpr double kUnit = 1.0 / (1 << 24);  // half a unit in the last place of a float
constexpr float kUntouched = -12345.0f;

using Random = std::mt19937_64;

int uniform(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

float normal(Random& random) { return std::normal_distribution<float>()(random); }

// Memory that ends where it says, so that a sanitizer sees a read beyond it.
class Bytes {
 public:
  explicit Bytes(int64_t size)
      : memory_(static_cast<uint8_t*>(::operator new (static_cast<size_t>(size), std::align_val_t{64}))) {
    std::memset(memory_.get(), 0xaa, static_cast<size_t>(size));
  }
  uint8_t* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete (memory, std::align_val_t{64}); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
};

// A float with so few bits that float16 and bfloat16 hold it.
float short_float(Random& random, int exponent) {
  return std::ldexp(static_cast<float>(uniform(random, -255, 255)), exponent);
}

uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// A packed weight, and its parts as doubles.
struct Problem {
  Weight weight{};
  std::vector<double> scale, q_minus_zero, minimum;  // of each output and input; bfloat16 values as scales
  std::unique_ptr<Bytes> data;

  double value(int output, int input) const {
    const size_t at = static_cast<size_t>(output) * weight.num_inputs + input;
    return scale[at] * q_minus_zero[at] + minimum[at];
  }
  std::string name() const {
    static const char* const kStores[] = {"U4", "U8", "BF16"};
    return std::string(kStores[static_cast<int>(weight.store)]) + (weight.has_minimum ? " minimum" : "") +
           " runs of " + std::to_string(weight.scale_inputs) + ", zero " + std::to_string(weight.zero) + ", " +
           std::to_string(weight.num_outputs) + "x" + std::to_string(weight.num_inputs);
  }
};

void pack_in_two_parts(Problem& problem, const std::vector<uint8_t>& q, const std::vector<float>& scale,
                       const std::vector<float>& minimum) {
  const Weight& weight = problem.weight;
  const float* minima = weight.has_minimum ? minimum.data() : nullptr;
  const int cut = weight.num_groups / 2;
  pack_quantised(weight, q.data(), scale.data(), minima, cut, weight.num_groups, problem.data->data());
  pack_quantised(weight, q.data(), scale.data(), minima, 0, cut, problem.data->data());
}

Problem quantised_problem(Random& random, Weight shape) {
  Problem problem;
  problem.weight = shape;
  shape_weight(problem.weight);
  problem.data = std::make_unique<Bytes>(weight_bytes(problem.weight));
  problem.weight.data = problem.data->data();
  const int num_columns = (shape.num_inputs + shape.scale_inputs - 1) / shape.scale_inputs;
  const size_t num_values = static_cast<size_t>(shape.num_outputs) * shape.num_inputs;
  std::vector<float> scale(static_cast<size_t>(shape.num_outputs) * num_columns), minimum(scale.size());
  std::vector<uint8_t> q(num_values);
  for (float& each : scale) each = short_float(random, uniform(random, -24, -10));
  for (float& each : minimum) each = short_float(random, uniform(random, -18, -8));
  for (uint8_t& each : q) each = static_cast<uint8_t>(uniform(random, 0, shape.store == Store::kU4 ? 15 : 255));
  for (size_t at = 0; at < num_values; ++at) {
    const size_t input = at % static_cast<size_t>(shape.num_inputs), output = at / shape.num_inputs;
    const size_t column = output * num_columns + input / shape.scale_inputs;
    problem.scale.push_back(scale[column]);
    problem.q_minus_zero.push_back(q[at] - (shape.has_minimum ? 0 : shape.zero));
    problem.minimum.push_back(shape.has_minimum ? minimum[column] : 0.0);
  }
  pack_in_two_parts(problem, q, scale, minimum);
  return problem;
}

Problem bf16_problem(Random& random, Weight shape) {
  Problem problem;
  problem.weight = shape;
  shape_weight(problem.weight);
  problem.data = std::make_unique<Bytes>(weight_bytes(problem.weight));
  problem.weight.data = problem.data->data();
  std::vector<uint16_t> values;
  for (int at = 0; at < shape.num_outputs * shape.num_inputs; ++at) {
    const float value = short_float(random, -8);
    values.push_back(bf16_of(value));
    problem.scale.push_back(value);
  }
  problem.q_minus_zero.assign(values.size(), 1.0);
  problem.minimum.assign(values.size(), 0.0);
  const int cut = problem.weight.num_groups / 2;
  pack_bf16(problem.weight, values.data(), 0, cut, problem.data->data());
  pack_bf16(problem.weight, values.data(), cut, problem.weight.num_groups, problem.data->data());
  return problem;
}

class Checker {
 public:
  Checker(const ProductKernels& kernels, Random& random) : kernels_(kernels), random_(random) {}

  int failures() const { return failures_; }

  void check(const Problem& problem) {
    problem_ = &problem;
    check_gather();
    const int num_rows = uniform(random_, 0, 3) ? uniform(random_, 1, 9) : uniform(random_, 10, 40);
    check_values(exact_rows(num_rows), num_rows, 0);
    check_rows_of_all_sizes();
    check_not_finite(num_rows);
    if (problem.weight.store == Store::kBF16) return;
    const std::vector<float> x = normal_rows(num_rows);
    check_values(x, num_rows, 1.0 / 254);
    check_taken_twice(x, num_rows);
  }

 private:
  const Weight& weight() const { return problem_->weight; }
  int64_t out_stride() const { return weight().num_groups * kGroup + 5; }

  // Values that quantise without error: small integers times a power of two, the largest of each block 127.
  std::vector<float> exact_rows(int num_rows) {
    std::vector<float> x(static_cast<size_t>(num_rows) * weight().num_inputs);
    for (int row = 0; row < num_rows; ++row) {
      for (int first = 0; first < weight().num_inputs; first += kBlock) {
        const int count = std::min(kBlock, weight().num_inputs - first);
        const int exponent = uniform(random_, -12, 3);
        float* block = x.data() + static_cast<size_t>(row) * weight().num_inputs + first;
        const bool is_zero = uniform(random_, 0, 9) == 0;
        for (int i = 0; i < count; ++i) {
          block[i] = is_zero ? 0.0f : std::ldexp(static_cast<float>(uniform(random_, -127, 127)), exponent);
        }
        if (is_zero) continue;
        block[uniform(random_, 0, count - 1)] = std::ldexp(uniform(random_, 0, 1) ? 127.f : -127.f, exponent);
      }
    }
    return x;
  }

  std::vector<float> normal_rows(int num_rows) {
    std::vector<float> x(static_cast<size_t>(num_rows) * weight().num_inputs);
    for (float& each : x) each = normal(random_) * std::ldexp(1.0f, uniform(random_, -3, 3));
    return x;
  }

  Bytes prepared(const std::vector<float>& x, int num_rows) {
    const int64_t row_bytes = kernels_.row_bytes(weight());
    expect(row_bytes % 64 == 0, "bytes of a row");
    Bytes rows(row_bytes * num_rows);
    std::vector<float> row(static_cast<size_t>(weight().num_inputs));  // its end is known to a sanitizer
    for (int r = 0; r < num_rows; ++r) {
      std::memcpy(row.data(), x.data() + r * row.size(), row.size() * sizeof(float));
      kernels_.prepare(weight(), row.data(), rows.data() + r * row_bytes);
    }
    return rows;
  }

  void multiply(int first_group, int end_group, const uint8_t* rows, int num_rows, float* out) {
    kernels_.product(weight(), first_group, end_group, rows, num_rows, out, out_stride());
  }

  std::vector<float> product(const Bytes& rows, int num_rows) {
    std::vector<float> out(static_cast<size_t>(num_rows) * out_stride(), kUntouched);
    multiply(0, weight().num_groups, rows.data(), num_rows, out.data());
    return out;
  }

  // `rounding`: how much of its block's largest value each input may be off.
  void check_values(const std::vector<float>& x, int num_rows, double rounding) {
    const Bytes rows = prepared(x, num_rows);
    const std::vector<float> out = product(rows, num_rows);
    for (int row = 0; row < num_rows; ++row) {
      const float* values = out.data() + row * out_stride();
      for (int output = 0; output < weight().num_outputs; ++output) {
        check_value(values[output], x.data() + static_cast<size_t>(row) * weight().num_inputs, output,
                    rounding);
      }
      for (int lane = weight().num_outputs; lane < weight().num_groups * kGroup; ++lane) {
        expect(values[lane] == 0, "a padded output");
      }
      for (int64_t after = weight().num_groups * kGroup; after < out_stride(); ++after) {
        expect(values[after] == kUntouched, "memory after a row");
      }
    }
    check_company(rows, num_rows, out);
    check_rows(rows, x, num_rows);
  }

  void check_value(double found, const float* x, int output, double rounding) {
    double expected = 0, size = 0, rounded = 0;
    for (int first = 0; first < weight().num_inputs; first += kBlock) {
      const int end = std::min(first + kBlock, weight().num_inputs);
      double largest = 0, weights = 0;
      for (int i = first; i < end; ++i) {
        const double value = problem_->value(output, i);
        const size_t at = static_cast<size_t>(output) * weight().num_inputs + i;
        expected += value * x[i];
        size += (std::fabs(value) + std::fabs(problem_->minimum[at])) * std::fabs(x[i]);
        size += std::fabs(problem_->scale[at] * problem_->q_minus_zero[at] * x[i]);
        largest = std::max(largest, std::fabs(static_cast<double>(x[i])));
        weights += std::fabs(value);
      }
      rounded += weights * largest * rounding * (1 + 1e-5);
    }
    // One rounding of each sum so far, and of what is added.
    const int num_terms = weight().store == Store::kBF16 ? weight().num_inputs : 4 * weight().num_blocks;
    const double accepted = (num_terms + 4) * kUnit * size + rounded;
    expect(std::fabs(found - expected) <= accepted, "a product: %.9g, not %.9g within %.3g", found, expected,
           accepted);
  }

  // A second product with what rounding left makes 16 bits of the inputs' 8.
  void check_taken_twice(const std::vector<float>& x, int num_rows) {
    const Bytes rows = prepared(x, num_rows);
    std::vector<float> left(x.size());
    for (int row = 0; row < num_rows; ++row) {
      const size_t first = static_cast<size_t>(row) * weight().num_inputs;
      kernels_.remainder(weight(), x.data() + first, rows.data() + row * kernels_.row_bytes(weight()),
                         left.data() + first);
    }
    const std::vector<float> once = product(rows, num_rows),
                             again = product(prepared(left, num_rows), num_rows);
    for (int row = 0; row < num_rows; ++row) {
      for (int output = 0; output < weight().num_outputs; ++output) {
        const size_t at = static_cast<size_t>(row * out_stride() + output);
        const float* values = x.data() + static_cast<size_t>(row) * weight().num_inputs;
        check_value(static_cast<double>(once[at]) + again[at], values, output, 1.0 / 254 / 254);
      }
    }
  }

  // Each row alone and each group alone: the same bits.
  void check_company(const Bytes& rows, int num_rows, const std::vector<float>& out) {
    const int64_t row_bytes = kernels_.row_bytes(weight());
    std::vector<float> alone(out.size(), kUntouched);
    for (int row = 0; row < num_rows; ++row) {
      multiply(0, weight().num_groups, rows.data() + row * row_bytes, 1, alone.data() + row * out_stride());
    }
    expect(std::memcmp(alone.data(), out.data(), out.size() * sizeof(float)) == 0, "the bits of a row alone");
    alone.assign(out.size(), kUntouched);
    for (int group = 0; group < weight().num_groups;) {
      const int end = std::min(weight().num_groups, group + uniform(random_, 1, 4));
      multiply(group, end, rows.data(), num_rows, alone.data());
      group = end;
    }
    expect(std::memcmp(alone.data(), out.data(), out.size() * sizeof(float)) == 0, "the bits of groups alone");
  }

  // Prepared rows of quantised weights are one format for every instruction set.
  void check_rows(const Bytes& rows, const std::vector<float>& x, int num_rows) {
    const ProductKernels& scalar = *product_scalar();
    const int64_t row_bytes = kernels_.row_bytes(weight());
    if (weight().store == Store::kBF16) return;
    expect(row_bytes == scalar.row_bytes(weight()), "bytes of a row, next to scalar");
    Bytes row(row_bytes);
    for (int r = 0; r < num_rows; ++r) {
      scalar.prepare(weight(), x.data() + static_cast<size_t>(r) * weight().num_inputs, row.data());
      expect(std::memcmp(row.data(), rows.data() + r * row_bytes, static_cast<size_t>(row_bytes)) == 0,
             "a prepared row, next to scalar");
    }
  }

  // Blocks of nothing, of what is taken for it, and of very large and very small values, among others.
  void check_rows_of_all_sizes() {
    std::vector<float> x(static_cast<size_t>(weight().num_inputs));
    for (size_t i = 0; i < x.size(); ++i) {
      constexpr float kSizes[] = {1.0f, 0.0f, 1e-38f, 1e30f, 3e-36f, 1e-3f};
      x[i] = normal(random_) * kSizes[i / kBlock % 6];
    }
    check_rows(prepared(x, 1), x, 1);
  }

  void check_not_finite(int num_rows) {
    std::vector<float> x = exact_rows(num_rows);
    const std::vector<float> before = product(prepared(x, num_rows), num_rows);
    const int row = uniform(random_, 0, num_rows - 1), input = uniform(random_, 0, weight().num_inputs - 1);
    const bool is_nan = uniform(random_, 0, 1);
    x[static_cast<size_t>(row) * weight().num_inputs + input] =
        is_nan ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    const std::vector<float> out = product(prepared(x, num_rows), num_rows);
    for (int r = 0; r < num_rows; ++r) {
      for (int output = 0; output < weight().num_outputs; ++output) {
        const size_t at = static_cast<size_t>(r * out_stride() + output);
        if (r == row) expect(!std::isfinite(out[at]), "a value that is not finite became %g", out[at]);
        if (r != row) expect(out[at] == before[at], "a row next to one that is not finite");
      }
    }
  }

  void check_gather() {
    std::vector<float> values(static_cast<size_t>(weight().num_inputs));
    const int output = uniform(random_, 0, weight().num_outputs - 1);
    kernels_.gather(weight(), output, values.data());
    for (int input = 0; input < weight().num_inputs; ++input) {
      const size_t at = static_cast<size_t>(output) * weight().num_inputs + input;
      const double expected = problem_->value(output, input);
      const double size = std::fabs(expected) + std::fabs(problem_->scale[at] * problem_->q_minus_zero[at]);
      const double error = std::fabs(values[static_cast<size_t>(input)] - expected);
      expect(error <= kUnit * size, "a gathered value: %.9g, not %.9g", values[static_cast<size_t>(input)],
             expected);
    }
  }

  __attribute__((format(printf, 3, 4))) void expect(bool good, const char* what, ...) {
    if (good || ++failures_ > 20) return;
    std::printf("%s: %s: ", kernels_.name, problem_->name().c_str());
    va_list values;
    va_start(values, what);
    std::vprintf(what, values);
    va_end(values);
    std::printf("\n");
  }

  const ProductKernels& kernels_;
  Random& random_;
  const Problem* problem_ = nullptr;
  int failures_ = 0;
};

std::vector<Problem> problems(Random& random) {
  constexpr int kShapes[][2] = {{1, 1},    {16, 32},  {17, 31},   {48, 64},
                                {33, 100}, {50, 576}, {130, 544}, {97, 1100}};
  std::vector<Problem> found;
  for (const auto& shape : kShapes) {
    Weight weight{};
    weight.num_outputs = shape[0];
    weight.num_inputs = shape[1];
    for (const Store store : {Store::kU4, Store::kU8}) {
      for (const int scale_inputs : {16, 32}) {
        for (const bool has_minimum : {false, true}) {
          weight.store = store;
          weight.scale_inputs = scale_inputs;
          weight.has_minimum = has_minimum;
          weight.zero = has_minimum ? 0 : uniform(random, -2, store == Store::kU4 ? 17 : 255);
          found.push_back(quantised_problem(random, weight));
        }
      }
    }
    weight.store = Store::kBF16;
    weight.scale_inputs = kBlock;
    weight.has_minimum = false;
    weight.zero = 0;
    found.push_back(bf16_problem(random, weight));
  }
  return found;
}

// The value of a float16 that is not negative, by its definition.
double half_by_definition(int bits) {
  const int exponent = bits >> 10, fraction = bits & 1023;
  return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
}

// Scales are rounded to the nearest float16, to the even one of two: each float16 itself, what lies in the
// middle between it and the next, and what lies just beyond the middle.
int check_rounding_of_scales(const ProductKernels& kernels, Random& random) {
  constexpr int kLast = 0x7bff;
  int failures = 0;
  for (const int place : {0, 1, 2}) {
    std::vector<float> scale;
    std::vector<double> expected;
    for (int bits = 0; bits < kLast; ++bits) {
      const double sign = uniform(random, 0, 1) ? 1 : -1;
      const double low = half_by_definition(bits), high = half_by_definition(bits + 1);
      const float middle = static_cast<float>((low + high) / 2);
      const float beyond = std::nextafterf(middle, 1e9f);
      scale.push_back(static_cast<float>(sign) * (place == 0   ? static_cast<float>(low)
                                                  : place == 1 ? middle
                                                               : beyond));
      expected.push_back(sign * (place == 0 || (place == 1 && bits % 2 == 0) ? low : high));
    }
    Weight weight{};
    weight.store = Store::kU8;
    weight.scale_inputs = kBlock;
    weight.num_outputs = kLast;
    weight.num_inputs = 1;
    shape_weight(weight);
    const Bytes data(weight_bytes(weight));
    weight.data = data.data();
    const std::vector<uint8_t> ones(kLast, 1);
    pack_quantised(weight, ones.data(), scale.data(), nullptr, 0, weight.num_groups, data.data());
    for (int output = 0; output < kLast; ++output) {
      float found;
      kernels.gather(weight, output, &found);
      if (found == expected[static_cast<size_t>(output)] || ++failures > 5) continue;
      std::printf("%s: scale %.9g became %.9g\n", kernels.name, scale[static_cast<size_t>(output)], found);
    }
  }
  return failures;
}

int run(uint64_t seed) {
  Random random(seed);
  const std::vector<Problem> all = problems(random);
  int failures = 0;
  for (const std::string& name : usable_instruction_sets(processor_features())) {
    const ProductKernels& kernels = *instruction_set(name)->products;
    Checker checker(kernels, random);
    for (const Problem& problem : all) checker.check(problem);
    const int wrong = checker.failures() + check_rounding_of_scales(kernels, random);
    std::printf("%s: %zu weights, %d failures\n", name.c_str(), all.size(), wrong);
    failures += wrong;
  }
  return failures;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return lockstep::run(seed) == 0 ? 0 : 1;
}
