"""The files of the run: its data whole, its checkpoint folder shared and with room."""

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.validate import missing_inputs
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.sidecar import describe_damaged_block, read_sidecar
from megatron_llama3.model.counts import parameter_count

from .meeting import Meeting, first_line, say
from .place import NODE, PATIENCE, RANK, RANKS_PER_NODE, WORLD_SIZE

CHECKED_BLOCKS = 2  # of each dataset and rank: many ranks read much of it, and none reads long
MARKER = ".preflight"
GIB = 2**30


def run_config(argv: list[str]) -> RunConfig:
    """The run's config, held to the files of this machine too. Parsed as a dry run, which may imagine another --world-size."""
    config = parse_run_config([*argv, "--dry-run"])
    if missing := list(missing_inputs(config)):
        raise UserError("\n".join(missing))
    return config


def file_failures(meeting: Meeting, config: RunConfig) -> list[str]:
    """What this rank finds wrong. All look at a few blocks of the data, one of each node at its index and at the checkpoint folder too."""
    data, save, of_node = config.data, config.checkpoint.save, RANK % RANKS_PER_NODE == 0
    entries = [*data.data_path, *data.train_data_path, *data.valid_data_path]
    failures = []
    for prefix in dict.fromkeys(entry for entry in entries if os.path.exists(f"{entry}.idx")):
        failures += refusal_of(lambda prefix=prefix: IndexedDataset(prefix)) if of_node else []
        failures += refusal_of(lambda prefix=prefix: check_blocks(prefix))
    if save is not None and RANK == 0:
        failures += refusal_of(lambda: make_room(Path(save), checkpoint_bytes(config)))
    elif save is not None and of_node:
        meeting.store.wait(["files/0"], timedelta(seconds=PATIENCE))
        if not (Path(save) / MARKER).exists():
            failures.append(f"--save {save} is not shared: {NODE} does not see what rank 0 wrote there")
    return failures


def refusal_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (UserError, OSError) as error:
        return [f"{first_line(error)} (on {NODE})"]
    return []


def check_blocks(prefix: str) -> None:
    """Compares the rank's share of PREFIX.bin with its checksums. Raises UserError."""
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return
    expected = sidecar["files"]["bin"]
    blocks = len(expected["crc32"])
    looked_at = min(blocks, CHECKED_BLOCKS * WORLD_SIZE)
    for i in range(RANK, looked_at, WORLD_SIZE):
        if damage := describe_damaged_block(f"{prefix}.bin", expected, i * blocks // looked_at):
            raise UserError(f"{damage}; make the dataset again, or copy it again")


def checkpoint_bytes(config: RunConfig) -> int:
    """Master weights and Adam's two moments."""
    return 3 * parameter_count(config.model) * (8 if config.optimizer.fp64 else 4)


def make_room(save: Path, needed: int) -> None:
    """Makes the folder and the file by which other nodes know it. Raises UserError where there is no room for one more checkpoint."""
    save.mkdir(parents=True, exist_ok=True)
    (save / MARKER).touch()
    free = shutil.disk_usage(save).free
    if free < needed:
        raise UserError(f"--save {save}: {free / GIB:.1f} GiB are free, a checkpoint takes {needed / GIB:.1f}: make room or name another")
    say(f"--save {save}: {free / GIB:,.1f} GiB free, a checkpoint takes {needed / GIB:,.2f}")
