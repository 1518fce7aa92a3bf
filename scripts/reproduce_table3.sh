#!/usr/bin/env bash
# The paper's Table 3: what prefix, selection and local window are each worth, in all eight combinations at each budget.
#
#     bash scripts/reproduce_table3.sh                       the demo, offline; into results/table3
#     NPROC=8 bash scripts/reproduce_table3.sh --model XL    the paper's own protocol, by 8 GPUs; into results/table3_XL
#     bash scripts/reproduce_table3.sh --help
#
# Flags are those of evaluations/paper/table3.py; NPROC is for the sampling and the evaluations that it starts, FLAGS
# are more flags for the sampling, as in FLAGS="--per-proc-batch-size 32".
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/table3.py "$@"
