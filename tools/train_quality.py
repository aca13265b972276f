"""Trains a text classifier for the curation steps: quality from a judge's scores, or domains from labels.

    python tools/train_quality.py --judgements judged.jsonl --min-score 3 --kind linear --output quality.npz

takes JSONL with `text` (or `id` of a text in --documents) and `score`: from --min-score on a text is good, below it bad. With --domains the
lines have `label` instead. A tenth is held out, and what the model makes of it is printed. QualityFilter and DomainLabel read the output.
"""

import argparse
import time

import numpy as np

from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.curation.classifiers.model_file import CLASSIFIERS, classifier_class


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--judgements", metavar="JSONL", help="texts and the scores that a judge gave")
    source.add_argument("--domains", metavar="JSONL", help="texts and their labels")
    parser.add_argument("--documents", metavar="JSONL", help="id and text, where the judge's file has ids only")
    parser.add_argument("--min-score", type=float, default=0.5, help="the lowest score of a good text")
    parser.add_argument(
        "--kind",
        choices=CLASSIFIERS,
        default="linear",
        help="linear: fast, on a CPU; pretrained: the model of --pretrained, fine-tuned",
    )
    parser.add_argument("--pretrained", metavar="FOLDER", help="a Hugging Face encoder such as DistilRoberta, its tokenizer with it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, metavar="PATH", help="the model, an .npz file")
    return parser.parse_args(arguments)


def main() -> None:
    flags = parse_arguments()
    if (flags.kind == "pretrained") != bool(flags.pretrained):
        raise UserError(f"--kind {flags.kind}, --pretrained {flags.pretrained}: kind pretrained needs --pretrained, and no other has it")
    texts, labels = read_examples(flags)
    sizes = {name: labels.count(name) for name in sorted(set(labels))}
    if len(sizes) < 2 or min(sizes.values()) < 10:
        raise UserError(
            f"{flags.judgements or flags.domains}: has {sizes} examples of each class; give at least 10 of two classes (--min-score?)"
        )
    started = time.monotonic()
    held_out = np.random.default_rng(flags.seed).permutation(len(texts)) < max(1, len(texts) // 10)
    model = train(flags, [t for t, held in zip(texts, held_out) if not held], [n for n, held in zip(labels, held_out) if not held])
    print(f"{flags.kind}: {sum(~held_out):,} texts, {sizes}, {time.monotonic() - started:.1f} s")
    report(model, [t for t, held in zip(texts, held_out) if held], [n for n, held in zip(labels, held_out) if held])
    model.save(flags.output)
    print(f"wrote {flags.output}")


def read_examples(flags: argparse.Namespace) -> tuple[list[str], list[str]]:
    from megatron_llama3.curation.blocks.quality import BAD, GOOD, read_judgements, read_labels

    if flags.judgements:
        judged = read_judgements(flags.judgements, flags.documents)
        return [text for text, _ in judged], [GOOD if score >= flags.min_score else BAD for _, score in judged]
    labelled = read_labels(flags.domains)
    return [text for text, _ in labelled], [label for _, label in labelled]


def train(flags: argparse.Namespace, texts: list[str], labels: list[str]):
    options = {"base": flags.pretrained} if flags.pretrained else {}
    return classifier_class(flags.kind).train_on(texts, labels, seed=flags.seed, **options)


def report(model, texts: list[str], labels: list[str]) -> None:
    """Accuracy on the held-out texts, and for two classes how well the scores rank them."""
    from megatron_llama3.curation.blocks.quality import ranking_quality

    probabilities = model.probabilities(texts)
    names = list(model.config.labels)
    right = sum(names[row.argmax()] == label for row, label in zip(probabilities, labels))
    line = f"held out: {len(texts):,} texts, {right / len(texts):.3f} right"
    if len(names) == 2 and len(set(labels)) == 2:
        line += f", area under the ROC curve {ranking_quality(probabilities[:, 1], [label == names[1] for label in labels]):.3f}"
    print(line)


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
