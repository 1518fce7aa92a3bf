#!/usr/bin/env bash
# Time decode steps of several caches against each other, and against the hardware's limit; writes results/performance.
#
#     bash scripts/benchmark.sh                              the demo's shape, on an idle machine
#     bash scripts/benchmark.sh --model GPT-XL --dtype bf16 --batches 1 16 64 --upstream --hf
#     bash scripts/benchmark.sh --model Janus-Pro-1B --dtype bf16 --caches --hf dynamic static adsa-576 adsa-288 adsa-96
#     bash scripts/benchmark.sh --help
#
# Flags are those of evaluations/benchmark.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/benchmark.py "$@"
