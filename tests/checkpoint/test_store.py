"""A train state whose parts are missing or of another form is one line."""

import json
import shutil

import pytest

from megatron_llama3.checkpoint import store
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig


class Stream:
    """Reads a data position as the training stream does."""

    def load_state_dict(self, state: dict) -> None:
        assert state["seed"] == 0
        assert state["sources"][0]["epoch"] == 0


GOOD = {"data": {"seed": 0, "sources": [{"epoch": 0}]}, "rng": ""}


@pytest.mark.parametrize(
    "change", [{"data": {}}, {"data": "x"}, {"data": {"seed": 0, "sources": []}}, {"rng": ""}, {"rng": "é"}, {"rng": 3}]
)
def test_a_damaged_train_state_is_one_line(save, tmp_path, monkeypatch, change):
    monkeypatch.setattr(store, "_load_tensors", lambda *arguments: None)
    folder = shutil.copytree(save / "iter_0000030", tmp_path / "copy" / "iter_0000030")
    path = folder / "train_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | GOOD | change))
    with pytest.raises(UserError, match=r"train_state\.json: damaged: its data position or random state") as error:
        store.load_checkpoint(folder, RunConfig(), None, Stream())
    assert "\n" not in str(error.value)
