#!/usr/bin/env bash
# A machine with no accelerator: the suites cpu and sim.
source "$(dirname "$0")/common.sh"

install_browser
make_environment
install_torch cpu
install_lockstep
require_platform cpu
require_platform sim
