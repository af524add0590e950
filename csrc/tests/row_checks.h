// What the tests of the row kernels share: random values, what stored bits mean, a report, and a run over every
// usable instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../features.h"
#include "../rows.h"

namespace lockstep {

constexpr double kUnit = 1.0 / (1 << 24);  // half a unit in the last place of a float
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr KVType kTypes[] = {KVType::kF32, KVType::kBF16, KVType::kF16};
const char* const kTypeNames[] = {"float32", "bfloat16", "float16"};

using Random = std::mt19937_64;

inline int uniform(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}
inline bool chance(Random& random, double share) { return std::bernoulli_distribution(share)(random); }

// Memory that ends where it says, so that a sanitizer sees a read beyond it.
template <class T>
std::vector<T> exactly(std::vector<T> values) {
  values.shrink_to_fit();
  return values;
}

inline std::vector<float> normals(Random& random, int count, float scale = 1) {
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = draw(random);
  return exactly(values);
}

class Report {
 public:
  explicit Report(std::string instruction_set) : instruction_set_(std::move(instruction_set)) {}

  void expect(bool right, const std::string& what) {
    ++num_checks_;
    if (right) return;
    ++num_failures_;
    if (num_failures_ <= 20) std::printf("FAILED %s: %s\n", instruction_set_.c_str(), what.c_str());
  }

  // |value - expected| <= absolute + relative * |expected|
  void close(double value, double expected, double absolute, double relative, const std::string& what) {
    const bool both_none = std::isnan(value) && std::isnan(expected);
    const double error = std::fabs(value - expected);
    const bool right = both_none || value == expected || error <= absolute + relative * std::fabs(expected);
    expect(right, what + ": " + std::to_string(value) + ", not " + std::to_string(expected) + ", off by " +
                      std::to_string(error / (absolute + relative * std::fabs(expected))) +
                      " times the tolerance");
  }

  int num_checks() const { return num_checks_; }
  int num_failures() const { return num_failures_; }

 private:
  std::string instruction_set_;
  int num_checks_ = 0, num_failures_ = 0;
};

// The nearest value with `digits` bits of precision, ties to even, no exponent below `least` and none above
// `most`.
inline double rounded(double x, int digits, int least, int most) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), least) - (digits - 1);
  const double value = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return std::ilogb(value) > most ? std::copysign(kInfinity, x) : value;
}

inline double rounded(KVType type, double x) {
  switch (type) {
    case KVType::kF32: return rounded(x, 24, -126, 127);
    case KVType::kBF16: return rounded(x, 8, -126, 127);
    case KVType::kF16: return rounded(x, 11, -14, 15);
  }
  return x;
}

// What stored bits mean, digit by digit.
inline double meaning(uint16_t bits, int exponent_bits, int fraction_bits) {
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1),
            bias = (1 << (exponent_bits - 1)) - 1;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double size =
      std::ldexp(fraction + (exponent ? 1 << fraction_bits : 0), std::max(exponent, 1) - bias - fraction_bits);
  if (exponent == (1 << exponent_bits) - 1) size = fraction ? std::nan("") : kInfinity;
  return bits & 0x8000 ? -size : size;
}

inline double meaning(KVType type, const void* pool, int64_t at) {
  if (type == KVType::kF32) return static_cast<const float*>(pool)[at];
  const uint16_t bits = static_cast<const uint16_t*>(pool)[at];
  return type == KVType::kBF16 ? meaning(bits, 8, 7) : meaning(bits, 5, 10);
}

// check(kernels, random, report) for each usable instruction set. Returns the program's exit status.
template <class Check>
inline int run(int argc, char** argv, const Check& check) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  bool right = true;
  for (const std::string& name : usable_instruction_sets(processor_features())) {
    Random random(seed);
    Report report(name);
    check(*instruction_set(name)->rows, random, report);
    std::printf("%-12s %d checks, %d failures\n", name.c_str(), report.num_checks(), report.num_failures());
    right = report.num_failures() == 0 && right;
  }
  return right ? 0 : 1;
}

}  // namespace lockstep
