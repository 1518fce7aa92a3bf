#!/usr/bin/env bash
# Fetch LlamaGen's released weights into pretrained_models/, verified and resumable.
#
#     bash scripts/download_weights.sh --list
#     bash scripts/download_weights.sh c2i_B_384 vq_ds16_c2i [--dir FOLDER]
#
# Variables: HF_ENDPOINT for a mirror, HF_TOKEN for an access token.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

exec "$PYTHON" "$root/scripts/download_weights.py" "$@"
