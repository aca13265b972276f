"""What lies where in a --save folder: `iter_0000500/` with a run's config and state beside the tensors, and what names the latest."""

import json
from pathlib import Path

from megatron_llama3.config.errors import UserError

LATEST_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
STATE_FILE = "train_state.json"
COUNTS = ("iteration", "consumed_samples", "consumed_tokens")  # in every train state


def resolve_native(path: str | Path) -> Path:
    """The folder of one iteration: `path` itself, or the one that `latest_checkpointed_iteration.txt` names. Raises UserError."""
    path = Path(path)
    latest = path / LATEST_FILE
    if not latest.is_file():
        if not (path / ".metadata").is_file():
            raise UserError(f"{path}: no native checkpoint (neither {LATEST_FILE} nor .metadata is there)")
        return path
    text = latest.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{latest}: {text[:40]!r} is not an iteration number")
    folder = path / f"iter_{int(text):07d}"
    if not folder.is_dir():
        raise UserError(f"{latest}: names iteration {text}, but {folder} is missing")
    return folder


def read_train_state(folder: Path) -> dict:
    """Iteration, counts, and of a training run data position and random state. Raises UserError if the file is missing or damaged."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    for name in COUNTS:
        if not isinstance(state, dict) or type(state.get(name)) is not int:
            raise UserError(f"{path}: damaged: no whole number {name}")
    return state
