#!/usr/bin/env bash
# A machine with NVIDIA GPUs: the suites cuda-1 and cuda-2. The driver must be there.
source "$(dirname "$0")/common.sh"

make_environment
install_torch "${TORCH_BACKEND:-auto}"
install_lockstep
require_platform cuda
