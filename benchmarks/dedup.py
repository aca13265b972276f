"""MinHash deduplication beside datatrove's stock pipeline: documents a second, and recall and precision by exact Jaccard, in one run.

    python benchmarks/dedup.py --text /usr/share/doc/linux-doc-6.1 --documents 4000 --rounds 3    # datatrove's side needs spacy

The corpus is real text in pieces of --words words, a third of them copies of others with 0 to 15% of their words exchanged. Both sides get
the same documents in memory and run their four stages in this process; rounds alternate. The judge is the exact Jaccard similarity of the
stock pipeline's own shingles: of pairs at or above --threshold not both may survive (recall), and what is dropped must have a partner that
similar (precision). (1/14)^(1/8) = 0.72 is the threshold of the stock's 14 buckets of 8 hashes.
"""

import argparse
import gzip
import platform
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from loguru import logger

from megatron_llama3.curation.blocks.minhash import MinhashDedup

STOCK = MinhashConfig()


def real_pieces(paths: list[str], words: int, random_source: random.Random) -> Iterator[str]:
    """Pieces of about that many words, from files in a random order."""
    files = [file for path in paths for file in sorted(Path(path).rglob("*")) if file.suffix in (".gz", ".txt", ".rst", ".py", ".html")]
    random_source.shuffle(files)
    for file in files:
        try:
            text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode()
        except (UnicodeDecodeError, OSError):
            continue
        tokens = text.split(" ")
        for begin in range(0, len(tokens) - words // 2, words):
            yield " ".join(tokens[begin : begin + words])


def plant(text: str, rate: float, random_source: random.Random) -> str:
    """The text with each word exchanged, at that rate, for another of its words."""
    tokens = text.split(" ")
    return " ".join(random_source.choice(tokens) if random_source.random() < rate else token for token in tokens)


def corpus(paths: list[str], documents: int, words: int, seed: int) -> list[str]:
    source = random.Random(seed)
    originals = [piece for piece, _ in zip(real_pieces(paths, words, source), range(documents - documents // 3))]
    rates = [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15]
    copies = [plant(source.choice(originals), source.choice(rates), source) for _ in range(documents // 3)]
    texts = originals + copies
    source.shuffle(texts)
    return texts


def documents_of(texts: list[str]) -> Iterator[Document]:
    return (Document(text, str(number)) for number, text in enumerate(texts))


def run_stock(texts: list[str], folder: str) -> list[int]:
    """Numbers of the documents that survive datatrove's four stages."""
    for _ in MinhashDedupSignature(f"{folder}/signatures", STOCK).run(documents_of(texts)) or ():
        pass
    for bucket in range(STOCK.num_buckets):
        MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=STOCK).run(None, bucket, STOCK.num_buckets)
    MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=STOCK).run(None, 0, 1)
    return [int(document.id) for document in MinhashDedupFilter(f"{folder}/remove").run(documents_of(texts))]


def run_ours(texts: list[str], folder: str, threshold: float) -> list[int]:
    block = MinhashDedup(threshold)
    for _ in block.collect(folder, 1).run(documents_of(texts)):
        pass
    for search in block.search(folder, 1):
        search.step.run(None, 0, 1)
    return [int(document.id) for document in block.apply(folder).run(documents_of(texts))]


def similar_pairs(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    """Every pair at or above that exact Jaccard similarity of the stock's shingles, the empty ones left out."""
    stock = MinhashDedupSignature("/nowhere", STOCK)
    shingles = [np.unique(stock.get_shingles(text)) for text in texts]
    sizes = np.array([len(one) for one in shingles])
    owners = np.repeat(np.arange(len(texts)), sizes)
    _, inverse = np.unique(np.concatenate(shingles), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    begins = np.searchsorted(inverse[order], np.arange(inverse.max() + 2))
    lists, cuts, pairs = owners[order], np.concatenate([[0], np.cumsum(sizes)]), []
    for number in range(len(texts)):
        own = inverse[cuts[number] : cuts[number + 1]]
        if len(own):
            shared = np.bincount(np.concatenate([lists[begins[one] : begins[one + 1]] for one in own]), minlength=len(texts))
            jaccard = shared / (sizes + sizes[number] - shared)
            pairs += [(number, int(other)) for other in np.flatnonzero(jaccard >= threshold) if other > number]
    return pairs


def judge(survivors: list[int], pairs: list[tuple[int, int]], count: int) -> tuple[float, float]:
    """(recall, precision)."""
    alive = np.zeros(count, bool)
    alive[survivors] = True
    dropped = np.flatnonzero(~alive)
    partnered = np.zeros(count, bool)
    partnered[np.array(pairs).ravel()] = True
    return 1 - np.mean([alive[one] and alive[other] for one, other in pairs]), partnered[dropped].mean()


def timed(run: Callable[[str], list[int]]) -> tuple[float, float, list[int]]:
    """(seconds, CPU seconds, survivors)."""
    folder = tempfile.mkdtemp()
    try:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        survivors = run(folder)
        return time.perf_counter() - begun, time.process_time() - begun_cpu, survivors
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[sysconfig.get_paths()["stdlib"]], help="folders of text (default: Python's library)")
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--words", type=int, default=400)
    parser.add_argument("--threshold", type=float, default=0.72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    logger.remove()
    texts = corpus(flags.text, flags.documents, flags.words, flags.seed)
    pairs = similar_pairs(texts, flags.threshold)
    print(f"{platform.machine()}, Python {platform.python_version()}, datatrove {version('datatrove')}, rensa {version('rensa')}")
    length = sum(map(len, texts)) / len(texts)
    print(f"{len(texts):,} documents of {length:,.0f} characters; {len(pairs):,} pairs at {flags.threshold} or above")
    runs = {"datatrove": lambda folder: run_stock(texts, folder), "ours": lambda folder: run_ours(texts, folder, flags.threshold)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(flags.rounds):
        for name, run in runs.items():
            seconds, cpu, survivors = timed(run)
            times[name].append((seconds, cpu))
            recall, precision = judge(survivors, pairs, len(texts))
            print(
                f"{name:<10} {len(texts) / seconds:>9,.0f} documents/s, {len(texts) / cpu:>9,.0f} a CPU second, "
                f"dropped {len(texts) - len(survivors):,}, recall {recall:.4f}, precision {precision:.4f}"
            )
    for column, unit in enumerate(("documents/s", "documents a CPU second")):
        medians = {name: np.median([pair[column] for pair in values]) for name, values in times.items()}
        print(f"median ratio in {unit}: {medians['datatrove'] / medians['ours']:.1f}")


if __name__ == "__main__":
    main()
