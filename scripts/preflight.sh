#!/usr/bin/env bash
# Checks the machines before a run: versions and GPUs alike, data whole, room for a checkpoint, all-reduce and p2p timings between nodes.
#
#   bash scripts/preflight.sh                                                    this machine: a process a GPU, or one without
#   bash scripts/preflight.sh examples/pretrain_llama3_8b.sh --world-size 1024   with the files of this run
#
# scripts/pretrain.sbatch runs it on every task first. tools/preflight/ does the work, and says what the exit status means.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export MODULE=tools.preflight

check() { if (($# == 0)); then bash "$root/scripts/launch.sh"; else bash "$@"; fi; }

case "${1:-}" in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
esac
if [[ -n ${RANK:-} ]]; then
    check "$@"
    exit
fi

processes=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
((processes)) || processes=1
export WORLD_SIZE=$processes LOCAL_WORLD_SIZE=$processes MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-29400}
status=0
for ((rank = 0; rank < processes; rank++)); do
    RANK=$rank LOCAL_RANK=$rank check "$@" &
done
for process in $(jobs -p); do
    wait "$process" || status=$?
done
exit "$status"
