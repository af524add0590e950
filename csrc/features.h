// What the processor has and the system lets it use, and the instruction sets that this build holds kernels of.
#pragma once

#include <string>
#include <vector>

#include "product.h"
#include "rows.h"

namespace lockstep {

// Names as Linux prints them: "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
// "avx512_bf16", "avx_vnni", "amx_tile", "asimd", "asimddp", ... Where the processor has AMX, the first call asks the
// system for this process's right to its tiles; without it there is no AMX.
std::vector<std::string> processor_features();

// Kernels for one instruction set, and the features that a processor needs to run them. A set without row kernels of
// its own has those of the next best one.
struct InstructionSet {
  const char* name;
  const ProductKernels* products;
  const RowKernels* rows;
  std::vector<std::string> needs;
};

// Those of this build, best first; "scalar" is always the last.
const std::vector<InstructionSet>& instruction_sets();

// Null for a name that this build does not have.
const InstructionSet* instruction_set(const std::string& name);

// Names of the sets, best first, that these features suffice for.
std::vector<std::string> usable_instruction_sets(const std::vector<std::string>& features);

}  // namespace lockstep
