#!/usr/bin/env bash
# A blind study of two sampling runs: a page of picture pairs for raters, and the score of their ballots.
#
#     bash scripts/user_study.sh --help
#     bash scripts/user_study.sh make samples/DENSE_RUN samples/ADSA_RUN --output samples/study
#     bash scripts/user_study.sh score samples/study ballots/ballot-*.json
#
# Flags are those of evaluations/user_study.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_env.sh"
setup_env

exec "$PYTHON" "$root/evaluations/user_study.py" "$@"
