#!/usr/bin/env bash
# What each choice about a cache costs, by the loss on real images; writes results/sweeps, or for text results/sweeps_t2i.
#
#     bash scripts/sweeps.sh                                   the demo by class: about 300 caches, hours on two cores
#     bash scripts/sweeps.sh --images 8 --budgets 96 --detail 96      a quick look
#     bash scripts/sweeps.sh --task t2i                        by text
#     bash scripts/sweeps.sh --help
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/sweeps.py "$@"
