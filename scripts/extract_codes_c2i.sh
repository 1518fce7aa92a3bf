#!/usr/bin/env bash
# Turn a folder of images into tokenizer codes.
#
#     bash scripts/extract_codes_c2i.sh --help
#     bash scripts/extract_codes_c2i.sh --data-path imagenet/train --vq-ckpt pretrained_models/vq_ds16_c2i.pt --image-size 384 --ten-crop --code-path codes/train384
#     NPROC=8 bash scripts/extract_codes_c2i.sh ...      by 8 processes, one for each GPU
#
# Flags are those of autoregressive/train/extract_codes_c2i.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/autoregressive/train/extract_codes_c2i.py" "$@"
