"""A vocabulary in its two public forms: Meta's `tokenizer.model` (tiktoken ranks), read and written, and Hugging Face's `tokenizer.json`,
written (tokenizer_json.py reads it).

A vocabulary is `ranks`, a dict from a token's bytes to its id 0..n-1; the id is also the merge priority. Special tokens follow.
"""

import base64
import binascii
import functools
import os
from pathlib import Path

import orjson

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.merges import merges_of

# The paper keeps tiktoken's cl100k pattern (paper 3.2; Meta's llama-models, tokenizer.py).
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which tokenizer.json uses in place of raw bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _printable(token: bytes) -> str:
    return token.decode("latin-1").translate(byte_to_unicode())


def tokenizer_file(path: str | Path) -> Path:
    """The file itself, or the one that a folder holds. Raises UserError where there is none."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: the folder holds neither tokenizer.model nor tokenizer.json")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    return path


def check_ranks(ranks: dict[bytes, int], source: str | Path) -> None:
    """Raises UserError unless ids are 0..n-1 without gaps and all 256 single bytes are present."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{source}: token ids are not 0..{len(ranks) - 1} without gaps or repeats")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{source}: no token for byte {missing[0]}; a byte-level vocabulary has all 256")


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Ranks from a file of `<base64 token> <rank>` lines."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path} line {number}: expected '<base64> <rank>', found {line[:60]!r}; is it a tiktoken file?") from None
    if not ranks:
        raise UserError(f"{path}: the file is empty")
    check_ranks(ranks, path)
    return ranks


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> None:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    write_whole(path, b"".join(lines))


def huggingface_json(
    ranks: dict[bytes, int], specials: dict[str, int], bos: str | None = None, merges: list[tuple[bytes, bytes]] | None = None
) -> str:
    """The tokenizer.json text. With `bos`, encoding there prepends that token, as the published Llama 3 file does. merges: `merges_of`."""
    spelled = {token: _printable(token) for token in ranks}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return orjson.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": id_, "content": name, **flags} for name, id_ in specials.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": _bos_template(bos, specials[bos], byte_level) if bos else byte_level,
            "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {spelled[token]: rank for token, rank in ranks.items()},
                "merges": [f"{spelled[left]} {spelled[right]}" for left, right in (merges_of(ranks) if merges is None else merges)],
            },
        }
    ).decode()


def _bos_template(bos: str, bos_id: int, byte_level: dict) -> dict:
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    start_of_second = {"SpecialToken": {"id": bos, "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, start_of_second, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def write_whole(path: Path, data: bytes) -> None:
    """Writes aside, then renames: the final name never holds half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, path)
