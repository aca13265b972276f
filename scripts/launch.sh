#!/usr/bin/env bash
# Starts one training program on this node: examples/*.sh end in `exec bash launch.sh FLAGS...`.
#
#   --dry-run or --help among the flags   one plain process: no GPU, no launcher
#   RANK and WORLD_SIZE are set           one process a GPU was started already (scripts/pretrain.sbatch): run in it
#   else                                  torchrun, on $NNODES nodes (1) of $GPUS_PER_NODE GPUs (8); with several nodes set
#                                         NODE_RANK on each, and MASTER_ADDR and MASTER_PORT to node 0
set -euo pipefail

PYTHON=${PYTHON:-python}
MODULE=${MODULE:-megatron_llama3.recipes.pretrain}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

ulimit -S -n 65536 2>/dev/null || ulimit -S -n "$(ulimit -Hn)" # rank 0 has three sockets for every other rank (docs/slurm.md)

for flag in "$@"; do
    case $flag in
        --dry-run | --help | -h) exec "$PYTHON" -m "$MODULE" "$@" ;;
    esac
done
if [[ -n ${RANK:-} && -n ${WORLD_SIZE:-} ]]; then
    exec "$PYTHON" -m "$MODULE" "$@"
fi
exec "$PYTHON" "$root/scripts/torchrun.py" \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    --module "$MODULE" "$@"
