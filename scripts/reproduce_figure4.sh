#!/usr/bin/env bash
# The paper's Figure 4: early tokens fix the global style; writes results/figure4.
#
#     bash scripts/reproduce_figure4.sh                  the models that ship with the project
#     bash scripts/reproduce_figure4.sh --model XL       LlamaGen's released models
#     bash scripts/reproduce_figure4.sh --help
#
# Flags are those of evaluations/paper/figure4.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/figure4.py "$@"
