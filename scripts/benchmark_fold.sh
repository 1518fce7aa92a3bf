#!/usr/bin/env bash
# Measure what holding the text tokens as one slot saves; writes results/fold/{table.md,table.json}.
#
#     bash scripts/benchmark_fold.sh             on an idle machine: it measures time
#     bash scripts/benchmark_fold.sh --help
#
# Flags are those of scripts/benchmark_fold.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" scripts/benchmark_fold.py "$@"
