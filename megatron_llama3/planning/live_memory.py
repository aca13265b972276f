"""Counts the bytes of every tensor storage that is alive, real or fake: what an allocator would hold if it lost nothing."""

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered, storages that operations return are counted until they die, or are resized to nothing as FSDP2 does.

    `live` and `peak` in bytes; set `peak` to `live` to begin a new measurement. `born`: storages counted so far, dead ones too.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.born = 0
        self._sizes: dict[int, int] = {}
        self._births: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local part comes by here on its own
        result = self.answer(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self._note(leaf.untyped_storage())
        return result

    def live_of_later(self, born: int) -> int:
        """Bytes alive of the storages that came after the first `born`, whatever becomes of the earlier ones meanwhile."""
        return sum(self._sizes[key] for key, birth in list(self._births.items()) if birth > born and key in self._sizes)

    def answer(self, func, args, kwargs):
        """The operation itself; fake_run.py answers some in its place."""
        return func(*args, **kwargs)

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self.born += 1
            self._sizes[key], self._births[key] = 0, self.born
            self._set(key, storage.nbytes())
            weakref.finalize(storage, self._forget, key).atexit = False

    def _resized(self, storage: torch.UntypedStorage, size: int):
        result = self._resize(storage, size)
        if storage._cdata in self._sizes:
            self._set(storage._cdata, size)
        else:
            self._note(storage)
        return result

    def _set(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._births[key]
