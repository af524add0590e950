// What the processor has and the system lets it use.
#pragma once

#include <string>
#include <vector>

namespace lockstep {

// Names as Linux prints them: "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
// "avx512_bf16", "avx_vnni", "asimd", "asimddp", ...
std::vector<std::string> processor_features();

// Instruction-set names ("scalar", "avx2", "avx512", "avx512_bf16", "neon"), best first, that these features suffice
// for and this build contains. "scalar" is always the last.
std::vector<std::string> usable_instruction_sets(const std::vector<std::string>& features);

}  // namespace lockstep
