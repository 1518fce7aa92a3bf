#!/usr/bin/env bash
# Sample an image for each of 30 000 MS-COCO captions: the images of the paper's Table 2.
#
#     NPROC=8 bash scripts/sample_t2i_coco.sh [flags]                512 of 1024 tokens cached
#     CONFIG=configs/t2i_XL_stage2_512_dense.yaml NPROC=8 bash scripts/sample_t2i_coco.sh [flags]
#
# Flags are those of autoregressive/sample/sample_t2i_ddp.py. The captions are drawn by coco_prompts.py, which see, from ANNOTATIONS
# (default data/coco/annotations/captions_val2014.json) into data/coco/coco_val2014.tsv, once. PROMPTS=FILE takes that file
# as it is, such as LlamaGen's coco_captions.csv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

if [ -z "${PROMPTS:-}" ] && [ "${1:-}" != --help ]; then
    PROMPTS=$root/data/coco/coco_val2014.tsv
    [ -e "$PROMPTS" ] || "$PYTHON" "$root/scripts/coco_prompts.py" --output "$PROMPTS" \
        --annotations "${ANNOTATIONS:-$root/data/coco/annotations/captions_val2014.json}"
fi
CONFIG=${CONFIG:-configs/t2i_XL_stage2_512_adsa512.yaml}
sample t2i "" --prompts "${PROMPTS:-}" --sample-dir samples_coco "$@"
