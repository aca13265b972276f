#!/usr/bin/env bash
# From nothing to text that a Llama 3 of your own wrote, on a CPU, in minutes: installs, takes real text, trains a tokenizer and a small
# model on 8 processes (TP 2 x PP 2 x DP 2, sequence parallelism), exports it to Hugging Face's format and reports on it.
#
#   bash scripts/quickstart.sh          PYTHON=python3.12 bash scripts/quickstart.sh
#
# Everything lies in runs/quickstart; run again, it starts from what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=runs/quickstart
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Processes on one machine talk over the loopback device, whatever its other networks look like.
[ ! -e /sys/class/net/lo ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

step() { printf '\n=== %s (%d s since the start)\n' "$1" "$SECONDS"; }

step "1/6 environment"
source scripts/_setup.sh run

step "2/6 text: the source of Python's standard library, some files held out"
[ -f $RUN/corpus/train.jsonl ] && [ -f $RUN/corpus/held_out.jsonl ] || $PYTHON tools/quickstart_corpus.py --output $RUN/corpus

step "3/6 tokenizer of 1,024 entries, and indexed datasets"
[ -f $RUN/tokenizer/tokenizer_config.json ] ||
    $PYTHON tools/train_tokenizer.py --input $RUN/corpus/train.jsonl --vocab-size 1024 --output $RUN/tokenizer
for part in train held_out; do
    $PYTHON tools/preprocess_data.py --input $RUN/corpus/$part.jsonl --output-prefix $RUN/data/$part \
        --tokenizer-model $RUN/tokenizer --append-eod --prepend-bod
done

step "4/6 training on 8 processes: TP 2 x PP 2 x DP 2"
$PYTHON scripts/torchrun.py --standalone --nproc-per-node 8 -m megatron_llama3.recipes.pretrain \
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 \
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --num-query-groups 2 --init-method-std 0.08 \
    --rotary-base 2000 --vocab-size 1024 --max-position-embeddings 1024 --tokenizer-model $RUN/tokenizer \
    --train-data-path $RUN/data/train_text_document --valid-data-path $RUN/data/held_out_text_document \
    --seq-length 512 --micro-batch-size 2 --global-batch-size 4 --train-iters 680 \
    --lr 6e-3 --min-lr 3e-4 --lr-warmup-iters 30 --weight-decay 0.1 \
    --log-interval 10 --eval-interval 85 --eval-iters 16 \
    --save $RUN/checkpoints --load $RUN/checkpoints --save-interval 170

step "5/6 export to Hugging Face's format"
EXPORT=$RUN/hf-$(cat $RUN/checkpoints/latest_checkpointed_iteration.txt)
[ -d $EXPORT ] || $PYTHON tools/convert_checkpoint.py --from native --to hf --load $RUN/checkpoints --save $EXPORT --tokenizer-model $RUN/tokenizer

step "6/6 report: the export in transformers, on files it has not seen"
env -u OMP_NUM_THREADS $PYTHON tools/quickstart_report.py --export $EXPORT --corpus $RUN/corpus \
    --data $RUN/data/train_text_document --held-out-data $RUN/data/held_out_text_document \
    --log $RUN/checkpoints/metrics.jsonl --plot $RUN/loss.png
echo "done after $SECONDS s. More text: $PYTHON -m megatron_llama3.recipes.generate --load $RUN/checkpoints --prompt 'def main():'"
