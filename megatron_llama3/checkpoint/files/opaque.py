"""Pickles of which a few values are of interest and the rest may be anything: other classes become objects that do nothing."""

from collections.abc import Iterator, Mapping


class Opaque:
    """In the place of an object of a class that is not known here. It takes whatever a pickle does with the real one, and keeps nothing."""

    def __init__(self, *args, **kwargs): ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return "a value of a class that is not read"


class OthersOpaque(Mapping):
    """For `torch_archive.unpickle`: the globals given, and Opaque for every other. No code that a file names is ever looked up."""

    def __init__(self, known: Mapping[tuple[str, str], object]):
        self.known = known

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: tuple[str, str]) -> object:
        return self.known.get(key, Opaque)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)
