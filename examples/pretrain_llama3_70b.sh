#!/usr/bin/env bash
# Pretrain Llama 3 70B on 15T tokens (paper, sections 3.2 and 3.4). From 256 to 16,384 GPUs of 80 GB: DP follows from how many there are.
#
#   bash examples/pretrain_llama3_70b.sh --dry-run --world-size 2048    check the layout, see bytes a rank; needs no GPU
#   NNODES=32 NODE_RANK=... MASTER_ADDR=... bash examples/pretrain_llama3_70b.sh   on each of 32 nodes (scripts/launch.sh)
#   sbatch --nodes 256 scripts/pretrain.sbatch examples/pretrain_llama3_70b.sh
#
# Flags given on the command line come last and win. DATA_PATH, TOKENIZER_MODEL and CHECKPOINTS may be set in the environment.
set -euo pipefail

read -ra DATA_PATH <<<"${DATA_PATH:-data/pretrain_text_document}" # PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...
TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/tokenizer.model}
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama3-70b}

MODEL=(
    --model-name llama3-70b # every size of Table 3; add --use-rope-scaling --max-position-embeddings 131072 for 3.1
)

PARALLEL=(
    # 4 GPUs share every matrix, and with sequence parallelism the activations between blocks. TP 8 would leave 40 GiB of a GPU unused, and
    # twice the share of a step to TP's collectives; TP 4 with 2 pipeline ranks, or TP 2, does not fit (see for yourself: --dry-run).
    --tensor-model-parallel-size 4
    --sequence-parallel
    # 80 layers over 4 pipeline ranks of 10 chunks each: 40 chunks of 2 layers, so that a step of 8 micro-batches idles 3 / 80.
    --pipeline-model-parallel-size 4
    --num-virtual-stages-per-pipeline-rank 10
    # All other GPUs are data parallel: FSDP2 shards gradients and optimizer state over them.
    --engine fsdp
    --compile-blocks
)

BATCH=(
    --micro-batch-size 1
    # The paper's ramp: 4M tokens a step, 8M after 252M tokens, 16M after 2.87T.
    --step-batch-size-schedule "0:1024 252M:1024 2.87T:2048"
    --seq-length-schedule "0:4096 252M:8192"
)

OPTIMIZER=(
    --bf16 # compute; master weights, accumulation and reduction of gradients stay in fp32
    --train-iters 1065200 # 15T tokens
    --lr 1.5e-4 --min-lr 1.5e-6 --lr-decay-style cosine --lr-warmup-iters 8000 --lr-decay-iters 1200000
    # Not published for Llama 3; these are Llama 2's.
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --weight-decay 0.1 --clip-grad 1.0
)

DATA=(
    --data-path "${DATA_PATH[@]}"
    --split 999,1,0
    --tokenizer-model "$TOKENIZER_MODEL"
)

CHECKPOINT=(
    --save "$CHECKPOINTS" --load "$CHECKPOINTS" # an empty folder starts fresh, any other resumes
    --save-interval 500
    --exit-signal-handler # SIGTERM saves before it ends
)

LOGGING=(
    --log-interval 1
    --eval-interval 1000 --eval-iters 10
)

exec bash "$(dirname "$0")/../scripts/launch.sh" \
    "${MODEL[@]}" "${PARALLEL[@]}" "${BATCH[@]}" "${OPTIMIZER[@]}" "${DATA[@]}" "${CHECKPOINT[@]}" "${LOGGING[@]}" "$@"
