#!/usr/bin/env bash
# Train Llama 3 405B at its longest context, 128K (paper, Table 4 row 3 and section 3.4.2): the layout of 16,384 GPUs, CP 16 and DP 8.
# It goes on from the weights of pretrain_llama3_405b.sh, or of a shorter context, in CHECKPOINTS_8K.
#
#   bash examples/pretrain_llama3_405b_128k.sh --dry-run --world-size 16384     check the layout, see bytes a rank; needs no GPU
#   sbatch --nodes 2048 scripts/pretrain.sbatch examples/pretrain_llama3_405b_128k.sh
#
# Flags given on the command line come last and win. DATA_PATH, TOKENIZER_MODEL, CHECKPOINTS_8K and CHECKPOINTS may be set in the environment.
set -euo pipefail

read -ra DATA_PATH <<<"${DATA_PATH:-data/pretrain_text_document}" # PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...
TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/tokenizer.model}
CHECKPOINTS_8K=${CHECKPOINTS_8K:-checkpoints/llama3-405b}
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama3.1-405b}

MODEL=(
    --model-name llama3.1-405b # with RoPE frequencies scaled for 128K
)

PARALLEL=(
    # The 8 GPUs of a node share every matrix, and with sequence parallelism the activations between blocks.
    --tensor-model-parallel-size 8
    --sequence-parallel
    # 16 pipeline ranks of 8 chunks. The embedding and the output take one layer's place each: 126 + 2 = 128 chunks, the first only the
    # embedding, the last only the output and loss (section 3.3.2).
    --pipeline-model-parallel-size 16
    --num-layers-per-virtual-pipeline-stage 1
    --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split
    # 16 ranks share every sequence, each two of its 32 pieces; keys and values are gathered (section 3.3.2).
    --context-parallel-size 16
    # All other GPUs are data parallel: FSDP2 shards gradients and optimizer state over them, weights stay gathered through a step.
    --engine fsdp
    --compile-blocks
)

MEMORY=(
    # No layer is recomputed, as in the paper. The norms' outputs are made again in the backward pass, for next to nothing:
    # 63 GiB a rank, where it would be 71 without these two flags (see for yourself: --dry-run).
    --recompute-granularity selective
    --recompute-modules layernorm
)

BATCH=(
    --micro-batch-size 1
    --global-batch-size 128 # 16M tokens, as at 8K
    --seq-length 131072
)

OPTIMIZER=(
    --bf16 # compute; master weights, accumulation and reduction of gradients stay in fp32
    # All six lengths from 8K on took 800B tokens together; how they were shared out, and at which learning rate, is not published.
    --train-iters 8000
    --lr 2e-6 --min-lr 8e-7 --lr-decay-style cosine --lr-warmup-iters 100
    # Not published for Llama 3; these are Llama 2's.
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --weight-decay 0.1 --clip-grad 1.0
)

DATA=(
    --data-path "${DATA_PATH[@]}"
    --split 999,1,0
    --tokenizer-model "$TOKENIZER_MODEL"
)

CHECKPOINT=(
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS_8K" --finetune # weights only; to resume this run itself, add: --load "$CHECKPOINTS" --no-finetune
    --save-interval 500
    --exit-signal-handler # SIGTERM saves before it ends
)

LOGGING=(
    --log-interval 1
    --eval-interval 1000 --eval-iters 10
)

exec bash "$(dirname "$0")/../scripts/launch.sh" \
    "${MODEL[@]}" "${PARALLEL[@]}" "${MEMORY[@]}" "${BATCH[@]}" "${OPTIMIZER[@]}" "${DATA[@]}" "${CHECKPOINT[@]}" "${LOGGING[@]}" "$@"
