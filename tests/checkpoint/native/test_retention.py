"""Which checkpoints --keep-last and --keep-every delete, and that a deletion that is cut short leaves nothing under a final name."""

import json
import shutil

import pytest

from megatron_llama3.checkpoint.native import retention
from megatron_llama3.checkpoint.native.manifest import damage, read_manifest, write_manifest
from megatron_llama3.checkpoint.native.retention import delete_older, remove_leftovers
from megatron_llama3.config.run import CheckpointConfig


def left(save) -> list[int]:
    return sorted(int(path.name[5:]) for path in save.glob("iter_*"))


@pytest.mark.parametrize(
    ("newest", "last", "every", "protected", "expected"),
    [
        (30, None, None, None, [10, 20, 30]),
        (30, 1, None, None, [30]),
        (30, 2, None, None, [20, 30]),
        (30, 3, None, None, [10, 20, 30]),
        (30, None, 20, None, [20, 30]),
        (30, 2, 10, None, [10, 20, 30]),
        (30, 1, 7, None, [30]),
        (30, 1, None, 10, [10, 30]),
        (20, 1, None, None, [20, 30]),  # a run that went back: what is newer is not its to delete
    ],
)
def test_what_is_kept(save, newest, last, every, protected, expected):
    options = CheckpointConfig(save=str(save), keep_last=last, keep_every=every)
    gone = delete_older(save / f"iter_{newest:07d}", options, protected and (save / f"iter_{protected:07d}").resolve())
    assert left(save) == expected
    assert len(gone) == 3 - len(expected)


def test_a_damaged_one_is_neither_counted_nor_deleted(save):
    (save / "iter_0000020" / "__0_0.distcp").unlink()
    delete_older(save / "iter_0000030", CheckpointConfig(keep_last=2))
    assert left(save) == [10, 20, 30]


def test_what_a_rollback_goes_to_is_kept(save):
    """Saves amid skipped steps do not push out the last one before them."""
    for iteration in (20, 30):
        folder = save / f"iter_{iteration:07d}"
        state = json.loads((folder / "train_state.json").read_text())
        (folder / "train_state.json").write_text(json.dumps(state | {"skipped_in_a_row": 1}))
        write_manifest(folder, read_manifest(folder))
    delete_older(save / "iter_0000030", CheckpointConfig(keep_last=1))
    assert left(save) == [10, 30]


def test_cut_short(save, monkeypatch):
    """Killed after each file that it deletes: what has a final name is whole, and the next start clears up."""
    whole = shutil.rmtree

    def dies_half_way(path, **options):
        if path.exists():
            next(path.glob("*.distcp")).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(retention.shutil, "rmtree", dies_half_way)
    with pytest.raises(KeyboardInterrupt):
        delete_older(save / "iter_0000030", CheckpointConfig(keep_last=1))
    monkeypatch.setattr(retention.shutil, "rmtree", whole)
    names = {path.name for path in save.glob("iter_*")}
    assert names == {"iter_0000010", "iter_0000020.deleted", "iter_0000030"}
    assert all(damage(save / name) is None for name in names if "." not in name)
    remove_leftovers(save)
    assert left(save) == [10, 30]


def test_leftovers(save):
    for name in ("iter_0000040.partial", "iter_0000010.replaced"):
        (save / name).mkdir()
    (save / "iter_0000020").rename(save / "iter_0000020.replaced")
    remove_leftovers(save)
    assert left(save) == [10, 20, 30]
    assert damage(save / "iter_0000020") is None


def test_files_of_a_checkpoint_are_looked_at_once_in_a_run(save, monkeypatch):
    looked_at = []
    monkeypatch.setattr(retention, "damage", lambda folder: looked_at.append(folder.name))
    whole = set()
    for _ in range(3):
        delete_older(save / "iter_0000030", CheckpointConfig(keep_last=9), whole=whole)
    assert looked_at == ["iter_0000020", "iter_0000010"]
