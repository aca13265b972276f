"""What a run starts from: its own last whole checkpoint, past damaged ones."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_llama3.checkpoint.native.folder import CONFIG_FILE, LATEST_FILE, STATE_FILE
from megatron_llama3.checkpoint.start import latest_whole_checkpoint
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import CheckpointConfig, RunConfig


def chosen(save: Path) -> str | None:
    start = latest_whole_checkpoint(RunConfig(checkpoint=CheckpointConfig(save=str(save), finetune=True, no_load_optim=True)))
    assert start is None or not (start.options.finetune or start.options.no_load_optim)
    return start and start.folder.name


def tensor_file(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_latest_by_name_wins(save):
    assert chosen(save) == "iter_0000030"
    (save / LATEST_FILE).write_text("20")  # as a person writes it who wants to go back
    assert chosen(save) == "iter_0000020"
    (save / LATEST_FILE).unlink()
    assert chosen(save) == "iter_0000030"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: shutil.rmtree(f), "the folder is missing"),
        (lambda f: tensor_file(f).unlink(), "the file is missing"),
        (lambda f: cut(tensor_file(f)), "bytes, .* were saved"),
        (lambda f: cut(f / ".metadata"), ".metadata: "),
        (lambda f: (f / ".metadata").unlink(), ".metadata: the file is missing"),
        (lambda f: flip(f / ".metadata"), ".metadata: its bytes are not those that were saved"),
        (lambda f: cut(f / STATE_FILE), "train_state.json"),
        (lambda f: (f / CONFIG_FILE).unlink(), "run_config.yaml"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json: damaged"),
    ],
)
def test_a_damaged_one_is_passed_over_with_one_line(save, capsys, harm, reason):
    harm(save / "iter_0000030")
    assert chosen(save) == "iter_0000020"
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert re.search(f"^iter_0000030 is passed over: .*{reason}", out), out


def test_without_a_manifest_sizes_come_from_the_metadata(save):
    for folder in save.glob("iter_*"):
        (folder / "manifest.json").unlink()
    assert chosen(save) == "iter_0000030"
    cut(tensor_file(save / "iter_0000030"))
    assert chosen(save) == "iter_0000020"


def test_nothing_saved_and_nothing_whole(save, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "iter_0000005.partial").mkdir()  # what a killed save leaves
    assert chosen(empty) is None
    assert chosen(empty / "not there") is None
    for folder in save.glob("iter_*"):
        tensor_file(folder).unlink()
    with pytest.raises(UserError, match="no checkpoint in it is whole"):
        chosen(save)


def test_a_save_that_was_being_replaced(save):
    """Killed between the two renames of a step that is saved again: the old folder is there under its other name."""
    (save / "iter_0000030").rename(save / "iter_0000030.replaced")
    shutil.rmtree(save / "iter_0000010")
    shutil.rmtree(save / "iter_0000020")
    assert chosen(save) == "iter_0000030.replaced"
