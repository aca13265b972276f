"""The manifest finds a truncated file and a flipped bit, and is written by every rank for its own files."""

import json
import zlib

import pytest

from megatron_llama3.checkpoint.native.manifest import BLOCK_BYTES, damage, damaged_files, summarize


def test_summary_of_a_file_of_several_blocks(tmp_path):
    data = bytes(range(256)) * (BLOCK_BYTES // 256 + 5)
    (tmp_path / "x").write_bytes(data)
    assert summarize(tmp_path / "x") == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def test_every_flipped_bit_is_found(save):
    folder = save / "iter_0000030"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert folder / "tokenizer" / "generation_config.json" in files
    assert {str(path.relative_to(folder)) for path in files} == json.loads((folder / "manifest.json").read_text())["files"].keys()
    assert list(damaged_files(folder)) == []
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            assert list(damaged_files(folder)) == [f"{path}: its bytes are not those that were saved (CRC-32)"]
        path.write_bytes(whole[:-1])
        assert list(damaged_files(folder)) == [f"{path}: has {len(whole) - 1:,} bytes, {len(whole):,} were saved"]
        assert damage(folder).startswith(f"{path}: has")
        path.write_bytes(whole)


NO_TABLE = "damaged: no table of files with bytes and crc32"


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": {}}'])
def test_a_damaged_manifest_is_one_line(save, content):
    (save / "iter_0000030" / "manifest.json").write_text(content)
    assert damage(save / "iter_0000030") == f"{save}/iter_0000030/manifest.json: {NO_TABLE}"


@pytest.mark.parametrize(
    "entry",
    [
        {"../x": {"bytes": 1, "crc32": "0"}},
        {"/x": {"bytes": 1, "crc32": "0"}},
        {"a/../../x": {"bytes": 1, "crc32": "0"}},
        {"x": {"bytes": 1}},
        {"x": {"bytes": 1, "crc32": "z"}},
    ],
)
def test_a_damaged_entry_is_one_line(save, entry):
    path = save / "iter_0000030" / "manifest.json"
    path.write_text(json.dumps({"files": json.loads(path.read_text())["files"] | entry}))
    assert damage(save / "iter_0000030") == f"{path}: {NO_TABLE}"
