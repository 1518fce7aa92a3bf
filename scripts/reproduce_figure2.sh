#!/usr/bin/env bash
# The paper's Figure 2: mean attention by row and column offset, by distance and by layer; writes results/figure2.
#
#     bash scripts/reproduce_figure2.sh                  the class model that ships with the project
#     bash scripts/reproduce_figure2.sh --task t2i       the text model; writes results/figure2_t2i
#     bash scripts/reproduce_figure2.sh --model XL       LlamaGen's released models
#     bash scripts/reproduce_figure2.sh --help
#
# Flags are those of evaluations/paper/figure2.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/figure2.py "$@"
