"""Bytes that this process's saves and loads have moved: one that moves bytes is slow, and no hang (training/watchdog.py)."""

_moved = 0


def moved(count: int) -> None:
    """Called by whatever reads or writes a checkpoint, from any thread; that two of them at once may count one is no harm."""
    global _moved
    _moved += count


def bytes_moved() -> int:
    return _moved
