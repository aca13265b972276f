"""What is in an indexed dataset, whether it is still what was written, and which data a training step saw.

    python tools/inspect_dataset.py PREFIX [--samples 3 --tokenizer-model M] [--histogram lengths.png]
    python tools/inspect_dataset.py PREFIX --verify
    python tools/inspect_dataset.py --load CHECKPOINTS --step 5000 [--dp-rank 3] [--tokenizer-model M]

`--verify` holds every byte to the checksums of PREFIX.json. `--step` lists, for each sequence of that optimizer step, its documents with
their source files and byte ranges; --load takes a folder of checkpoints, one of them, or a run_config.yaml.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.sidecar import checksum_file, describe_damage, read_sidecar


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", help="path of the dataset without .bin and .idx")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksums")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="draw the lengths of documents")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="show N documents spread over the dataset")
    parser.add_argument("--documents", type=int, nargs="+", default=[], metavar="I", help="show these documents")
    parser.add_argument("--tokenizer-model", help="tokenizer.model, tokenizer.json or a folder: show text rather than ids")
    parser.add_argument("--characters", type=int, default=200, help="of each text shown")
    parser.add_argument("--step", type=int, help="list the data of this optimizer step (the first is 1)")
    parser.add_argument("--load", help="with --step: the run, as checkpoints or run_config.yaml")
    parser.add_argument("--dp-rank", type=int, help="with --step: this data-parallel rank alone")
    arguments = parser.parse_args()
    if (arguments.step is None) != (arguments.load is None) or (arguments.step is None) == (arguments.prefix is None):
        parser.error("give either the prefix of a dataset, or --step and --load")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    show = text_shower(arguments.tokenizer_model, arguments.characters)
    if arguments.step is not None:
        show_step(arguments.load, arguments.step, arguments.dp_rank, show if arguments.tokenizer_model else None)
        return
    if arguments.verify:
        verify(arguments.prefix)
    dataset = IndexedDataset(arguments.prefix)
    print_summary(dataset)
    print_documents(dataset, arguments.documents + spread(dataset.num_documents, arguments.samples), show)
    if arguments.histogram:
        draw_lengths(dataset, arguments.histogram)
        print(f"histogram: {arguments.histogram}")


def text_shower(tokenizer_model: str | None, characters: int):
    """A function from ids to one line: the beginning of their text, or the ids themselves without a tokenizer."""
    if tokenizer_model is None:
        return lambda ids: " ".join(map(str, ids[: characters // 6])) + (" ..." if len(ids) > characters // 6 else "")
    from megatron_llama3.tokenizer.foreign_tokenizer import open_tokenizer

    tokenizer = open_tokenizer(tokenizer_model)

    def show(ids: np.ndarray) -> str:
        if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(f"{tokenizer_model} has {tokenizer.vocab_size} entries, the dataset holds id {ids.max()}; give its own one")
        text = tokenizer.decode(ids[: 4 * characters].tolist())
        return repr(text[:characters]) + (" ..." if len(text) > characters else "")

    return show


def verify(prefix: str) -> None:
    """Prints one line a file. Raises UserError if one is damaged or there are no checksums to hold them to."""
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        raise UserError(f"{prefix}.json is missing: no checksums to verify (Megatron's own files have none; opening checks their sizes)")
    damaged = 0
    for part, expected in sidecar["files"].items():
        path = f"{prefix}.{part}"
        if not os.path.exists(path):
            damage = f"{path}: missing"
        else:
            damage = describe_damage(path, expected, checksum_file(path))
        damaged += damage is not None
        print(damage or f"{path}: {expected['bytes']:,} bytes, checksums agree")
    if damaged:
        raise UserError(f"{prefix}: {damaged} of {len(sidecar['files'])} files are damaged; make the dataset again, or copy it again")


def print_summary(dataset: IndexedDataset) -> None:
    """Header, counts and the spread of lengths."""
    print(f"prefix       {dataset.prefix}")
    print(f"fingerprint  {dataset.fingerprint}")
    print(f"dtype        {dataset.dtype.name}")
    print(f"documents    {dataset.num_documents:,}")
    if dataset.num_sequences != dataset.num_documents:
        print(f"sequences    {dataset.num_sequences:,}")
    print(f"tokens       {dataset.num_tokens:,}")
    if dataset.largest_id is not None:
        print(f"largest id   {dataset.largest_id}")
    if dataset.num_documents:
        names, lengths = ["shortest", "10%", "median", "90%", "99%", "longest"], dataset.document_lengths
        values = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 0.99, 1], method="lower")
        print(f"lengths      mean {dataset.num_tokens / dataset.num_documents:,.1f}, ", end="")
        print(", ".join(f"{name} {value:,}" for name, value in zip(names, values.tolist())))
    for key, value in (dataset.sidecar or {}).get("metadata", {}).items():
        for name, entry in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{key:12} {name} {entry}".rstrip()[:140])
    sources = (dataset.sidecar or {}).get("sources", [])
    for source in sources[:5]:
        print(f"source       {source['path']} ({source['unit']})")
    if len(sources) > 5:
        print(f"source       ... and {len(sources) - 5:,} more")


def spread(count: int, samples: int) -> list[int]:
    """`samples` numbers below `count`, evenly apart."""
    return sorted({(2 * i + 1) * count // (2 * samples) for i in range(samples)}) if count else []


def print_documents(dataset: IndexedDataset, documents: list[int], show) -> None:
    from megatron_llama3.data.provenance import origin_text

    for i in documents:
        if not 0 <= i < dataset.num_documents:
            raise UserError(f"--documents {i}: the dataset has documents 0 to {dataset.num_documents - 1}")
        ids = dataset.document(i)
        print(f"document {i}, {len(ids):,} tokens, {origin_text(dataset, i)}\n  {show(ids)}")


def draw_lengths(dataset: IndexedDataset, path: Path) -> None:
    """Histogram of document lengths on a logarithmic scale: how many documents, and how many tokens lie in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = dataset.document_lengths[np.asarray(dataset.document_lengths) > 0]
    if not len(lengths):
        raise UserError(f"{dataset.prefix}: no tokens, so no histogram")
    bins = np.geomspace(int(lengths.min()), int(lengths.max()) + 1, 60)
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    above.hist(lengths, bins, color="tab:blue")
    below.hist(lengths, bins, weights=lengths, color="tab:orange")
    above.set(title=f"{Path(dataset.prefix).name}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens", ylabel="documents")
    below.set(xscale="log", xlabel="document length (tokens)", ylabel="tokens in them")
    figure.savefig(path, dpi=120)


def show_step(load: str, step: int, dp_rank: int | None, show) -> None:
    """Prints each sequence of the step, its documents, and with a tokenizer their text."""
    from megatron_llama3.data.provenance import pieces, sequences_of_step

    for k, place in enumerate(sequences_of_step(load, step)):
        if dp_rank not in (None, place.dp_rank):
            continue
        where = f"micro-batch {place.micro_batch}, dp rank {place.dp_rank}, row {place.row}"
        epoch = place.position // place.source.tokens_per_epoch
        seq_length = sum(stretch.length for stretch in place.stretches)
        print(f"step {step}, sequence {k} ({where}): {seq_length} tokens of {place.source.dataset.prefix}, epoch {epoch}")
        for piece in pieces(place):
            stop = piece.start + piece.length
            print(f"  document {piece.document}, tokens {piece.start} to {stop} of {piece.document_length}: {piece.origin}")
            if show is not None:
                print(f"    {show(place.source.dataset.document(piece.document)[piece.start : stop])}")


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
