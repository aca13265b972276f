#!/usr/bin/env bash
# One task of scripts/pretrain.sbatch: gives the command its rank, and notes in $LOGS/exits how the rank ended if it did not end well.
#
# Not `exec`: Slurm sends its signals to every process of a task. The rank acts on them while this shell waits for it. Status 75 (saved, work
# is left) becomes 0, since srun kills the other tasks at the first bad status, and they may still be writing.
set -uo pipefail

trap : USR1 TERM
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
where="attempt ${SLURM_RESTART_COUNT:-0}, rank $RANK on $SLURMD_NODENAME"
echo "--- $(date '+%F %T') $where"
"$@"
status=$?
if ((status == 0)) || ((status == 75 && RANK != 0)); then
    exit 0
fi
echo "$where: status $status" | tee -a "$LOGS/exits"
((status == 75)) || exit "$status"
