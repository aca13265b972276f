"""Folders are whole or absent."""

import errno
import time

import pytest

from megatron_llama3.checkpoint.files.publish import publish_folder, write_in_parallel
from megatron_llama3.config.errors import UserError


def test_renamed_at_the_end_only(tmp_path):
    final = tmp_path / "deep" / "out"
    with publish_folder(final) as aside:
        (aside / "file").write_text("x")
        assert not final.exists()
    assert (final / "file").read_text() == "x"
    assert [path.name for path in final.parent.iterdir()] == ["out"]


def write_then_fail(final, error):
    with publish_folder(final) as aside:
        (aside / "file").write_text("x")
        raise error


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write_then_fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="No space left on device while writing; nothing was kept"), publish_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"GB are needed and .* GB are free"), publish_folder(tmp_path / "out", needed_bytes=1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").touch()
    with publish_folder(tmp_path / "out") as aside:
        (aside / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_failure_of_a_parallel_task_is_raised_and_stops_the_rest():
    def fail():
        raise UserError("disk")

    done = []
    slow = [lambda: time.sleep(0.05)] * 5
    with pytest.raises(UserError, match="disk"):
        write_in_parallel([lambda: done.append("first"), fail, *slow, lambda: done.append("last")], workers=1)
    assert done == ["first"]
