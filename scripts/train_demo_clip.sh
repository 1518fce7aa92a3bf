#!/usr/bin/env bash
# Make the demo's CLIP, which scores how well its images fit their prompts: captions, training, export, retrieval accuracy.
#
#     bash scripts/train_demo_clip.sh [RUN [OUT]]      default: runs/demo_clip and runs/demo_clip/export
#
# OUT is then a folder as pretrained_models/demo/clip. About 45 minutes on two CPU cores (AVX-512, no GPU). Started again, it
# goes on where it was. The data set, made if it isn't there, needs npm and Noto Color Emoji, see build_emoji_dataset.sh.
# Variables: DATA (default data/emoji; its captions, if there are any, are taken as they are); STEPS for a shorter or longer
# run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env "$root/requirements-data.txt"
cd "$root"
export PYTHON

run=${1:-runs/demo_clip}
out=${2:-$run/export}
data=${DATA:-data/emoji}
config=pretrained_models/demo/clip/open_clip_config.json
mkdir -p "$run" "$out"

[ -f "$data/items.jsonl" ] || bash scripts/build_emoji_dataset.sh --out "$data"
[ -f "$data/captions_val.jsonl" ] || "$PYTHON" scripts/caption_emoji_dataset.py --data "$data" # of all four sets
"$PYTHON" evaluations/train_clip.py --config $config \
    --captions "$data/captions_train.jsonl" --val-captions "$data/captions_val.jsonl" \
    --global-batch-size 256 --max-steps "${STEPS:-1200}" --lr 1e-3 --warmup-steps 50 --weight-decay 0.1 \
    --ema --ema-decay 0.99 --mixed-precision none --num-workers 1 \
    --log-every 10 --eval-every 100 --ckpt-every 50 --results-dir "$run"
"$PYTHON" autoregressive/train/export.py --run "$run" --out "$out/open_clip_model.safetensors"
[ "$config" -ef "$out/open_clip_config.json" ] || cp "$config" "$out/open_clip_config.json"
for split in train val; do
    "$PYTHON" evaluations/retrieval.py "$data/captions_$split.jsonl" --clip-model "local-dir:$out" >"$out/retrieval_$split.json"
done
cat "$out/retrieval_val.json"
