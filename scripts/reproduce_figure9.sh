#!/usr/bin/env bash
# The paper's Figure 9: memory against batch size, by the formula and measured; writes results/figure9.
#
#     bash scripts/reproduce_figure9.sh                  the models that ship with the project, and LlamaGen-XL
#     bash scripts/reproduce_figure9.sh --max-gib 0      by the formula alone, which takes seconds
#     bash scripts/reproduce_figure9.sh --help
#
# Flags are those of evaluations/paper/figure9.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/figure9.py "$@"
