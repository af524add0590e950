#!/usr/bin/env bash
# plan.sh AFFECTED: prints the job matrices of stage $STAGE on the platforms $RUNNERS: of the suites that AFFECTED names,
# of all where there is no such file.
set -euo pipefail

# 5 only says that a suite has no test in this stage; matrix.py decides whether that is allowed.
python -m lockstep.cli.main suites plan --stage "$STAGE" --json > plan.json || [ $? -eq 5 ]
chosen=()
if [ -f "$1" ]; then
  chosen=(--affected "$1")
fi
python scripts/ci/matrix.py plan.json "${chosen[@]}" --runners "$RUNNERS"
