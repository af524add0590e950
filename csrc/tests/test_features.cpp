// What features.cpp tells of this processor against what the system tells, and the choice of instruction sets with each
// feature masked in turn.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "features.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Names = std::vector<std::string>;

int num_faults = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("WRONG: %s\n", what.c_str());
  ++num_faults;
}

bool has(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// The instructions that each set's files hold, as the names of the features that bring them. Written down a second
// time on purpose: it is what the compiler was allowed to use, not what the code under test believes.
struct Compiled {
  const char* name;
  Names holds;
};
const Compiled kCompiled[] = {
    {"amx",
     {
#if !defined(LOCKSTEP_EMULATED_TILES)
         "amx_tile", "amx_int8", "amx_bf16",
#endif
         "avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"}},
    {"avx512_bf16",
     {"avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"}},
    {"avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"}},
    {"avx_vnni", {"avx_vnni", "avx2", "fma", "f16c"}},
    {"avx2", {"avx2", "fma", "f16c"}},
    {"neon", {"asimd", "asimddp"}},
    {"scalar", {}},
};

const Compiled& compiled(const std::string& name) {
  for (const Compiled& set : kCompiled) {
    if (name == set.name) return set;
  }
  expect(false, name + " is no instruction set that this test knows");
  return *std::rbegin(kCompiled);
}

Names without(const Names& names, const std::string& masked) {
  Names left;
  for (const std::string& name : names) {
    if (name != masked) left.push_back(name);
  }
  return left;
}

// The flags of the first processor in /proc/cpuinfo; empty where there is none.
Names flags_of_the_system() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const bool is_flags = line.rfind("flags", 0) == 0 || line.rfind("Features", 0) == 0;
    if (!is_flags || line.find(':') == std::string::npos) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    Names flags;
    for (std::string word; words >> word;) flags.push_back(word);
    return flags;
  }
  return {};
}

bool is_of_this_architecture(const Names& flags) {
#if defined(__aarch64__)
  return has(flags, "asimd");
#else
  return has(flags, "sse2");
#endif
}

// Linux may keep AMX's tiles from a process.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
  return false;
#endif
}

void check_against_the_system(const Names& told) {
  Names flags = flags_of_the_system();
  if (!is_of_this_architecture(flags)) {
    std::printf("the system does not tell this architecture's flags: nothing to compare with\n");
    return;
  }
  if (!may_use_tiles()) {
    for (const char* name : {"amx_tile", "amx_int8", "amx_bf16"}) flags = without(flags, name);
  }
  std::set<std::string> known(told.begin(), told.end());
  for (const Compiled& set : kCompiled) known.insert(set.holds.begin(), set.holds.end());
  for (const std::string& name : known) expect(has(told, name) == has(flags, name), name + ": told otherwise");
  std::printf("%zu features as /proc/cpuinfo says\n", known.size());
}

void check_masks(const Names& features) {
  const Names best_first = lockstep::usable_instruction_sets(features);
  for (const std::string& masked : features) {
    const Names left = without(features, masked);
    const Names usable = lockstep::usable_instruction_sets(left);
    expect(!usable.empty() && usable.back() == "scalar", "scalar is not the last without " + masked);
    for (const std::string& name : usable) {
      expect(has(best_first, name), "masking " + masked + " adds " + name);
      for (const std::string& held : compiled(name).holds) {
        expect(has(left, held), name + " is offered without " + held);
      }
    }
    for (const std::string& name : best_first) {
      const bool stays = !has(compiled(name).holds, masked);
      expect(has(usable, name) == stays, name + (stays ? " is lost without " : " stays without ") + masked);
    }
  }
}

void print(const char* what, const Names& names) {
  std::printf("%s:", what);
  for (const std::string& name : names) std::printf(" %s", name.c_str());
  std::printf("\n");
}

}  // namespace

int main() {
  const Names here = lockstep::processor_features();
  print("features", here);
  print("usable", lockstep::usable_instruction_sets(here));
  check_against_the_system(here);
  check_masks(here);

  Names all;
  for (const Compiled& set : kCompiled) all.insert(all.end(), set.holds.begin(), set.holds.end());
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  print("built", lockstep::usable_instruction_sets(all));
  check_masks(all);
  expect(lockstep::usable_instruction_sets({}) == Names{"scalar"}, "a processor with nothing gets more than scalar");
  return num_faults == 0 ? 0 : 1;
}
