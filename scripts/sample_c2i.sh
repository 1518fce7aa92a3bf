#!/usr/bin/env bash
# Sample class-conditional images.
#
#     bash scripts/sample_c2i.sh                     the demo: 16 images, dense and with 256 of 576 slots, in one grid
#     CONFIG=configs/X.yaml bash scripts/sample_c2i.sh [flags]      a run folder of images
#     NPROC=8 CONFIG=... bash scripts/sample_c2i.sh [flags]         the same by 8 processes, one for each GPU
#     bash scripts/sample_c2i.sh --help
#
# Flags are those of autoregressive/sample/sample_c2i_ddp.py. NPROC without flags and CONFIG samples by configs/demo.yaml.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

sample c2i configs/demo.yaml "$@"
