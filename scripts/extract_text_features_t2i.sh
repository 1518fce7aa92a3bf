#!/usr/bin/env bash
# Turn the captions of a captions file into text features.
#
#     bash scripts/extract_text_features_t2i.sh --help
#     bash scripts/extract_text_features_t2i.sh --captions photos/captions.jsonl --text-encoder flan-t5-xl --text-path features/photos
#     NPROC=8 bash scripts/extract_text_features_t2i.sh ...      by 8 processes, one for each GPU
#
# Flags are those of autoregressive/train/extract_text_features.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

launch "$root/autoregressive/train/extract_text_features.py" "$@"
