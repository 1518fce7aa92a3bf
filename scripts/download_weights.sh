#!/usr/bin/env bash
# Fetch LlamaGen's released weights into pretrained_models/, verified and resumable.
#
#     bash scripts/download_weights.sh --list
#     bash scripts/download_weights.sh c2i_B_384 vq_ds16_c2i [--dir FOLDER]
#
# Variables: PYTHON (default: the repository's .venv, else python3), HF_ENDPOINT for a mirror, HF_TOKEN.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
"$PYTHON" -c "import huggingface_hub, safetensors, torch, tqdm" 2>/dev/null || {
    echo "error: $PYTHON lacks packages of requirements.txt; run: $PYTHON -m pip install -r $root/requirements.txt" >&2
    exit 1
}
exec "$PYTHON" "$root/scripts/download_weights.py" "$@"
