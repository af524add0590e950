#include "features.h"

#include <algorithm>
#include <cstdint>

#include "product.h"
#include "rows.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lockstep {
namespace {

#if defined(__x86_64__)

struct Leaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;  // zeros where the processor has no such leaf
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf found;
  __get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

// Register states that the system saves when it switches threads. As bytes: compilers know the mnemonic only with
// flags that baseline objects don't have.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

std::vector<std::string> detect() {
  constexpr uint64_t kYmm = 0x06, kZmm = 0xe6;  // XCR0: SSE and AVX; then opmask and both halves of the 512-bit file
  const Leaf basic = cpuid(1, 0);
  const bool tells_states = basic.ecx >> 27 & 1;
  const uint64_t states = tells_states ? saved_states() : 0;
  const Leaf extended = cpuid(7, 0), more = extended.eax >= 1 ? cpuid(7, 1) : Leaf();
  const struct {
    const char* name;
    uint32_t word;
    int bit;
    uint64_t needs;
  } table[] = {
      {"avx", basic.ecx, 28, kYmm},           {"fma", basic.ecx, 12, kYmm},
      {"f16c", basic.ecx, 29, kYmm},          {"avx2", extended.ebx, 5, kYmm},
      {"avx_vnni", more.eax, 4, kYmm},        {"avx512f", extended.ebx, 16, kZmm},
      {"avx512dq", extended.ebx, 17, kZmm},   {"avx512bw", extended.ebx, 30, kZmm},
      {"avx512vl", extended.ebx, 31, kZmm},   {"avx512vbmi", extended.ecx, 1, kZmm},
      {"avx512_vnni", extended.ecx, 11, kZmm}, {"avx512_bf16", more.eax, 5, kZmm},
  };
  std::vector<std::string> found;
  for (const auto& feature : table) {
    if ((feature.word >> feature.bit & 1) && (states & feature.needs) == feature.needs) found.push_back(feature.name);
  }
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

std::vector<std::string> detect() {
  constexpr unsigned long kAsimdBit = 1UL << 1, kDotBit = 1UL << 20, kMatrixBit = 1UL << 13, kBf16Bit = 1UL << 14;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  std::vector<std::string> found;
  if (first & kAsimdBit) found.push_back("asimd");
  if (first & kDotBit) found.push_back("asimddp");
  if (second & kMatrixBit) found.push_back("i8mm");
  if (second & kBf16Bit) found.push_back("bf16");
  return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has(const char* key) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
}

std::vector<std::string> detect() {
  std::vector<std::string> found = {"asimd"};
  if (has("hw.optional.arm.FEAT_DotProd")) found.push_back("asimddp");
  if (has("hw.optional.arm.FEAT_I8MM")) found.push_back("i8mm");
  if (has("hw.optional.arm.FEAT_BF16")) found.push_back("bf16");
  return found;
}

#else

std::vector<std::string> detect() { return {}; }

#endif

struct InstructionSet {
  const char* name;
  const ProductKernels* (*product)();
  const RowKernels* (*rows)();
  std::vector<std::string> needs;
};

// Best first. What each needs is what its files are compiled for: see the flags in CMakeLists.txt.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<std::string> kAvx2 = {"avx2", "fma", "f16c"};
  static const std::vector<std::string> kAvx512 = {"avx2",     "fma",      "f16c",     "avx512f",
                                                   "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"};
  static const std::vector<std::string> kBf16 = [] {
    std::vector<std::string> needs = kAvx512;
    needs.push_back("avx512_bf16");
    return needs;
  }();
  static const std::vector<InstructionSet> sets = {
      {"avx512_bf16", product_avx512_bf16, rows_avx512_bf16, kBf16},
      {"avx512", product_avx512, rows_avx512, kAvx512},
      {"avx2", product_avx2, rows_avx2, kAvx2},
      {"neon", product_neon, rows_neon, {"asimd", "asimddp"}},
      {"scalar", product_scalar, rows_scalar, {}},
  };
  return sets;
}

}  // namespace

std::vector<std::string> processor_features() {
  static const std::vector<std::string> found = detect();
  return found;
}

std::vector<std::string> usable_instruction_sets(const std::vector<std::string>& features) {
  const auto present = [&features](const std::string& name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  std::vector<std::string> usable;
  for (const InstructionSet& set : instruction_sets()) {
    const bool enough = std::all_of(set.needs.begin(), set.needs.end(), present);
    if (enough && set.product() != nullptr && set.rows() != nullptr) usable.push_back(set.name);
  }
  return usable;
}

}  // namespace lockstep
