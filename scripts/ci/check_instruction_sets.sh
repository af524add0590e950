#!/usr/bin/env bash
# check_instruction_sets.sh BUILD: in a build folder, every object of the kernels holds instructions of its own set
# alone (csrc names them NAME_avx2.cpp and so on); those of no set run on any x86-64 processor.
set -euo pipefail

find "$1" -path '*lockstep_kernels.dir*' -name '*.o' -print0 \
  | xargs -0 python3 "$(dirname "$0")/check_instruction_sets.py"
