// Every usable instruction set's attention against plain double-precision code, over random shapes.
//
// Usage: test_attention [seed]. Exits 1 and names the case when something is wrong.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "row_checks.h"

namespace lockstep {
namespace {

// One call of attention with everything that it points to.
struct Problem {
  Attention call{};
  std::vector<uint8_t> k, v;
  std::vector<int32_t> pages;
  std::vector<float> q, out, lse, sinks;
  int num_pool_pages = 0;

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line,
                  "%s, heads %d x %d, page %d, rows %d of %d keys, keys [%d, %d), window %d, cap %g%s%s",
                  kTypeNames[static_cast<int>(call.type)], call.num_heads, call.head_dim, call.page_size,
                  call.num_rows, call.num_keys, call.first_key, call.end_key, call.window,
                  static_cast<double>(call.soft_cap), call.sinks ? ", sinks" : "",
                  call.rounds_q ? ", q rounded" : "");
    return line;
  }
};

std::vector<uint8_t> stored(const RowKernels& rows, KVType type, const std::vector<float>& values) {
  std::vector<uint8_t> bytes(values.size() * kv_bytes(type));
  rows.to_kv(type, values.data(), static_cast<int>(values.size()), bytes.data());
  return exactly(bytes);
}

void make_problem(const RowKernels& rows, Random& random, int num_rows, Problem& made) {
  constexpr int kHeadDims[] = {16, 32, 48, 64, 80, 96, 128, 192, 256}, kPageSizes[] = {1, 3, 4, 16, 64};
  constexpr int kHeads[] = {1, 2, 3, 4, 5, 7, 8, 16, 33};
  Attention& call = made.call;
  call.type = kTypes[uniform(random, 0, 2)];
  call.page_size = kPageSizes[uniform(random, 0, 4)];
  call.head_dim = kHeadDims[uniform(random, 0, 8)];
  call.num_heads = kHeads[uniform(random, 0, num_rows > 40 ? 4 : 8)];
  call.num_rows = num_rows;
  call.num_keys = num_rows + uniform(random, 0, chance(random, 0.5) ? 300 : 20);
  call.first_key = chance(random, 0.3) ? uniform(random, 0, call.num_keys) : 0;
  call.end_key = chance(random, 0.3) ? uniform(random, call.first_key, call.num_keys) : call.num_keys;
  call.window = chance(random, 0.4) ? uniform(random, 1, call.num_keys) : 0;
  call.scale = 1.2f / std::sqrt(static_cast<float>(call.head_dim));
  call.soft_cap = chance(random, 0.3) ? 3.0f : 0.0f;
  call.rounds_q = chance(random, 0.3);
  const int num_pages = (call.num_keys + call.page_size - 1) / call.page_size, num_pool_pages = num_pages + 2;
  for (int i = 0; i < num_pool_pages; ++i) made.pages.push_back(i);
  std::shuffle(made.pages.begin(), made.pages.end(), random);
  made.pages.resize(num_pages);
  made.pages = exactly(made.pages);
  int pool_size = num_pool_pages * call.page_size * call.head_dim;
  if (chance(random, 0.3)) {
    call.slot_stride = call.head_dim + uniform(random, 1, 40);
    call.page_stride = call.slot_stride * call.page_size + uniform(random, 0, 40);
    pool_size = static_cast<int>(call.page_stride) * num_pool_pages;
  }
  made.k = stored(rows, call.type, normals(random, pool_size));
  made.v = stored(rows, call.type, normals(random, pool_size));
  const int width = call.num_heads * call.head_dim;
  call.q_stride = width + uniform(random, 0, 20);
  call.out_stride = width + uniform(random, 0, 20);
  made.q = normals(random, static_cast<int>(call.q_stride) * (num_rows - 1) + width);
  if (chance(random, 0.5)) {
    for (float& each : made.q) each = static_cast<float>(rounded(call.type, each));
  }
  made.out = exactly(std::vector<float>(call.out_stride * (num_rows - 1) + width, NAN));
  made.lse = exactly(std::vector<float>(num_rows * call.num_heads, NAN));
  made.sinks = normals(random, call.num_heads);
  call.k = made.k.data(), call.v = made.v.data(), call.pages = made.pages.data();
  call.q = made.q.data(), call.out = made.out.data(), call.lse = made.lse.data();
  call.sinks = chance(random, 0.3) ? made.sinks.data() : nullptr;
}

struct Answer {
  std::vector<double> out;
  double lse;
};

int64_t place_of(const Attention& call, int key) {
  const int64_t page = call.pages[key / call.page_size], slot = key % call.page_size;
  if (call.slot_stride != 0) return page * call.page_stride + slot * call.slot_stride;
  return (page * call.page_size + slot) * call.head_dim;
}

// One row and head by the definition.
Answer answer(const Attention& call, int row, int head) {
  const float* q = call.q + row * call.q_stride + head * call.head_dim;
  const int position_end = call.num_keys - call.num_rows + 1 + row;
  const int first = std::max(call.first_key, call.window ? std::max(0, position_end - call.window) : 0);
  Answer found{std::vector<double>(call.head_dim, 0.0), -kInfinity};
  std::vector<double> scores;
  double total = call.sinks ? std::exp(static_cast<double>(call.sinks[head])) : 0;
  for (int key = first; key < std::min(position_end, call.end_key); ++key) {
    const int64_t at = place_of(call, key);
    double score = 0;
    for (int d = 0; d < call.head_dim; ++d) score += q[d] * meaning(call.type, call.k, at + d);
    score *= call.scale;
    if (call.soft_cap != 0) score = call.soft_cap * std::tanh(score / call.soft_cap);
    total += std::exp(score);
    for (int d = 0; d < call.head_dim; ++d) {
      found.out[d] += std::exp(score) * meaning(call.type, call.v, at + d);
    }
  }
  if (total > 0) {
    for (double& each : found.out) each /= total;
    found.lse = std::log(total);
  }
  return found;
}

