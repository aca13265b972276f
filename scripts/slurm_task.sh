#!/usr/bin/env bash
# One task of scripts/pretrain.sbatch: gives the command its rank, and notes in $LOGS/exits how the rank ended if work is left.
#
# Not `exec`: Slurm sends its signals to every process of a task. The rank acts on them while this shell waits for it, and so this shell
# knows whether status 75 (work is left) followed a signal: then the run was saved, and the status becomes 0, since srun kills the other
# tasks at the first bad one, and they may still be writing. Without a signal the rank lost contact with another, which is a failure.
set -uo pipefail

signalled=
trap 'signalled=1' USR1 TERM
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
where="attempt ${SLURM_RESTART_COUNT:-0}, rank $RANK on $SLURMD_NODENAME"
note() { echo "$where: $*" | tee -a "$LOGS/exits"; }

echo "--- $(date '+%F %T') $where"
"$@"
status=$?
if ((status == 75)) && [[ -n $signalled ]]; then
    ((RANK != 0)) || note "status 75 after a signal"
    exit 0
fi
((status == 0)) || note "status $status"
exit "$status"
