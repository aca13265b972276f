"""Where the last collectives of a rank are written. What they say: tests/recipes/test_resilience.py, after a real hang."""

import os

from megatron_llama3.training import flight_recorder
from megatron_llama3.training.flight_recorder import keep_collectives, write_collectives


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TORCH_FR_BUFFER_SIZE": "0"})
    keep_collectives()
    assert os.environ == {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_a_file_a_backend_and_rank(monkeypatch, tmp_path):
    monkeypatch.setattr(flight_recorder, "recorded_collectives", lambda: {"nccl": b"n", "gloo": b"g"})
    write_collectives(tmp_path, 11)
    assert (tmp_path / "flight_recorder" / "nccl" / "rank_11").read_bytes() == b"n"
    assert (tmp_path / "flight_recorder" / "gloo" / "rank_11").read_bytes() == b"g"


def test_a_run_that_keeps_no_logs_writes_none(monkeypatch):
    monkeypatch.setattr(flight_recorder, "recorded_collectives", lambda: 1 / 0)
    write_collectives(None, 0)
