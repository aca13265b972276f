"""A trained classifier as one file: arrays and their configuration, written whole or not at all, refused where they do not fit."""

import hashlib
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.storage.files import whole_file

# Goes up whenever words, hashes or features change: an old model would read noise.
FEATURES_VERSION = 1
# Imported when used: they import this module to save themselves, and transformers takes seconds.
CLASSIFIERS = {
    "linear": "megatron_llama3.curation.classifiers.linear:LinearClassifier",
    "pretrained": "megatron_llama3.curation.classifiers.pretrained:PretrainedClassifier",
}


def save_classifier(path: str | Path, kind: str, config: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes an `.npz` with a JSON description in it."""
    description = {"kind": kind, "features": FEATURES_VERSION, "config": config, "sha256": _checksum(arrays)}
    buffer = io.BytesIO()
    np.savez(buffer, description=np.frombuffer(json.dumps(description).encode(), dtype=np.uint8), **arrays)
    with whole_file(path) as file:
        file.write(buffer.getvalue())


def classifier_class(kind: str) -> type:
    """Raises UserError where what it needs is not installed."""
    module, _, name = CLASSIFIERS[kind].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"kind {kind}: {error}; pip install '.[curation,convert]' in the project's folder") from error


def load_classifier(path: str | Path):
    """A linear or a pretrained classifier, as the file says. Raises UserError where it is none, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(arrays.pop("description").tobytes())
        kind, version, config, checksum = (description[key] for key in ("kind", "features", "config", "sha256"))
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise UserError(f"model {path}: is no classifier of tools/train_quality.py ({error}); train one") from error
    if version != FEATURES_VERSION:
        raise UserError(f"model {path}: was trained with version {version} of the features, this is {FEATURES_VERSION}; train it again")
    if checksum != _checksum(arrays):
        raise UserError(f"model {path}: its weights do not match their checksum; the file is damaged, train it again")
    if kind not in CLASSIFIERS:
        raise UserError(f"model {path}: is of kind {kind!r}; known are {', '.join(CLASSIFIERS)}")
    try:
        return classifier_class(kind).from_arrays(config, arrays)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model {path}: its weights do not fit its configuration ({error}); train it again") from error


def load_for_task(path: str | Path):
    """As `load_classifier`, where many tasks run on a machine: each is one core, and so the numbers are the same on all of them."""
    classifier = load_classifier(path)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return classifier


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
