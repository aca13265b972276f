"""What lies where in a --save folder: `iter_0000500/` with a run's config and state beside the tensors, and what names the latest."""

import json
from pathlib import Path

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.storage import user_error

LATEST_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
STATE_FILE = "train_state.json"
TOKENIZER_FOLDER = "tokenizer"  # tokenizer files and generation_config.json that came with converted weights
_MOST_DIGITS = 15
WITHOUT_DATA = "has_no_data_position"  # in the train state of a run that was converted with its optimizer
COUNTS = ("iteration", "consumed_samples", "consumed_tokens")  # in every train state


def resolve_native(path: str | Path) -> Path:
    """The folder of one iteration: `path` itself, or the one that `latest_checkpointed_iteration.txt` names. Raises UserError."""
    path = Path(path)
    latest = path / LATEST_FILE
    if not latest.is_file():
        if not (path / ".metadata").is_file():
            raise UserError(f"{path}: no native checkpoint (neither {LATEST_FILE} nor .metadata is there)")
        return path
    iteration = latest_iteration(path)
    if iteration is None:
        raise UserError(f"{latest}: {latest.read_text(errors='replace').strip()[:40]!r} is not an iteration number")
    folder = path / f"iter_{iteration:07d}"
    if not folder.is_dir():
        raise UserError(f"{latest}: names iteration {iteration}, but {folder} is missing")
    return folder


def latest_iteration(save: Path) -> int | None:
    """The number in `latest_checkpointed_iteration.txt`; None where it holds none."""
    text = (save / LATEST_FILE).read_text(errors="replace").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def read_train_state(folder: Path) -> dict:
    """Iteration, counts, and of a training run data position and random state. Raises UserError if the file is missing or damaged."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise user_error(error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    for name in COUNTS:
        if not isinstance(state, dict) or type(state.get(name)) is not int or not 0 <= state[name] < 10**_MOST_DIGITS:
            raise UserError(f"{path}: damaged: no whole number {name}")
    return state
