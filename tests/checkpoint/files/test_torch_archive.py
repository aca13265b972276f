"""torch.save's container, written and read against torch itself."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from megatron_llama3.checkpoint.files.file_writer import FileWriter
from megatron_llama3.checkpoint.files.torch_archive import read_archive
from megatron_llama3.checkpoint.files.torch_archive_writer import write_archive
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, from_tensor, map_file
from megatron_llama3.config.errors import UserError

TENSORS = {"a": torch.randn(3, 5), "b.weight": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).double(), "empty": torch.zeros(0, 4)}


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_what_was_written(tmp_path, mapped):
    with FileWriter(tmp_path / "x.pth") as file:
        write_archive(file, {name: from_tensor(tensor) for name, tensor in TENSORS.items()})
    read = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    if mapped:
        assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values() if tensor.numel())
    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None


def test_archives_back_to_back_in_one_file(tmp_path):
    with FileWriter(tmp_path / "x") as file:
        file.write([b"x" * 13])
        write_archive(file, from_tensor(TENSORS["a"]))
        middle = file.position
        write_archive(file, from_tensor(TENSORS["b.weight"]))
    data = (tmp_path / "x").read_bytes()
    assert torch.equal(torch.load(io.BytesIO(data[13:middle]), weights_only=True), TENSORS["a"])
    assert torch.equal(read_archive(map_file(tmp_path / "x"), "x", middle).read(), TENSORS["b.weight"])


def test_reads_what_torch_saved(tmp_path):
    whole = torch.randn(10, 4)
    saved = {**TENSORS, "view": whole[2:5], "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(saved, tmp_path / "x.pth")
    read = read_archive(map_file(tmp_path / "x.pth"), "x.pth")
    for name, tensor in saved.items():
        assert torch.equal(read[name].read(), tensor)


@pytest.mark.parametrize("saved", [torch.randn(4, 4).T, [os.getcwd], slice(1)])
def test_anything_but_plain_tensors_is_refused(tmp_path, saved):
    torch.save({"a": saved}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="refused to unpickle"):
        read_archive(map_file(tmp_path / "x.pth"), "x.pth")


def test_legacy_and_truncated_files(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(TENSORS, tmp_path / "new.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "new.pth").read_bytes()[:-1])
    for name in ("old.pth", "cut.pth"):
        with pytest.raises(UserError, match=f"{name}: truncated, or not a file that torch"):
            read_archive(map_file(tmp_path / name), name)


def test_storage_outside_its_member_is_refused(tmp_path):
    """A pickle that claims more elements than the member holds would read the bytes behind it."""
    long = LazyTensor((3, 5), torch.float32, lambda start, stop: torch.zeros(1, 5))  # writes fewer bytes than it announces
    with FileWriter(tmp_path / "x.pth") as file:
        write_archive(file, {"a": long})
    with pytest.raises(UserError, match="shorter than the 15 elements"):
        read_archive(map_file(tmp_path / "x.pth"), "x.pth")


def test_pickle_bomb_names_the_global(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(os.system, protocol=2))
    with pytest.raises(UserError, match=r"it asks for (posix|nt)\.system"):
        read_archive(map_file(tmp_path / "x.pth"), "x.pth")


@pytest.mark.full
def test_more_than_four_gigabytes(tmp_path):
    """Sizes and offsets beyond 32 bits: torch and this reader find a tensor behind a 4.4 GB one, and the end of that one."""
    block = torch.arange(1 << 20, dtype=torch.int16).view(torch.bfloat16)
    big = LazyTensor((2200, 1 << 20), torch.bfloat16, lambda start, stop: block.expand(stop - start, -1))
    with FileWriter(tmp_path / "x.pth") as file:
        write_archive(file, {"big": big, "small": from_tensor(TENSORS["a"])})
    read = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    ours = read_archive(map_file(tmp_path / "x.pth"), "x.pth")
    assert torch.equal(read["small"], TENSORS["a"])
    assert torch.equal(ours["small"].read(), TENSORS["a"])
    for row in (0, 2199):
        assert torch.equal(read["big"][row].view(torch.int16), block.view(torch.int16))
        assert torch.equal(ours["big"].rows(row, row + 1)[0].view(torch.int16), block.view(torch.int16))
