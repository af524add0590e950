#!/usr/bin/env bash
# check_baseline.sh BUILD: in a build folder, every object of the kernels but those of one instruction set (csrc names
# them NAME_avx2.cpp and so on) must run on any x86-64 processor.
set -euo pipefail

find "$1" -path '*lockstep_kernels.dir*' -name '*.o' ! -name '*_avx*' -print0 \
  | xargs -0 python3 "$(dirname "$0")/check_baseline_isa.py"
