#!/usr/bin/env bash
# CLIP score and R-precision of the images of a text-conditional run against their prompts.
#
#     bash scripts/clip_score.sh --help
#     bash scripts/clip_score.sh samples/RUN
#     bash scripts/clip_score.sh samples/RUN --clip-model local-dir:pretrained_models/demo/clip --prefix ''
#     NPROC=8 bash scripts/clip_score.sh ...      by 8 processes, one for each GPU
#
# Flags are those of evaluations/clip_score.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/evaluations/clip_score.py" "$@"
