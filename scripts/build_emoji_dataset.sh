#!/usr/bin/env bash
# Fetch the emoji sets and build the demo data set in data/emoji (132 MB, 2 minutes on two cores).
#
#     bash scripts/build_emoji_dataset.sh [flags of build_emoji_dataset.py, see --help]
#
# Needs npm, the Python packages of requirements.txt and requirements-data.txt, and the bitmap version of Noto Color
# Emoji: `apt install fonts-noto-color-emoji` on Debian and Ubuntu, elsewhere --font /path/to/NotoColorEmoji.ttf
# (fonts/NotoColorEmoji.ttf of https://github.com/googlefonts/noto-emoji).
# Variables: CACHE for the npm packages (default ~/.cache/adsa/emoji), PYTHON.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/adsa/emoji}
packages=(@twemoji/svg@15.0.0 openmoji@17.0.0 fluentui-emoji@1.3.0)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi

have_all() {
    local package
    for package in "${packages[@]}"; do
        grep -qs "\"version\": *\"${package##*@}\"" "$cache/node_modules/${package%@*}/package.json" || return 1
    done
}

if ! have_all; then
    command -v npm >/dev/null || { echo "error: npm is missing (https://nodejs.org, apt install npm)" >&2; exit 1; }
    mkdir -p "$cache"
    npm install --prefix "$cache" --no-audit --no-fund --ignore-scripts "${packages[@]}" || {
        echo "error: npm could not fetch ${packages[*]}; is the network there? Run again to retry." >&2
        exit 1
    }
fi
exec "$PYTHON" "$root/scripts/build_emoji_dataset.py" --source "$cache/node_modules" "$@"
