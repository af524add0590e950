// Every usable instruction set's norms, rotation, activations and conversions against plain double-precision
// code.
//
// Usage: test_rows [seed]. Exits 1 and names the case when something is wrong.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "row_checks.h"

namespace lockstep {
namespace {

void check_norms(const RowKernels& rows, Random& random, Report& report) {
  for (const int n : {1, 3, 16, 31, 64, 576, 577, 4097, 16384}) {
    const float scale = chance(random, 0.3) ? 300.0f : 1.0f;
    const std::vector<float> x = normals(random, n, scale), y = normals(random, n, scale),
                             weight = normals(random, n);
    std::vector<float> out = exactly(std::vector<float>(n)), residual = x;
    for (const bool adds : {false, true}) {
      if (adds) {
        rows.add_rms_norm(residual.data(), y.data(), weight.data(), 1e-5f, n, out.data());
      } else {
        rows.rms_norm(x.data(), weight.data(), 1e-5f, n, out.data());
      }
      double squares = 0;
      for (int i = 0; i < n; ++i) {
        const double total = adds ? static_cast<double>(x[i] + y[i]) : x[i];
        squares += total * total;
        if (adds) report.expect(residual[i] == x[i] + y[i], "residual " + std::to_string(n));
      }
      for (int i = 0; i < n; ++i) {
        const double total = adds ? x[i] + y[i] : x[i];
        report.close(out[i], total * weight[i] / std::sqrt(squares / n + 1e-5f), 0, 16 * kUnit,
                     "norm of " + std::to_string(n) + (adds ? " with residual" : ""));
      }
    }
    std::vector<float> sum = x;
    rows.add(sum.data(), y.data(), n);
    for (int i = 0; i < n; ++i) report.expect(sum[i] == x[i] + y[i], "add " + std::to_string(n));
  }
}

void check_rope(const RowKernels& rows, Random& random, Report& report) {
  for (const int half : {1, 13, 16, 32, 64}) {
    const int head_dim = 2 * half + uniform(random, 0, 1) * 7, num_heads = uniform(random, 1, 4);
    const std::vector<float> x = normals(random, num_heads * head_dim);
    std::vector<float> cos(half), sin(half);
    for (int i = 0; i < half; ++i) {
      const double angle = uniform(random, 0, 100000) / 1000.0;
      cos[i] = static_cast<float>(std::cos(angle)), sin[i] = static_cast<float>(std::sin(angle));
    }
    for (const bool interleaved : {false, true}) {
      std::vector<float> heads = x;
      rows.rope(heads.data(), num_heads, head_dim, cos.data(), sin.data(), half, interleaved);
      for (int h = 0; h < num_heads; ++h) {
        const float *from = x.data() + h * head_dim, *to = heads.data() + h * head_dim;
        for (int i = 0; i < half; ++i) {
          const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
          const double c = cos[i], s = sin[i];
          report.close(to[a], from[a] * c - from[b] * s, 12 * kUnit, 2 * kUnit, "first of a pair");
          report.close(to[b], from[b] * c + from[a] * s, 12 * kUnit, 2 * kUnit, "second of a pair");
        }
        for (int i = 2 * half; i < head_dim; ++i) report.expect(to[i] == from[i], "what is not rotated");
      }
    }
  }
}

double normal_share(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

void check_activations(const RowKernels& rows, Random& random, Report& report) {
  for (const int n : {1, 5, 16, 37, 1537}) {
    std::vector<float> gate = normals(random, n, chance(random, 0.5) ? 3.0f : 40.0f), up = normals(random, n);
    if (n > 5) {
      gate[0] = 0, gate[1] = -200, gate[2] = 200, gate[3] = std::numeric_limits<float>::quiet_NaN();
      gate[4] = -1e30f, gate[5] = 1e-30f;
    }
    std::vector<float> out = exactly(std::vector<float>(n));
    rows.silu_and_mul(gate.data(), up.data(), n, out.data());
    for (int i = 0; i < n; ++i) {
      const double g = gate[i];
      // A denormal divisor's inverse and results below the smallest normal number lose digits.
      report.close(out[i], g / (1 + std::exp(-g)) * up[i], 1e-36, 8 * kUnit, "silu of " + std::to_string(g));
    }
    rows.gelu_and_mul(gate.data(), up.data(), n, false, out.data());
    for (int i = 0; i < n; ++i) {
      const double g = gate[i];
      const double error = std::fabs(g * up[i]) * 3 * kUnit;
      report.close(out[i], g == -1e30f ? 0.0 : g * normal_share(g) * up[i], error, 16 * kUnit,
                   "gelu of " + std::to_string(g));
    }
    rows.gelu_and_mul(gate.data(), up.data(), n, true, out.data());
    for (int i = 0; i < n; ++i) {
      const double g = gate[i];
      const double u = std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
      report.close(out[i], g / (1 + std::exp(-2 * u)) * up[i], 1e-9, 72 * kUnit,
                   "gelu by tanh of " + std::to_string(g));
    }
  }
}

void check_types(const RowKernels& rows, Random& random, Report& report) {
  std::vector<uint16_t> all(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const KVType type : {KVType::kBF16, KVType::kF16}) {
    const std::string name = kTypeNames[static_cast<int>(type)];
    std::vector<float> values(all.size());
    std::vector<uint16_t> back(all.size());
    rows.from_kv(type, all.data(), 1 << 16, values.data());
    rows.to_kv(type, values.data(), 1 << 16, back.data());
    for (size_t i = 0; i < all.size(); ++i) {
      report.close(values[i], meaning(type, all.data(), i), 0, 0, name + " bits " + std::to_string(i));
      report.expect(back[i] == all[i] || std::isnan(values[i]), name + " and back, bits " + std::to_string(i));
      report.expect(std::isnan(values[i]) == std::isnan(meaning(type, back.data(), i)), name + " not a number");
    }
    // Halfway between neighbours, a hair beside, and everything else.
    std::vector<float> between;
    for (int i = 0; i < 4001; ++i) {
      const float x = values[uniform(random, 0, 0x7bfe)], y = values[uniform(random, 0, 0xffff)];
      const float middle = x + (std::nextafter(x, 1e30f) - x) / 2;
      between.push_back(std::isnan(y) ? 0 : y * 1.00390625f);
      between.push_back(std::nextafter(middle, chance(random, 0.5) ? 1e30f : -1e30f));
      uint32_t bits = static_cast<uint32_t>(random());
      float any;
      std::memcpy(&any, &bits, sizeof any);
      between.push_back(std::isnan(any) ? 65519.99f : any);
    }
    for (size_t i = 0; i + 1 < values.size(); i += 7) {
      const double middle = (static_cast<double>(values[i]) + values[i + 1]) / 2;
      if (std::isfinite(middle)) between.push_back(static_cast<float>(middle));
    }
    between.insert(between.end(),
                   {65520.0f, 65519.996f, 65504.0f, 5.9604645e-8f, 2.9802322e-8f, 2.98023259e-8f, 1e-45f});
    std::vector<uint16_t> out = exactly(std::vector<uint16_t>(between.size()));
    rows.to_kv(type, between.data(), static_cast<int>(between.size()), out.data());
    for (size_t i = 0; i < between.size(); ++i) {
      report.close(meaning(type, out.data(), i), rounded(type, between[i]), 0, 0,
                   name + " of " + std::to_string(between[i]));
    }
  }
  const std::vector<float> x = normals(random, 37);
  std::vector<float> same(37), again(37);
  rows.to_kv(KVType::kF32, x.data(), 37, same.data());
  rows.from_kv(KVType::kF32, same.data(), 37, again.data());
  report.expect(same == x && again == x, "float32 pools keep every bit");
}

void check_argmax(const RowKernels& rows, Random& random, Report& report) {
  for (int trial = 0; trial < 200; ++trial) {
    const int n = uniform(random, 1, 100);
    std::vector<float> x(n);
    for (float& each : x) each = static_cast<float>(uniform(random, -3, 3));
    if (chance(random, 0.1)) x.assign(n, -std::numeric_limits<float>::infinity());
    x = exactly(x);
    int first = 0;
    for (int i = 1; i < n; ++i) {
      if (x[i] > x[first]) first = i;
    }
    report.expect(rows.argmax(x.data(), n) == first, "argmax of " + std::to_string(n));
  }
}

void check(const RowKernels& rows, Random& random, Report& report) {
  check_norms(rows, random, report);
  check_rope(rows, random, report);
  check_activations(rows, random, report);
  check_types(rows, random, report);
  check_argmax(rows, random, report);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::run(argc, argv, lockstep::check); }
