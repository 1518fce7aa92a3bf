#!/usr/bin/env bash
# Every policy at the same budgets, on common random numbers; writes results/headtohead, or for text results/headtohead_t2i.
#
#     bash scripts/headtohead.sh                                           the demo by class: every policy, days on two cores
#     bash scripts/headtohead.sh --policies adsa keydiff streaming --budgets 96 --seeds 0 --images 256      minutes
#     bash scripts/headtohead.sh --model XL                                LlamaGen's released models: for GPUs
#     bash scripts/headtohead.sh --help
#
# Flags are those of evaluations/paper/headtohead.py; NPROC is for the sampling and the evaluations that it starts, FLAGS
# are more flags for the sampling, as in FLAGS="--per-proc-batch-size 32".
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/headtohead.py "$@"
