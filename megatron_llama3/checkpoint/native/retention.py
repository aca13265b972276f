"""--keep-last and --keep-every: which older checkpoints a run deletes after a save, and how."""

import re
import shutil
from pathlib import Path

from megatron_llama3.checkpoint.native.folder import read_train_state
from megatron_llama3.checkpoint.native.manifest import damage
from megatron_llama3.config.run import CheckpointConfig

# Names that a checkpoint folder has for a time, after its own.
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"


def delete_older(newest: Path, options: CheckpointConfig, protected: Path | None = None, whole: set[Path] | None = None) -> list[Path]:
    """Deletes what --keep-last and --keep-every do not keep of the whole checkpoints beside `newest`, which was just published, and older
    than it. `protected` (a resolved path) and what is damaged, which a person should look at, stay; so does the newest one that was not
    saved amid skipped steps, to which a rollback goes. Returns the folders that are gone.

    `whole` are those that were found whole before, and are added to: the files of each are looked at once in a run, not after each save.
    """
    whole = set() if whole is None else whole
    whole.add(newest)
    if options.keep_last is None and options.keep_every is None:
        return []
    kept, gone = 1, []
    has_sound = _is_sound(newest)
    for iteration, folder in _older(newest):
        if folder not in whole and damage(folder) is not None:
            continue
        whole.add(folder)
        kept += 1
        is_newest_sound = not has_sound and _is_sound(folder)
        has_sound = has_sound or is_newest_sound
        is_kept_forever = options.keep_every is not None and iteration % options.keep_every == 0
        if kept > (options.keep_last or 1) and not is_kept_forever and not is_newest_sound and folder.resolve() != protected:
            remove_folder(folder)
            gone.append(folder)
    return gone


def remove_folder(folder: Path) -> None:
    """Takes the name away first, so that nothing half-deleted has it."""
    aside = folder.with_name(folder.name + DELETED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def remove_leftovers(save: Path) -> None:
    """Clears up after a killed run: saves and deletions that were not finished. A folder about to be replaced gets its name back."""
    for path in save.glob("iter_*.*"):
        final = path.with_suffix("")
        if path.suffix == REPLACED and not final.exists():
            path.rename(final)
        elif path.suffix in (PARTIAL, DELETED, REPLACED):
            shutil.rmtree(path, ignore_errors=True)


def _is_sound(folder: Path) -> bool:
    return not read_train_state(folder).get("skipped_in_a_row")


def _older(newest: Path) -> list[tuple[int, Path]]:
    """(iteration, folder), newest first."""
    found = [(int(path.name[5:]), path) for path in newest.parent.iterdir() if re.fullmatch(r"iter_\d{7,}", path.name)]
    return sorted(((i, path) for i, path in found if i < int(newest.name[5:])), reverse=True)
