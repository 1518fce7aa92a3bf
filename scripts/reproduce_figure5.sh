#!/usr/bin/env bash
# The paper's Figure 5: a small window alone against ADSA; writes results/figure5.
#
#     bash scripts/reproduce_figure5.sh                  the models that ship with the project
#     bash scripts/reproduce_figure5.sh --model XL       LlamaGen's released models
#     bash scripts/reproduce_figure5.sh --help
#
# Flags are those of evaluations/paper/figure5.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/figure5.py "$@"
