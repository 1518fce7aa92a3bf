#!/usr/bin/env bash
# Train a class-conditional GPT on extracted codes.
#
#     bash scripts/train_c2i.sh --help
#     bash scripts/train_c2i.sh --code-path codes/train384 --gpt-model GPT-B --ema --results-dir results/b384
#     NPROC=8 bash scripts/train_c2i.sh ...      by 8 processes, one for each GPU
#
# Flags are those of autoregressive/train/train_c2i.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/autoregressive/train/train_c2i.py" "$@"
