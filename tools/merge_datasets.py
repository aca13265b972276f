"""Joins indexed datasets into one by concatenation, in constant memory; the output appears whole or not at all.

    python tools/merge_datasets.py --input shards/ --output-prefix corpus_text_document
    python tools/merge_datasets.py --input a_text_document b_text_document --output-prefix ab_text_document

A folder stands for all datasets in it, in order of their names, as in Megatron-LM. Every input is checked as it is read: a bit that
flipped since it was written stops the merge.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_llama3.data.same_tokenizer import tokenizer_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="folders of datasets, or prefixes (paths without .bin and .idx)")
    parser.add_argument("--output-prefix", required=True, help="path of the result without .bin and .idx")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    prefixes = find_prefixes(arguments.input)
    output = Path(arguments.output_prefix).resolve()
    if output in [Path(prefix).resolve() for prefix in prefixes]:
        raise UserError(f"--output-prefix {arguments.output_prefix} is one of the inputs; choose another name")
    merge(prefixes, arguments.output_prefix)


def find_prefixes(inputs: list[str]) -> list[str]:
    """The prefixes that folders hold and those named. Raises UserError for a folder with none or with half a dataset."""
    prefixes = []
    for entry in inputs:
        if not Path(entry).is_dir():
            prefixes.append(entry)
            continue
        found = {path.with_suffix("") for path in Path(entry).iterdir() if path.suffix in (".bin", ".idx")}
        if not found:
            raise UserError(f"--input {entry}: the folder holds no .bin and .idx files")
        prefixes += sorted(str(prefix) for prefix in found)
    return prefixes


def merge(prefixes: list[str], output_prefix: str) -> None:
    """Writes the concatenation of the datasets. Raises UserError where they do not fit together or one is damaged."""
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    made_with = tokenizer_of(datasets)
    sources: list[dict] = []
    with (
        IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer,
        tqdm(total=sum(d.num_tokens for d in datasets), unit="token", unit_scale=True, disable=None) as bar,
    ):
        for dataset in datasets:
            writer.add_dataset(dataset, first_source=len(sources))
            sources += dataset.sidecar["sources"] if dataset.sidecar else []
            bar.update(dataset.num_tokens)
        job = {"--tokenizer-model": made_with[1]} if made_with else {}
        writer.finalize({"job": job, "merged_from": [Path(prefix).name for prefix in prefixes]}, sources)
    print(f"{output_prefix}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens from {len(prefixes)} datasets")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
