#!/usr/bin/env bash
# Train a text-conditional GPT on extracted codes and text features.
#
#     bash scripts/train_t2i.sh --help
#     bash scripts/train_t2i.sh --code-path codes/photos --text-path features/photos --gpt-model GPT-XL --ema --results-dir results/t2i
#     NPROC=8 bash scripts/train_t2i.sh ...      by 8 processes, one for each GPU
#
# Flags are those of autoregressive/train/train_t2i.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/autoregressive/train/train_t2i.py" "$@"
