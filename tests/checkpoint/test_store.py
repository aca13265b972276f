"""What the writer of checkpoints does before the first save."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_llama3.checkpoint.store import CheckpointWriter
from megatron_llama3.config.run import RunConfig


@pytest.mark.parametrize("rank, is_left", [(0, False), (1, True)])
def test_rank_0_clears_up_what_a_killed_run_left(tmp_path, monkeypatch, rank, is_left):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo")
    partial = tmp_path / "iter_0000005.partial"
    partial.mkdir()
    config = RunConfig()
    config.checkpoint.save = str(tmp_path)
    writer = CheckpointWriter(config, SimpleNamespace(groups=SimpleNamespace(saving=None, rank=rank)))
    assert partial.exists() == is_left
    assert (writer.protected, writer.pending, writer.last_stall_seconds) == (None, None, 0.0)


def test_saving_needs_a_group_of_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    config = RunConfig()
    config.checkpoint.save = str(tmp_path)
    with pytest.raises(RuntimeError, match="CPU backend"):
        CheckpointWriter(config, SimpleNamespace(groups=SimpleNamespace(saving=None, rank=0)))
