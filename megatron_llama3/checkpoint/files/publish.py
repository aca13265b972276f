"""Folders that are whole or absent: written aside as `NAME.partial`, synced, then renamed."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from megatron_llama3.config.errors import UserError


@contextmanager
def publish_folder(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields an empty folder beside `final` to write into; renames it to `final` when the block ends well, removes it when not.

    Raises UserError if `final` exists and is not an empty folder, if the disk has no room for `needed_bytes`, or if it fills up on the way.
    A folder that a killed process left behind is called `NAME.partial` and is replaced by the next run.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists already: name another folder, or remove it first")
    aside = final.with_name(final.name + ".partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    if aside.exists():
        shutil.rmtree(aside)
    free = shutil.disk_usage(final.parent).free
    if free < needed_bytes:
        raise UserError(f"{final}: {needed_bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on this disk")
    try:
        aside.mkdir()
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        os.rename(aside, final)
        sync(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{final}: {error.strerror} while writing; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Forces a file or folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_in_parallel(tasks: Sequence[Callable[[], None]], workers: int | None = None) -> None:
    """Runs one task a file on threads (copying, checksums and writing leave Python's lock); a failure stops the rest and is raised."""
    with ThreadPoolExecutor(max_workers=workers or min(4, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(task) for task in tasks]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        for future in done:
            future.result()
