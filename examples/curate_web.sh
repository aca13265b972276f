#!/usr/bin/env bash
# Curates Debian's documentation by examples/curate_web.yaml: pages, labels, classifiers, documents, in data/debian. More arguments go to
# tools/curate_data.py (--executor slurm, --workers 8). Needs apt-get and dpkg, no root; PYTHON: an interpreter with the extra `curation`.
set -euo pipefail

PYTHON=${PYTHON:-python3}
DATA=data/debian

if [ ! -d $DATA/usr ]; then
    mkdir -p $DATA/packages
    (cd $DATA/packages && apt-get download debian-handbook linux-doc-6.1)
    for package in "$DATA"/packages/*.deb; do dpkg -x "$package" $DATA/unpacked; done
    mv $DATA/unpacked/usr $DATA/usr
fi

# Made once: a run that was killed goes on only with the models it began with.
if [ ! -e $DATA/domains.npz ]; then
    $PYTHON examples/curate_web_labels.py --folder $DATA
    $PYTHON tools/train_quality.py --judgements $DATA/judged.jsonl --min-score 3 --output $DATA/quality.npz
    $PYTHON tools/train_quality.py --domains $DATA/labelled.jsonl --output $DATA/domains.npz
fi
$PYTHON tools/curate_data.py examples/curate_web.yaml --output $DATA/curated --tasks 8 --workers 2 --report $DATA/curated.html "$@"
