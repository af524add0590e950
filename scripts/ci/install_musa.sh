#!/usr/bin/env bash
# A machine with Moore Threads GPUs: the suites musa-1 and musa-2. To be run in the vendor's container image, whose torch
# and torch_musa belong together and are kept: nothing that would bring another torch is installed.
source "$(dirname "$0")/common.sh"

make_environment --system-site-packages
.venv/bin/python -c "import torch, torch_musa"
.venv/bin/pip install -q --no-deps -e .
.venv/bin/python - <<'PYTHON' | .venv/bin/pip install -q -r /dev/stdin
import re
from importlib.metadata import requires

for line in requires("lockstep-engine"):
    name, _, marker = line.partition(";")
    if not name.startswith(("torch", "triton")) and ("extra" not in marker or re.search("extra == .test.", marker)):
        print(name)
PYTHON
.venv/bin/pip install -q --no-deps "$model"
require_platform musa
