#!/usr/bin/env bash
# touched.sh BASE OUT: prints the review page of the change since BASE and writes its JSON to OUT. Without a base that
# this clone knows (a first push, a rewritten branch), or with RUN_ALL=true, no OUT: then everything runs.
set -euo pipefail
base=$1 out=$2

affected() { python -m lockstep.cli.main suites affected --base "$base" "$@"; }

if ! git rev-parse --verify --quiet "$base^{commit}" >/dev/null; then
  echo "No commit \`$base\` to compare with: every suite runs."
  exit
fi
affected
if [ "${RUN_ALL:-false}" != true ]; then
  affected --json > "$out"
fi
