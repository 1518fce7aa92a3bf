#!/usr/bin/env bash
# Lint, formatting and all tests, a process for each core: `bash scripts/test.sh [flags of pytest]`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env "$root/requirements-dev.txt"

cd "$root"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # more than one for each core wait for each other most of the time
"$PYTHON" -m pytest -q --numprocesses auto "$@"
