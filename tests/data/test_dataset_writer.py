"""The writer killed at every step, refused a second owner, and out of space."""

import os
import resource
import signal

import numpy as np
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from tests.data.datasets import random_documents, write_dataset

OLD, NEW = random_documents(30, seed=1), random_documents(30, seed=2)


def write_and_die(prefix, documents, fatal_call: int) -> bool:
    """Writes in a child process that is killed before its fatal_call-th call into the file system; whether it was killed."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "unlink", "open"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            write_dataset(prefix, documents, np.uint16)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def read_all(prefix) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def what_is_there(prefix) -> str:
    contents = {"old": [d.tolist() for d in OLD], "new": [d.tolist() for d in NEW]}
    try:
        found = read_all(prefix)
    except UserError as error:
        return "none" if "no such file" in str(error) else str(error)
    if IndexedDataset(prefix).sidecar is None:
        return "without its sidecar"
    return next((name for name, documents in contents.items() if documents == found), "wrong")


@pytest.mark.parametrize("over_an_old_one", [False, True])
def test_killed_anywhere_it_leaves_the_old_dataset_or_none_or_the_new_one(tmp_path, over_an_old_one):
    seen = set()
    for fatal_call in range(1, 100):
        prefix = tmp_path / str(fatal_call)
        if over_an_old_one:
            write_dataset(prefix, OLD, np.uint16)
        killed = write_and_die(prefix, NEW, fatal_call)
        seen.add(what_is_there(prefix))
        if not killed:
            break
        assert not write_and_die(prefix, NEW, 0)  # the same command again finishes the job
        assert what_is_there(prefix) == "new"
        assert not list(tmp_path.glob("*.partial"))
    assert not killed
    assert fatal_call > 15
    assert seen == ({"old", "none", "new"} if over_an_old_one else {"none", "new"})


def test_killed_in_mid_document_leaves_nothing_under_a_final_name(tmp_path):
    child = os.fork()
    if child == 0:
        writer = IndexedDatasetWriter(tmp_path / "a", np.int32)
        writer.add_documents(np.arange(3_000_000), [3_000_000])
        writer.append_tokens(np.arange(5))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert {path.name.split(".", 1)[1] for path in tmp_path.iterdir()} >= {"bin.partial", "idx.partial"}
    assert all(path.suffix == ".partial" for path in tmp_path.iterdir())


def test_a_file_of_ids_is_taken_whole_or_refused(tmp_path):
    ids, lengths, origins = np.arange(700_000, dtype=np.int32), np.array([699_000, 0, 1000]), np.arange(9).reshape(3, 3)
    ids.tofile(tmp_path / "ids")
    for prefix, add in (
        ("a", lambda writer: writer.add_file(tmp_path / "ids", lengths, origins, 699_999)),
        ("b", lambda writer: writer.add_documents(ids, lengths, origins)),
    ):
        with IndexedDatasetWriter(tmp_path / prefix, np.int32) as writer:
            add(writer)
            writer.finalize()
    for part in ("bin", "idx", "sources.npy", "json"):
        assert (tmp_path / f"a.{part}").read_bytes() == (tmp_path / f"b.{part}").read_bytes()
    with IndexedDatasetWriter(tmp_path / "c", np.int32) as writer, pytest.raises(ValueError, match="its documents"):
        writer.add_file(tmp_path / "ids", lengths + 1, origins, 699_999)


def test_tokens_of_an_abandoned_writer_are_taken_up_again(tmp_path):
    ids, lengths, origins = np.arange(700_000, dtype=np.int32), np.array([699_000, 1000]), np.arange(6).reshape(2, 3)
    ids.tofile(tmp_path / "ids")
    with IndexedDatasetWriter(tmp_path / "a", np.int32, tmp_path / "tokens") as writer:
        writer.add_file(tmp_path / "ids", lengths, origins, 699_999)
        (tmp_path / "ids").unlink()
    with IndexedDatasetWriter(tmp_path / "a", np.int32, tmp_path / "tokens") as writer:
        writer.add_written(lengths, origins, 699_999)
        writer.add_documents(ids, lengths, origins)
        with pytest.raises(ValueError, match="ends 4000 bytes early"):
            writer.add_written(lengths[1:], origins[1:], 699_999)
        writer.finalize()
    with IndexedDatasetWriter(tmp_path / "b", np.int32) as writer:
        writer.add_documents(np.tile(ids, 2), np.tile(lengths, 2), np.tile(origins, (2, 1)))
        writer.finalize()
    for part in ("bin", "idx", "sources.npy", "json"):
        assert (tmp_path / f"a.{part}").read_bytes() == (tmp_path / f"b.{part}").read_bytes()
    assert not (tmp_path / "tokens").exists()


def test_leaving_without_finalize_leaves_no_file(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document(np.arange(10))
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_attempt_leaves_the_old_dataset_alone(tmp_path):
    write_dataset(tmp_path / "a", OLD, np.uint16)
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.arange(10))
    assert read_all(tmp_path / "a") == [d.tolist() for d in OLD]


def test_two_writers_of_one_output_refuse_each_other(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.int32) as first:
        first.add_document(np.arange(10))
        with pytest.raises(UserError, match="another process is writing"):
            IndexedDatasetWriter(tmp_path / "a", np.int32)
        first.finalize()
        with IndexedDatasetWriter(tmp_path / "a", np.int32) as second:  # a finished writer is no owner
            second.add_document(np.arange(20))
            first.abort()
            second.finalize()
    assert read_all(tmp_path / "a") == [list(range(20))]


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
        status = 1
        try:
            with IndexedDatasetWriter(tmp_path / "a", np.int32) as writer:
                for _ in range(10):
                    writer.add_documents(np.arange(300_000), [300_000])
                writer.finalize()
        except UserError as error:
            status = 0 if "File too large" in str(error) and str(tmp_path / "a") in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype, bad", [(np.uint16, 65536), (np.uint16, -1), (np.int32, 1 << 31)])
def test_an_id_that_does_not_fit_is_refused(tmp_path, dtype, bad):
    with IndexedDatasetWriter(tmp_path / "a", dtype) as writer, pytest.raises(UserError, match=f"token id {bad} does not fit"):
        writer.add_document(np.array([1, bad, 2]))


def test_a_document_beyond_what_the_format_counts_is_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.int32) as writer:
        writer._open_length = (1 << 31) - 2
        writer.append_tokens(np.array([1]))
        with pytest.raises(UserError, match="split the document"):
            writer.append_tokens(np.array([1]))
