#!/usr/bin/env bash
# The paper's Table 1: FID, IS, precision, recall and KID of the dense cache and of each budget, with memory and time.
#
#     bash scripts/reproduce_table1.sh                       the demo, offline; into results/table1
#     NPROC=8 bash scripts/reproduce_table1.sh --model XL    the paper's own protocol, by 8 GPUs; into results/table1_XL
#     bash scripts/reproduce_table1.sh --help
#
# Flags are those of evaluations/paper/table1.py; NPROC is for the sampling and the evaluations that it starts, FLAGS
# are more flags for the sampling, as in FLAGS="--per-proc-batch-size 32".
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/table1.py "$@"