struct Scratch {
  explicit Scratch(int64_t size)
      : memory(static_cast<uint8_t*>(::operator new (static_cast<size_t>(size), std::align_val_t{64}))) {
    std::memset(memory, 0xff, static_cast<size_t>(size));
  }
  ~Scratch() { ::operator delete (memory, std::align_val_t{64}); }
  uint8_t* memory;
};

// What is accepted of results, which are averages of values below 4, and of logs of sums of weights.
struct Tolerances {
  double out, lse;
};

// The error of a score walks over head_dim products. Products of bfloat16 pairs see q without the last 2^-16 of
// it, or 2^-8 where the call allows, and round weights to 8 bits, as the contract of attention_extend allows.
Tolerances tolerances_of(const Attention& call, const std::string& instruction_set) {
  const Tolerances exact{2 * 34 * 4 * kUnit, 40 * kUnit};
  const bool pairs = instruction_set == "avx512_bf16" && call.type == KVType::kBF16 && call.num_rows > 1;
  const double rounding = call.rounds_q ? 4.0 / 512 : 4.0 / (1 << 16);
  return pairs ? Tolerances{exact.out + 4.0 / 512 + 4 * rounding, exact.lse + rounding} : exact;
}

void check_attention(const RowKernels& rows, Random& random, int num_rows, Report& report) {
  Problem problem;
  make_problem(rows, random, num_rows, problem);
  const Attention& call = problem.call;
  const std::string text = problem.text();
  const Scratch scratch(rows.attention_scratch_bytes(call));
  rows.attend(call, scratch.memory);
  const Tolerances tolerances = tolerances_of(call, rows.name);
  for (int row = 0; row < num_rows; ++row) {
    for (int head = 0; head < call.num_heads; ++head) {
      const Answer expected = answer(call, row, head);
      const float* out = call.out + row * call.out_stride + head * call.head_dim;
      for (int d = 0; d < call.head_dim; ++d) report.close(out[d], expected.out[d], tolerances.out, 0, text);
      const float lse = call.lse[row * call.num_heads + head];
      report.close(lse, expected.lse, tolerances.lse, 4 * kUnit, "log of the sum, " + text);
    }
  }
  for (int row = 0; row + 1 < num_rows; ++row) {
    for (int i = call.num_heads * call.head_dim; i < call.out_stride; ++i) {
      report.expect(std::isnan(call.out[row * call.out_stride + i]), "wrote between rows, " + text);
    }
  }
}

// The keys of a row in parts, then merged, equal the whole; a sink joins in the merge.
void check_merge(const RowKernels& rows, Random& random, Report& report) {
  Problem problem;
  make_problem(rows, random, 1, problem);
  Attention& call = problem.call;
  call.sinks = nullptr, call.first_key = 0, call.end_key = call.num_keys;
  const int num_parts = uniform(random, 1, 5), width = call.num_heads * call.head_dim;
  const bool has_sink = chance(random, 0.5);
  const std::string text = "merged, " + problem.text();
  std::vector<float> parts(num_parts * width), lse(num_parts * call.num_heads);
  for (int part = 0; part < num_parts; ++part) {
    Attention piece = call;
    piece.first_key = call.num_keys * part / num_parts;
    piece.end_key = call.num_keys * (part + 1) / num_parts;
    piece.out = parts.data() + part * width;
    piece.lse = lse.data() + part * call.num_heads;
    const Scratch scratch(rows.attention_scratch_bytes(piece));
    rows.attend(piece, scratch.memory);
  }
  call.sinks = has_sink ? problem.sinks.data() : nullptr;
  for (int head = 0; head < call.num_heads; ++head) {
    std::vector<float> out = exactly(std::vector<float>(call.head_dim)), lse_of_head;
    for (int part = 0; part < num_parts; ++part) lse_of_head.push_back(lse[part * call.num_heads + head]);
    const float sink = has_sink ? problem.sinks[head] : -std::numeric_limits<float>::infinity();
    rows.merge(parts.data() + head * call.head_dim, lse_of_head.data(), num_parts, width, call.head_dim, sink,
               out.data());
    const Answer expected = answer(call, 0, head);
    for (int d = 0; d < call.head_dim; ++d) {
      report.close(out[d], expected.out[d], 1.5 * tolerances_of(call, rows.name).out, 0, text);
    }
  }
}

void check_merge_of_nothing(const RowKernels& rows, Report& report) {
  const float none = -std::numeric_limits<float>::infinity(), lse[] = {none, none};
  const std::vector<float> parts(32, 0.0f);
  for (const float sink : {none, 0.5f}) {
    std::vector<float> out(16, NAN);
    rows.merge(parts.data(), lse, 2, 16, 16, sink, out.data());
    report.expect(out == std::vector<float>(16, 0.0f), "parts without keys merge to zeros");
  }
}

void check(const RowKernels& rows, Random& random, Report& report) {
  for (int trial = 0; trial < 60; ++trial) check_attention(rows, random, 1, report);
  for (int trial = 0; trial < 40; ++trial) check_attention(rows, random, uniform(random, 2, 12), report);
  for (int trial = 0; trial < 8; ++trial) check_attention(rows, random, uniform(random, 60, 200), report);
  for (int trial = 0; trial < 30; ++trial) check_merge(rows, random, report);
  check_merge_of_nothing(rows, report);
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::run(argc, argv, lockstep::check); }
