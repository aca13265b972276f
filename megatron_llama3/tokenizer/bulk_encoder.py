"""gigatoken's encoder of a vocabulary, from a file in the user's cache.

gigatoken wants a vocabulary as merges, which tiktoken's ranks only imply: spelling them out takes a second, so that is done once. The
cache (XDG_CACHE_HOME or ~/.cache, megatron_llama3/) only saves time: where it cannot be written, or is damaged, all goes on without it.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llama3.tokenizer.merges import reachable_merges
from megatron_llama3.tokenizer.vocabulary_files import huggingface_json, tokenizer_file, write_whole

if TYPE_CHECKING:
    from gigatoken.gigatoken_rs import BPETokenizer

    from megatron_llama3.tokenizer.llama3 import Tokenizer

_FORMAT = b"megatron_llama3 merges 1\n"


def load_encoder(tokenizer: "Tokenizer", path: str | Path | None = None) -> "BPETokenizer":
    """The encoder of a vocabulary. path: the file or folder that `tokenizer` was loaded from, for the cache; None goes without it."""
    cached = None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        cached = _cache_file(tokenizer_file(path)) if path else None
    if cached and (json := _read_checked(cached)):
        return _load(json)
    json = huggingface_json(tokenizer.ranks, {}, merges=reachable_merges(tokenizer.ranks)).encode()
    if cached:
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cached, hashlib.sha256(json).digest() + json)
    return _load(json)


def _load(json: bytes) -> "BPETokenizer":
    from gigatoken.gigatoken_rs import load_hf_json

    # Without special tokens: gigatoken would turn their spelling into their ids wherever it meets it.
    return load_hf_json(json)


def _cache_file(tokenizer: Path) -> Path:
    """Named by the content of the tokenizer file, so that it can never serve another vocabulary."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(_FORMAT + tokenizer.read_bytes()).hexdigest()
    return Path(root, "megatron_llama3", f"merges-{key[:32]}.json")


def _read_checked(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return data[32:]
    return None
