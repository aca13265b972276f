"""Several writer threads write what one does, and none of their errors is lost."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_llama3.checkpoint import store
from megatron_llama3.checkpoint.native import threaded_writer
from megatron_llama3.checkpoint.native.metadata import SafeFileSystemReader
from megatron_llama3.checkpoint.native.threaded_writer import ThreadedWriter, files_of_rank, threads_for


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model.{i}": torch.randn(3 * i + 1, 5, generator=generator) for i in range(9)}


def save(folder: Path, threads: int) -> list[str]:
    dcp.save(tensors(), storage_writer=ThreadedWriter(folder, threads), no_dist=True)
    return sorted(path.name for path in folder.glob("*.distcp"))


@pytest.mark.parametrize(
    ("threads", "files"),
    [(1, ["__0_0.distcp"]), (3, ["__0_0.distcp", "__0_1_0.distcp", "__0_2_0.distcp"])],
)
def test_each_thread_writes_a_file_and_together_they_hold_the_same(tmp_path, threads, files):
    assert save(tmp_path, threads) == files == [path.name for path in files_of_rank(tmp_path, 0)]
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    dcp.load(loaded, storage_reader=SafeFileSystemReader(tmp_path), no_dist=True)
    for name, tensor in tensors().items():
        assert torch.equal(loaded[name], tensor)


def test_files_are_of_about_equal_size(tmp_path):
    sizes = sorted((tmp_path / name).stat().st_size for name in save(tmp_path, 3))
    assert sizes[-1] < 1.3 * sizes[0]


def test_more_threads_than_tensors_leave_no_empty_file(tmp_path):
    assert len(save(tmp_path, 12)) == 9


@pytest.mark.parametrize("failing", ["__0_0.distcp", "__0_2_0.distcp"])
def test_what_goes_wrong_in_any_thread_ends_the_save(tmp_path, failing):
    (tmp_path / failing).mkdir()
    with pytest.raises(dcp.CheckpointException, match=failing):
        save(tmp_path, 3)
    assert not (tmp_path / ".metadata").exists()


def test_a_large_share_gets_more_threads(monkeypatch):
    monkeypatch.setattr(threaded_writer, "BYTES_A_THREAD", 100)
    counts = [threads_for({"model.w": torch.zeros(elements, dtype=torch.float32)}) for elements in (1, 49, 50, 75, 1000)]
    assert counts == [1, 1, 2, 3, 4]


def test_pinned_buffers_are_made_once_and_only_for_a_gpu(monkeypatch):
    """Pinned memory itself needs a GPU: here is what torch is asked for."""
    monkeypatch.setattr(store, "DefaultStager", lambda options: SimpleNamespace(options=options))
    writer = store.CheckpointWriter.__new__(store.CheckpointWriter)
    writer.pinned = None
    on_gpu, on_cpu = {"model.w": SimpleNamespace(is_cuda=True)}, {"model.w": torch.zeros(1)}
    first, second = writer._stager(on_gpu), writer._stager(on_gpu)
    assert first is second
    assert first.options.use_pinned_memory
    assert first.options.use_non_blocking_copy
    assert not first.options.use_async_staging, "training goes on only when the copy is whole"
    assert not writer._stager(on_cpu).options.use_pinned_memory
    assert writer._stager(on_cpu) is not writer._stager(on_cpu)
