#!/usr/bin/env bash
# The paper's Figure 10: class-conditional images by budget; writes results/figure10.
#
#     bash scripts/reproduce_figure10.sh                  the models that ship with the project
#     bash scripts/reproduce_figure10.sh --model XL       LlamaGen's released models
#     bash scripts/reproduce_figure10.sh --help
#
# Flags are those of evaluations/paper/figure10.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/figure10.py "$@"
