#!/usr/bin/env bash
# A machine with AMD GPUs: the suite rocm-1. The driver must be there.
source "$(dirname "$0")/common.sh"

make_environment
install_torch "${TORCH_BACKEND:-auto}"
install_lockstep
require_platform rocm
