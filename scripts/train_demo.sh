#!/usr/bin/env bash
# Make the demo models from nothing: data, tokenizer, codes, GPT on 12 x 12 tokens, GPT on 24 x 24, export.
#
#     bash scripts/train_demo.sh [RUNS [OUT]]      default: runs/demo and runs/demo/export
#
# OUT is then complete: vq.safetensors, gpt_c2i.safetensors and classes.json. About six hours on two CPU cores (AVX-512, no
# GPU). Started again, it goes on where it was; with other flags it needs another RUNS folder. The data set, made if it
# isn't there, needs npm and Noto Color Emoji, see build_emoji_dataset.sh.
# Variables: DATA (default data/emoji); VQ_STEPS, STAGE1_STEPS and STAGE2_STEPS for shorter or longer runs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env "$root/requirements-data.txt"
cd "$root"
export PYTHON

runs=${1:-runs/demo}
out=${2:-$runs/export}
data=${DATA:-data/emoji}
mkdir -p "$runs" "$out"

[ -f "$data/items.jsonl" ] || bash scripts/build_emoji_dataset.sh --out "$data"

# A tokenizer with 8 x 8 pixels a token, on crops of all four emoji sets at 96 to 192 pixels.
bash scripts/train_vq.sh --data-path "$data/train" --val-path "$data/val" --val-images 256 --val-image-size 192 \
    --vq-model VQ-8-Demo --image-size 96 --resize-range 1 3 --cache-images --num-workers 1 \
    --perceptual-weight 0 --disc-weight 0 --reconstruction-loss l1l2 --color-weight 2 \
    --bypass 0.5 --bypass-until 3000 --codebook-restart-every 50 --codebook-restart-until 3000 \
    --global-batch-size 16 --lr 1e-3 --lr-schedule cosine --lr-min 1e-5 --warmup-steps 100 --weight-decay 0.01 \
    --ema --ema-decay 0.999 --mixed-precision none --max-steps "${VQ_STEPS:-4000}" \
    --log-every 50 --eval-every 500 --ckpt-every 250 --results-dir "$runs/vq"
"$PYTHON" autoregressive/train/export.py --run "$runs/vq" --out "$out/vq.safetensors"

# 47 subgroups of one emoji set: the same images at 96 pixels (12 x 12 tokens) and at 192 (24 x 24).
names=(face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat face-glasses
    face-concerned face-negative face-costume cat-face monkey-face heart animal-mammal animal-bird animal-reptile
    animal-marine animal-bug plant-flower plant-other food-fruit food-vegetable food-prepared food-asian food-sweet drink
    place-building transport-ground transport-water transport-air time sky-weather event award-medal sport clothing
    musical-instrument book-paper mail warning arrow zodiac av-symbol keycap geometric)
names=("${names[@]/#/*_}")
classes=(--classes "${names[@]/%/_twemoji}")
for size in 96 192; do
    for split in train val; do
        bash scripts/extract_codes_c2i.sh --data-path "$data/$split" --code-path "$runs/codes$size/$split" \
            "${classes[@]}" --vq-model VQ-8-Demo --vq-ckpt "$out/vq.safetensors" --image-size $size \
            --no-flip --blank --num-workers 1
    done
done

common=(--gpt-model GPT-Demo --vq-ckpt "$out/vq.safetensors" --dropout-p 0 --token-dropout-p 0 --mixed-precision none
    --num-workers 0 --optimizer muon --lr 1.5e-3 --warmup-steps 50 --ema --top-k 200 --log-every 25)
bash scripts/train_c2i.sh --code-path "$runs/codes96/train" --val-code-path "$runs/codes96/val" "${common[@]}" \
    --global-batch-size 32 --ema-decay 0.99 --max-steps "${STAGE1_STEPS:-600}" --eval-every 200 --ckpt-every 100 \
    --sample-every 300 --results-dir "$runs/stage1"
"$PYTHON" autoregressive/train/export.py --run "$runs/stage1" --out "$runs/stage1.safetensors" --dtype fp32
bash scripts/train_c2i.sh --code-path "$runs/codes192/train" --val-code-path "$runs/codes192/val" "${common[@]}" \
    --global-batch-size 16 --ema-decay 0.98 --max-steps "${STAGE2_STEPS:-3000}" --lr-schedule cosine --lr-min 1e-5 \
    --token-noise 0.3 --init-from "$runs/stage1.safetensors" --eval-every 200 --ckpt-every 50 \
    --sample-every 200 --results-dir "$runs/stage2"
"$PYTHON" autoregressive/train/export.py --run "$runs/stage2" --out "$out/gpt_c2i.safetensors" \
    --class-pattern '[0-9]+_(.+)_twemoji'
