"""Config files that someone else wrote: JSON objects whose values are held to the types of ModelConfig's fields."""

import json
import reprlib
from pathlib import Path

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig

_BOUND = 2**63  # nothing that a config counts or multiplies by is larger, and tensors have no larger sizes
_MOST_BYTES = 4 << 20  # the index of 405B has 100 thousand; as objects a file of JSON can be 30 times as large
_EXPECTED = {int: "whole number above 0", float: "number above 0", bool: "true or false"}


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError for a missing file and for any other content."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, a config has a few thousand")
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: the file is missing") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def as_field(name: str, value: object, key: str, where: object) -> int | float | bool:
    """`value` in the type of ModelConfig's field `name`: JSON does not tell 8 from 8.0. Raises UserError naming `where` and `key`."""
    return as_type(type(getattr(ModelConfig(), name)), value, key, where)


def as_type(kind: type, value: object, key: str, where: object) -> int | float | bool:
    """`value` as a bool, or as an int or float above 0 and below 2**63 that loses nothing. Raises UserError naming `where` and `key`."""
    fits = isinstance(value, bool) == (kind is bool) and isinstance(value, int | float)
    if fits and kind is not bool:
        fits = 0 < value < _BOUND and value == kind(value)
    if not fits:
        raise UserError(f"{where}: {key} is {reprlib.repr(value)}, no {_EXPECTED[kind]}")
    return kind(value)
