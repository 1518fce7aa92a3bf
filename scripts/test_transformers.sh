#!/usr/bin/env bash
# Run the tests of adsa/hf.py with other versions of transformers, each in a folder that is thrown away.
#
#     bash scripts/test_transformers.sh 4.56.0 5.10.4 5.23.0 | tee results/hf/transformers.txt
#
# Variables: PYTHON, whose other packages (torch above all) are used; OMP_NUM_THREADS.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env "$root/requirements-dev.txt"
cd "$root"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in "$@"; do
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --target "$folder/$version" \
        "transformers==$version" >&2
    export PYTHONPATH=$folder/$version
    "$PYTHON" -c 'import sys, torch, transformers as t; assert t.__version__ == sys.argv[1]
print("transformers", t.__version__, "torch", torch.__version__)' "$version"
    COMPILE_ALL=1 "$PYTHON" -m pytest -q --no-header --show-capture=no -p no:cacheprovider tests/adsa/test_hf.py | tail -n 3 |
        grep -E "^FAILED|^ERROR|passed|failed"
done
