#include "features.h"

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

// Linux saves the tiles' 8 KiB for processes alone that asked for it; the answer holds for all threads.
bool tiles_are_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<std::string> detect() {
  constexpr uint64_t kYmm = 0x06, kZmm = 0xe6;  // XCR0: SSE and AVX; then opmask and both halves of the 512-bit file
  constexpr uint64_t kTiles = 0x60000;                // the shapes and the data of tiles
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
      {"amx_bf16", extended.edx, 22, kTiles}, {"amx_tile", extended.edx, 24, kTiles},
      {"amx_int8", extended.edx, 25, kTiles},
  };
  std::vector<std::string> found;
  for (const auto& feature : table) {
    const bool has = (feature.word >> feature.bit & 1) && (states & feature.needs) == feature.needs;
    if (has && (feature.needs != kTiles || tiles_are_granted())) found.push_back(feature.name);
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

using Names = std::vector<std::string>;

Names joined(Names names, const Names& more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

// Best first. What each needs is what its files are compiled for: see the flags in CMakeLists.txt.
std::vector<InstructionSet> all_instruction_sets() {
  const Names avx2 = {"avx2", "fma", "f16c"};
  const Names avx512 = joined(avx2, {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"});
  const Names avx512_bf16 = joined(avx512, {"avx512_bf16"});
#if defined(LOCKSTEP_EMULATED_TILES)
  const Names amx = avx512_bf16;
#else
  const Names amx = joined(avx512_bf16, {"amx_tile", "amx_int8", "amx_bf16"});
#endif
  return {
      {"amx", product_amx(), rows_avx512_bf16(), amx},
      {"avx512_bf16", product_avx512_bf16(), rows_avx512_bf16(), avx512_bf16},
      {"avx512", product_avx512(), rows_avx512(), avx512},
      {"avx_vnni", product_avx_vnni(), rows_avx2(), joined(avx2, {"avx_vnni"})},
      {"avx2", product_avx2(), rows_avx2(), avx2},
      {"neon", product_neon(), rows_neon(), {"asimd", "asimddp"}},
      {"scalar", product_scalar(), rows_scalar(), {}},
  };
}

}  // namespace

std::vector<std::string> processor_features() {
  static const std::vector<std::string> found = detect();
  return found;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> built;
    for (const InstructionSet& set : all_instruction_sets()) {
      if (set.products != nullptr && set.rows != nullptr) built.push_back(set);
    }
    return built;
  }();
  return sets;
}

const InstructionSet* instruction_set(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (name == set.name) return &set;
  }
  return nullptr;
}

std::vector<std::string> usable_instruction_sets(const std::vector<std::string>& features) {
  const auto present = [&features](const std::string& name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  std::vector<std::string> usable;
  for (const InstructionSet& set : instruction_sets()) {
    if (std::all_of(set.needs.begin(), set.needs.end(), present)) usable.push_back(set.name);
  }
  return usable;
}

}  // namespace lockstep
