#!/usr/bin/env bash
# "Sharper details", measured: spatial frequencies of images by budget and of the data; writes results/spectrum.
#
#     bash scripts/reproduce_spectrum.sh                  the models that ship with the project
#     bash scripts/reproduce_spectrum.sh --model XL       LlamaGen's released models
#     bash scripts/reproduce_spectrum.sh --help
#
# Flags are those of evaluations/paper/spectrum.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

cd "$root"
exec "$PYTHON" evaluations/paper/spectrum.py "$@"
