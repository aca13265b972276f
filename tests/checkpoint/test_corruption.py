"""Files with flipped bytes or cut short: every format reads them or says in one UserError what is wrong, and never fails otherwise."""

import random
import shutil

import pytest

from megatron_llama3.checkpoint.huggingface import open_hf, write_hf
from megatron_llama3.checkpoint.meta import open_meta, write_meta
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.config.errors import UserError

FORMATS = {"hf": (open_hf, write_hf), "native": (open_native, write_native), "meta": (open_meta, write_meta)}
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}


def damage(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, most of them near the ends, where headers and tables lie, or the file cut."""
    if dice.random() < 0.2:
        return data[: dice.randrange(len(data))]
    damaged = bytearray(data)
    for _ in range(dice.choice((1, 1, 3))):
        reach = min(len(data), dice.choice((64, 512, len(data))))
        place = dice.randrange(reach)
        damaged[place if dice.random() < 0.5 else len(data) - 1 - place] = dice.randrange(256)
    return bytes(damaged)


def read_all(kind, folder) -> bool:
    try:
        for tensor in FORMATS[kind][0](folder).weights.values():
            tensor.read()
    except UserError:
        return False
    return True


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(make_hf, tmp_path, kind):
    folder = tmp_path / "good"
    folder.mkdir()
    FORMATS[kind][1](open_hf(make_hf(**SMALL)), folder)
    assert read_all(kind, folder)
    dice = random.Random(1234)
    files = [path for path in folder.rglob("*") if path.is_file() and "tokenizer" not in path.parts]
    refused = 0
    for _ in range(150):
        path = dice.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damage(whole, dice))
        refused += not read_all(kind, folder)
        path.write_bytes(whole)
    assert refused > 20
    shutil.rmtree(folder)
