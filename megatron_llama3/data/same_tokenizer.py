"""Whether datasets, and the tokenizer that a run names, have one vocabulary: ids of another one train without a word."""

import hashlib
from collections.abc import Iterable

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.tokenizer.llama3 import Tokenizer, load_tokenizer


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokens in the order of their ids, as tools/preprocess_data.py notes it beside a dataset."""
    return hashlib.sha256(b"".join(sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__))).hexdigest()


def tokenizer_of(datasets: Iterable[IndexedDataset]) -> tuple[str, str] | None:
    """(prefix, hash of the vocabulary) of the first dataset that says what made it. Raises UserError where another one differs."""
    first: tuple[str, str] | None = None
    for dataset in datasets:
        notes = dataset.sidecar["metadata"].get("job", {}) if dataset.sidecar else {}
        vocabulary = notes.get("--tokenizer-model")
        if vocabulary is None:
            continue
        first = first or (str(dataset.prefix), vocabulary)
        if vocabulary != first[1]:
            raise UserError(f"{dataset.prefix} was made with tokenizer {vocabulary:.16}, {first[0]} with {first[1]:.16}; remake one")
    return first


def check_same_tokenizer(datasets: Iterable[IndexedDataset], tokenizer_model: str | None) -> None:
    """Raises UserError where the datasets differ among themselves, or from `tokenizer_model`. Datasets of other tools say nothing, and
    tokenizers of other families have made none of ours."""
    made_with = tokenizer_of(datasets)
    if made_with is None or tokenizer_model is None:
        return
    try:
        named = vocabulary_hash(load_tokenizer(tokenizer_model))
    except UserError:
        return  # not of Llama 3's kind; what is wrong with its size is said elsewhere
    prefix, vocabulary = made_with
    if named != vocabulary:
        given = f"--tokenizer-model {tokenizer_model} is {named:.16}"
        raise UserError(f"{prefix} was made with tokenizer {vocabulary:.16}, {given}: name the one that made it")
