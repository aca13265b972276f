"""When a rank watches its launcher, how often, and how it ends."""

from types import SimpleNamespace

import pytest

from megatron_llama3.training import launcher_guard
from megatron_llama3.training.stop import RESTART_STATUS


@pytest.mark.parametrize("is_rank", [True, False])
def test_a_rank_watches_from_a_thread_that_does_not_keep_it_alive(monkeypatch, is_rank):
    started = []

    def thread(**kwargs):
        return SimpleNamespace(start=lambda: started.append(kwargs))

    monkeypatch.setattr(launcher_guard.threading, "Thread", thread)
    monkeypatch.setattr(launcher_guard.os, "getppid", lambda: 77)
    monkeypatch.delenv("RANK", raising=False)
    if is_rank:
        monkeypatch.setenv("RANK", "0")
    launcher_guard.end_with_launcher()
    assert started == is_rank * [{"target": launcher_guard._watch, "args": (77,), "name": "launcher", "daemon": True}]


class Ended(BaseException):
    pass


def test_it_looks_every_two_seconds_and_ends_with_the_status_for_starting_again(monkeypatch, capsys):
    parents, slept = iter([77, 77, 77, 1]), []

    def end(status: int):
        raise Ended(status)

    monkeypatch.setattr(launcher_guard.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(launcher_guard.time, "sleep", slept.append)
    monkeypatch.setattr(launcher_guard.os, "_exit", end)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(Ended) as ended:
        launcher_guard._watch(77)
    assert ended.value.args == (RESTART_STATUS,)
    assert slept == [2.0] * 3
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: rank 3: its launcher (process 77) is gone; start the run again to go on\n")
