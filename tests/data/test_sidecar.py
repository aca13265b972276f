"""Checksums by block: equal however the bytes come, and able to say where the damage is."""

import zlib

import numpy as np
import pytest

from megatron_llama3.data import sidecar
from megatron_llama3.data.sidecar import BlockChecksums, checksum_file, describe_damage


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sidecar, "CHECKSUM_BLOCK_BYTES", 100)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1234])
@pytest.mark.parametrize("chunk", [1, 7, 100, 333, 5000])
def test_checksums_do_not_depend_on_how_the_bytes_come(tmp_path, size, chunk):
    data = np.random.default_rng(size).bytes(size)
    checksums = BlockChecksums()
    for start in range(0, size, chunk):
        checksums.update(data[start : start + chunk])
    expected = {"bytes": size, "crc32": [zlib.crc32(data[start : start + 100]) for start in range(0, size, 100)]}
    assert checksums.as_dict() == expected
    (tmp_path / "file").write_bytes(data)
    assert checksum_file(tmp_path / "file", chunk) == expected


def test_damage_is_placed(tmp_path):
    data = bytearray(1234)
    (tmp_path / "file").write_bytes(data)
    expected = checksum_file(tmp_path / "file")
    assert describe_damage("file", expected, expected) is None
    data[1210] = data[340] = 1
    (tmp_path / "file").write_bytes(data)
    found = checksum_file(tmp_path / "file")
    assert describe_damage("file", expected, found) == "file: 2 of 13 checksums differ, first in bytes 300 to 400"
    (tmp_path / "file").write_bytes(data[:1000])
    assert describe_damage("file", expected, checksum_file(tmp_path / "file")) == "file: 1000 bytes where its sidecar says 1234"
