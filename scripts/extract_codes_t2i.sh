#!/usr/bin/env bash
# Turn the images of a captions file into tokenizer codes.
#
#     bash scripts/extract_codes_t2i.sh --help
#     bash scripts/extract_codes_t2i.sh --data-path photos/captions.jsonl --vq-ckpt pretrained_models/vq_ds16_t2i.pt --image-size 512 --no-flip --code-path codes/photos
#     NPROC=8 bash scripts/extract_codes_t2i.sh ...      by 8 processes, one for each GPU
#
# A captions file has an image a line: {"image": "folder/name.png", "captions": ["a cat", "a black cat"]}.
# Flags are those of autoregressive/train/extract_codes_c2i.py, which serves both kinds of model.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/autoregressive/train/extract_codes_c2i.py" "$@"
