#!/usr/bin/env bash
# Pretrain Llama 3 405B on 15.6T tokens at 8K (paper, Table 4 and section 3.4.1), on 8,192 or 16,384 GPUs of 80 GB: DP is 64 or 128.
#
#   bash examples/pretrain_llama3_405b.sh --dry-run --world-size 16384      check the layout, see bytes a rank; needs no GPU
#   sbatch --nodes 2048 scripts/pretrain.sbatch examples/pretrain_llama3_405b.sh
#
# Flags given on the command line come last and win. DATA_PATH, TOKENIZER_MODEL and CHECKPOINTS may be set in the environment.
set -euo pipefail

read -ra DATA_PATH <<<"${DATA_PATH:-data/pretrain_text_document}" # PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...
TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/tokenizer.model}
CHECKPOINTS=${CHECKPOINTS:-checkpoints/llama3-405b}

MODEL=(
    --model-name llama3-405b # every size of Table 3; add --use-rope-scaling --max-position-embeddings 131072 for 3.1
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
    # All other GPUs are data parallel: FSDP2 shards gradients and optimizer state over them, weights stay gathered through a step.
    --engine fsdp
    --compile-blocks
)

MEMORY=(
    # No layer is recomputed, as in the paper. The norms' outputs are made again in the backward pass, for next to nothing:
    # 66 GiB a rank on 8,192 GPUs and 51 on 16,384, where it would be 74 and 59 without these two flags (see for yourself: --dry-run).
    --recompute-granularity selective
    --recompute-modules layernorm
)

BATCH=(
    --micro-batch-size 1
    # The paper's ramp: 4M tokens a step, 8M after 252M tokens, 16M after 2.87T.
    --step-batch-size-schedule "0:1024 252M:1024 2.87T:2048"
    --seq-length-schedule "0:4096 252M:8192"
)

OPTIMIZER=(
    --bf16 # compute; master weights, accumulation and reduction of gradients stay in fp32
    --train-iters 1101000 # 15.6T tokens
    --lr 8e-5 --min-lr 8e-7 --lr-decay-style cosine --lr-warmup-iters 8000 --lr-decay-iters 1200000
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
    "${MODEL[@]}" "${PARALLEL[@]}" "${MEMORY[@]}" "${BATCH[@]}" "${OPTIMIZER[@]}" "${DATA[@]}" "${CHECKPOINT[@]}" "${LOGGING[@]}" "$@"
