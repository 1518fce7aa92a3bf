#!/usr/bin/env bash
# Make the demo text model: pictures, captions, codes, text features, GPT on 16 x 16 tokens, GPT on 32 x 32, export.
#
#     bash scripts/train_demo_t2i.sh [RUNS [OUT]]      default: runs/demo_t2i and runs/demo_t2i/export
#
# It starts from the class model of the demo and needs its tokenizer, both in pretrained_models/demo (train_demo.sh makes
# them). Started again, it goes on where it was. The data set needs npm and Noto Color Emoji, see build_emoji_dataset.sh.
# Other flags need another RUNS folder: finished codes, features and stages are not made again.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env "$root/requirements-data.txt"
cd "$root"
export PYTHON

runs=${1:-runs/demo_t2i}
out=${2:-$runs/export}
data=data/emoji256
demo=pretrained_models/demo
mkdir -p "$runs" "$out"

[ -f $data/items.jsonl ] || bash scripts/build_emoji_dataset.sh --size 256 --out $data

# Two sets of pictures of things that a word or two name. Edits of the files stay.
names=(face-smiling face-tongue face-hat face-glasses face-costume cat-face monkey-face heart animal-mammal animal-bird
    animal-reptile animal-marine animal-bug plant-flower plant-other food-fruit food-vegetable food-prepared food-sweet drink
    musical-instrument geometric)
[ -f $data/captions_train.jsonl ] || "$PYTHON" scripts/caption_emoji_dataset.py --data $data \
    --classes "${names[@]/%/_twemoji}" "${names[@]/%/_noto}"
for split in train val; do
    bash scripts/extract_text_features_t2i.sh --captions $data/captions_$split.jsonl --text-path "$runs/text/$split" \
        --text-encoder minilm --max-length 24 --precision none
    for size in 128 256; do
        bash scripts/extract_codes_t2i.sh --data-path $data/captions_$split.jsonl --code-path "$runs/codes$size/$split" \
            --vq-model VQ-8-Demo --vq-ckpt $demo/vq.safetensors --image-size $size --no-flip --blank --num-workers 1
    done
done

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=(--mixed-precision bf16 --num-workers 3)
else
    device=(--mixed-precision none --num-workers 0)
fi
common=(--text-path "$runs/text/train" --val-text-path "$runs/text/val" --gpt-model GPT-Demo
    --vq-ckpt $demo/vq.safetensors --dropout-p 0 --token-dropout-p 0 --token-noise 0.3 "${device[@]}" --global-batch-size 32
    --optimizer muon --lr 1.5e-3 --warmup-steps 50 --ema --ema-decay 0.99 --top-k 200 --log-every 25 --ckpt-every 100)
bash scripts/train_t2i.sh --code-path "$runs/codes128/train" --val-code-path "$runs/codes128/val" "${common[@]}" \
    --max-steps "${STAGE1_STEPS:-700}" --eval-every 200 --sample-every 350 \
    --init-from $demo/gpt_c2i.safetensors --results-dir "$runs/stage1"
"$PYTHON" autoregressive/train/export.py --run "$runs/stage1" --out "$runs/stage1.safetensors" --dtype fp32
bash scripts/train_t2i.sh --code-path "$runs/codes256/train" --val-code-path "$runs/codes256/val" "${common[@]}" \
    --max-steps "${STAGE2_STEPS:-6000}" --eval-every 500 --sample-every 1500 --lr-schedule cosine --lr-min 1e-5 \
    --init-from "$runs/stage1.safetensors" --results-dir "$runs/stage2"
"$PYTHON" autoregressive/train/export.py --run "$runs/stage2" --out "$out/gpt_t2i.safetensors"
