#!/usr/bin/env bash
# FID, sFID, Inception Score, precision, recall and KID of samples against a reference.
#
#     bash scripts/evaluate.sh --help
#     bash scripts/evaluate.sh samples/RUN VIRTUAL_imagenet256_labeled.npz
#     bash scripts/evaluate.sh samples/RUN pretrained_models/demo/reference.features-efficientnet-lite0.npz \
#         --feature-extractor efficientnet-lite0
#     NPROC=8 bash scripts/evaluate.sh ...      by 8 processes, one for each GPU
#
# Flags are those of evaluations/fid.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/evaluations/fid.py" "$@"
