#!/usr/bin/env bash
# Sample images from prompts.
#
#     bash scripts/sample_t2i.sh                     the demo: 8 prompts, dense and with 768, 640 and 512 of 1024 slots, in one grid
#     CONFIG=configs/X.yaml bash scripts/sample_t2i.sh [flags]      a run folder of images
#     NPROC=8 CONFIG=... bash scripts/sample_t2i.sh [flags]         the same by 8 processes, one for each GPU
#     bash scripts/sample_t2i.sh --help
#
# Flags are those of autoregressive/sample/sample_t2i_ddp.py. NPROC without flags and CONFIG samples by configs/demo_t2i.yaml.
# A grid of your own prompts: python autoregressive/sample/sample_t2i.py --config configs/demo_t2i.yaml --prompt "a red apple"
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

sample t2i configs/demo_t2i.yaml "$@"
