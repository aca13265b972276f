#!/usr/bin/env bash
# Sets up .venv with the test extras and passes the tests: lint, then pytest. Its last line is pytest's summary.
#
#   bash scripts/test.sh [--quick | --full] [pytest arguments]
#
# --quick leaves out what takes seconds, --full adds the whole matrices. Without either: all but the whole matrices.
set -euo pipefail
cd "$(dirname "$0")/.."
selection="not full"
case "${1:-}" in
    --quick) selection="not slow and not full and not cuda"; shift ;;
    --full) selection=""; shift ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
esac
source scripts/_setup.sh test
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
$PYTHON -m ruff check .
exec $PYTHON -m pytest -m "$selection" "$@"
