"""What --data-path and --split mean: datasets with weights, and which of their documents train and which validate."""

import logging
from fractions import Fraction
from itertools import pairwise

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.blend import integer_weights
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.packing import PackedDocuments

logger = logging.getLogger(__name__)


def parse_data_path(entries: list[str], flag: str = "--data-path") -> tuple[list[str], list[Fraction] | None]:
    """Megatron's forms: PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ... Returns prefixes and weights, None where none were given.

    Raises UserError for a mixture of the two, a negative weight, or weights that are all 0.
    """
    numbers = [_number(entry) for entry in entries]
    if len(entries) % 2 or all(number is None for number in numbers):
        if any(number is not None for number in numbers):
            raise UserError(f"{flag} {' '.join(entries)}: give prefixes alone, or a weight before every prefix")
        return entries, None
    weights, prefixes = numbers[::2], entries[1::2]
    if any(weight is None for weight in weights):
        raise UserError(f"{flag} {' '.join(entries)}: give prefixes alone, or a weight before every prefix")
    if min(weights) < 0 or not any(weights):
        raise UserError(f"{flag} {' '.join(entries)}: no weight may be negative, and one must be above 0")
    return prefixes, weights


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def split_shares(split: str) -> list[float]:
    """ "969,30,1" -> the shares of training, validation and test. Raises UserError unless it is up to three numbers >= 0, not all 0."""
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f"--split {split}: give up to three shares of training, validation and test, such as 969,30,1")
    shares += [0.0] * (3 - len(shares))
    return [share / sum(shares) for share in shares]


def split_bounds(split: str, num_documents: int) -> list[tuple[int, int]]:
    """First and last (not included) document of training, validation and test, rounded as in Megatron."""
    edges = [0.0]
    for share in split_shares(split):
        edges.append(edges[-1] + share)
    numbers = [round(edge * num_documents) for edge in edges]
    return list(pairwise(numbers))


def open_sources(
    prefixes: list[str],
    weights: list[Fraction] | None,
    vocab_size: int,
    seed: int,
    cache_path: str | None,
    split: str | None,
    part: int,
) -> tuple[list[PackedDocuments], list[int]]:
    """The streams of one part of the split (0 training, 1 validation) and their integer weights; without weights, by number of tokens.

    A dataset too small to have a document in validation is left out of it with a warning. Raises UserError where nothing is left, where
    a dataset has no training document or a token id beyond the vocabulary, or where two prefixes hold the same data.
    """
    sources, kept_weights = [], []
    seen: dict[str, str] = {}
    for prefix, weight in zip(prefixes, weights or [None] * len(prefixes)):
        dataset = IndexedDataset(prefix)
        _check_vocabulary(dataset, vocab_size)
        if other := seen.get(dataset.fingerprint):
            raise UserError(f"{prefix}: the same data as {other}, which is in this blend already; give one, with the sum of the weights")
        seen[dataset.fingerprint] = prefix
        first, last = split_bounds(split, dataset.num_documents)[part] if split else (0, dataset.num_documents)
        try:
            source = PackedDocuments(dataset, first, last, seed, cache_path)
        except UserError as error:
            if part == 0:
                raise UserError(f"{error} (--split {split})" if split else str(error)) from None
            logger.warning("validation goes without %s", error)
            continue
        sources.append(source)
        kept_weights.append(source.tokens_per_epoch if weight is None else weight)
    if not any(kept_weights):
        raise UserError(f"{' '.join(prefixes)}: nothing to validate on (--split {split}); give it a larger share, or set --eval-iters 0")
    return sources, integer_weights(kept_weights)


def _check_vocabulary(dataset: IndexedDataset, vocab_size: int) -> None:
    """Refuses now what would otherwise stop the run at the first batch with such a token; Megatron's own files are held to it by batch."""
    if dataset.largest_id is not None and dataset.largest_id >= vocab_size:
        raise UserError(
            f"{dataset.bin_path}: holds token ids up to {dataset.largest_id}, --vocab-size {vocab_size} ends before; "
            "set --vocab-size to that of its tokenizer, or preprocess with the model's tokenizer"
        )
