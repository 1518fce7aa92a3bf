#!/usr/bin/env bash
# Sample an image for each of the 1632 PartiPrompts.
#
#     NPROC=8 bash scripts/sample_t2i_parti.sh [flags]               512 of 1024 tokens cached
#     CONFIG=configs/t2i_XL_stage2_512_dense.yaml NPROC=8 bash scripts/sample_t2i_parti.sh [flags]
#
# Flags are those of autoregressive/sample/sample_t2i_ddp.py. The prompts (Apache License 2.0) are fetched into
# data/PartiPrompts.tsv, once; PROMPTS=FILE names another file.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

address=https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv
if [ -z "${PROMPTS:-}" ] && [ "${1:-}" != --help ]; then
    PROMPTS=$root/data/PartiPrompts.tsv
    if [ ! -e "$PROMPTS" ]; then
        mkdir -p "$root/data"
        curl --fail --silent --show-error --location --output "$PROMPTS.part" "$address" || {
            echo "error: could not fetch $address; fetch it in another way and name it by PROMPTS=FILE" >&2
            exit 1
        }
        mv "$PROMPTS.part" "$PROMPTS"
    fi
fi
CONFIG=${CONFIG:-configs/t2i_XL_stage2_512_adsa512.yaml}
sample t2i "" --prompts "${PROMPTS:-}" --sample-dir samples_parti "$@"
