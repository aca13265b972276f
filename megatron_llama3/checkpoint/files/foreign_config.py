"""Config files that someone else wrote: JSON objects whose values are held to the types of ModelConfig's fields."""

import json
import math
from pathlib import Path

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig

_EXPECTED = {int: "whole number above 0", float: "number above 0", bool: "true or false"}


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UserError for a missing file and for any other content."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: the file is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def as_field(name: str, value: object, key: str, where: object) -> int | float | bool:
    """`value` in the type of ModelConfig's field `name`: JSON does not tell 8 from 8.0. Raises UserError naming `where` and `key`."""
    return as_type(type(getattr(ModelConfig(), name)), value, key, where)


def as_type(kind: type, value: object, key: str, where: object) -> int | float | bool:
    """`value` as a bool, or as an int or float above 0 that loses nothing. Raises UserError naming `where` and `key`."""
    fits = isinstance(value, bool) == (kind is bool) and isinstance(value, int | float)
    if fits and kind is not bool:
        fits = 0 < value < math.inf and value == kind(value)
    if not fits:
        raise UserError(f"{where}: {key} is {value!r}, no {_EXPECTED[kind]}")
    return kind(value)
