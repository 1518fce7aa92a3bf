#!/usr/bin/env bash
# The paper's Figure 11: images from prompts by budget; writes results/figure11.
#
#     bash scripts/reproduce_figure11.sh                  the models that ship with the project
#     bash scripts/reproduce_figure11.sh --model XL       LlamaGen's released models
#     bash scripts/reproduce_figure11.sh --help
#
# Flags are those of evaluations/paper/figure11.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/figure11.py "$@"
