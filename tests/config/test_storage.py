"""Which failures of a file system pass, and how attempts are spaced."""

import errno
import os

import pytest

from megatron_llama3.config import storage
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import StorageError, is_passing, is_there, patiently, user_error, waits


def failing(name: str, path: str | None = "/save") -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), path)


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(storage, "await_storage", seconds.append)
    return seconds


@pytest.mark.parametrize("name", ["EROFS", "ENOSPC", "EDQUOT", "ESTALE", "EIO", "ETIMEDOUT", "EHOSTDOWN", "ENOTCONN"])
def test_what_an_administrator_mends_passes(name):
    assert is_passing(failing(name))
    assert isinstance(user_error(failing(name)), StorageError)


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EEXIST", "EFBIG", "ENAMETOOLONG"])
def test_what_the_user_mends_does_not(name):
    assert not is_passing(failing(name))
    assert type(user_error(failing(name), "--save: ")) is UserError
    assert str(user_error(failing(name), "--save: ")) == f"--save: /save: {os.strerror(getattr(errno, name))}"


@pytest.mark.parametrize("hidden", [True, False])
def test_a_refusal_because_of_storage_passes_however_it_was_raised(hidden):
    def read() -> None:
        try:
            raise failing("ESTALE")
        except OSError as error:
            raise UserError("metadata could not be read") from (None if hidden else error)

    with pytest.raises(UserError) as caught:
        read()
    assert is_passing(caught.value)
    assert not is_passing(UserError("no such flag"))
    assert not is_passing(None)


def test_waits_double_up_to_half_a_minute_and_fill_the_time():
    found = list(waits(2.0))
    assert found == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 29.0]
    assert sum(found) == 120.0
    assert list(waits(0)) == []


def test_attempts_go_on_until_one_succeeds(slept, capsys):
    outcomes = [failing("EROFS"), UserError("x"), failing("EIO")]
    outcomes[1].__cause__ = failing("ESTALE")

    def attempt() -> str:
        if outcomes:
            raise outcomes.pop(0)
        return "loaded"

    assert patiently(attempt, 20.0) == "loaded"
    assert slept == [1.0, 2.0, 4.0]
    assert capsys.readouterr().out.splitlines() == [
        "storage fails: /save: Read-only file system; tried again for up to 20 minutes",
        "storage answers again",
    ]


@pytest.mark.parametrize("speaks", [True, False])
def test_after_the_last_attempt_the_run_is_to_be_started_again(slept, capsys, speaks):
    def attempt() -> None:
        raise failing("EIO")

    with pytest.raises(StorageError, match=r"^/save: Input/output error$"):
        patiently(attempt, 0.1, speaks)
    assert slept == [1.0, 2.0, 3.0]
    assert len(capsys.readouterr().out.splitlines()) == speaks


def test_what_does_not_pass_is_refused_at_once(slept, capsys):
    for error in (failing("EACCES"), UserError("--load: no checkpoint")):

        def attempt(error=error) -> None:
            raise error

        with pytest.raises(UserError) as caught:
            patiently(attempt, 20.0)
        assert not isinstance(caught.value, StorageError)
    assert (slept, capsys.readouterr().out) == ([], "")


def test_a_file_system_that_does_not_say_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    assert is_there(tmp_path)
    assert not is_there(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert not is_there(tmp_path / "file" / "inside")

    def stat(path) -> None:
        raise failing("ESTALE", path)

    monkeypatch.setattr(storage.os, "stat", stat)
    with pytest.raises(OSError, match="Stale"):
        is_there(tmp_path)
