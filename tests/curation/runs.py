"""Corpora and runs for the tests of curation."""

import json
import os
import signal
import traceback
from pathlib import Path

import numpy as np
import orjson
import zstandard
from datatrove.data import Document

from megatron_llama3.curation.execute import ExecutorOptions, curate
from megatron_llama3.curation.global_block import GlobalBlock
from megatron_llama3.curation.observe import Tally
from megatron_llama3.curation.pipeline import load_pipeline

WORDS = ["the", "a", "tensor", "mesh", "rank", "copies", "shards", "gradient", "of", "every", "layer", "before", "it", "sends", "what"]

_LETTERS = str.maketrans("0123456789", "abcdefghij")  # numbers are all the same to deduplication


def prose(seed: int, words: int = 120) -> str:
    """Random words, in lines of twelve, unlike those of any other seed."""
    random = np.random.default_rng(seed)
    tokens = [f"{word}{number}" for word, number in zip(random.choice(WORDS, words), random.integers(0, 4000, words))]
    tokens = [token.translate(_LETTERS) for token in tokens]
    return "\n".join(" ".join(tokens[begin : begin + 12]) for begin in range(0, words, 12))


def documents(texts: list[str], **metadata: list) -> list[Document]:
    columns = [dict(zip(metadata, values)) for values in zip(*metadata.values())] if metadata else [{} for _ in texts]
    return [Document(text, str(number), metadata=row) for number, (text, row) in enumerate(zip(texts, columns))]


def through(block: GlobalBlock, given: list[Document], folder: Path, tasks: int = 2) -> list[Document]:
    """What a block that sees the whole corpus leaves of the documents, dealt to tasks in order."""
    cuts = [len(given) * rank // tasks for rank in range(tasks + 1)]
    shares = [given[cuts[rank] : cuts[rank + 1]] for rank in range(tasks)]
    for rank, share in enumerate(shares):
        assert list(block.collect(str(folder), tasks).run(iter(share), rank, tasks)) == share
    for search in block.search(str(folder), tasks):
        for rank in range(search.tasks):
            search.step.run(None, rank, search.tasks)
    return [document for rank, share in enumerate(shares) for document in block.apply(str(folder)).run(iter(share), rank, tasks)]


def write_jsonl(path: Path, records: list[dict | bytes]) -> Path:
    """A dict becomes a line; bytes are a line as they are."""
    lines = [record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_pipeline(folder: Path, text: str) -> str:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return str(path)


def run(pipeline: str, output: Path, kind: str = "local", tasks: int = 1, workers: int = 1) -> list[Tally]:
    return curate(load_pipeline(pipeline), str(output), ExecutorOptions(kind, tasks, workers), lambda line: None)


def written(output: Path) -> list[dict]:
    """The documents of a finished run, in order."""
    lines = []
    for path in sorted((output / "documents").glob("*.jsonl*")):
        data = path.read_bytes()
        data = zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data
        lines += data.splitlines()
    return [orjson.loads(line) for line in lines]


def killed_at(publish: int, pipeline: str, output: Path, tasks: int) -> bool:
    """Runs in a forked process that kills itself before its n-th file gets its name; whether it came to that."""
    child = os.fork()
    if child == 0:
        calls, replace = [], os.replace

        def counted(*paths) -> None:
            calls.append(paths)
            if len(calls) == publish:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = counted
        try:
            run(pipeline, output, tasks=tasks)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
