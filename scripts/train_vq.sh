#!/usr/bin/env bash
# Train an image tokenizer.
#
#     bash scripts/train_vq.sh --help
#     bash scripts/train_vq.sh --data-path imagenet/train --val-path imagenet/val --lpips-weights lpips_vgg.pth --results-dir results/vq16
#     NPROC=8 bash scripts/train_vq.sh ...      by 8 processes, one for each GPU
#
# Flags are those of tokenizer/tokenizer_image/vq_train.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/tokenizer/tokenizer_image/vq_train.py" "$@"
