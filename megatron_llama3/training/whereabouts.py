"""What a thread is doing, read off its stack: the phase of training, the collective it is in, and whether it only waits for other ranks.

Nothing in the training code has to report it, so it is right also where nobody thought of reporting.
"""

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

# (file, function) -> what a person calls it
PHASES = {
    ("loader.py", "next_batch"): "reading data",
    ("loader.py", "read_ahead"): "reading ahead",
    ("microbatch.py", "make_microbatches"): "making micro-batches",
    ("engine.py", "forward_backward"): "forward and backward",
    ("pipeline_parallel.py", "_forward"): "forward",
    ("pipeline_parallel.py", "_backward"): "backward",
    ("pipeline_parallel.py", "_weight_half"): "weight gradients",
    ("engine.py", "clip_gradients"): "gradient norm",
    ("engine.py", "_sum_over_last_stage"): "summing the loss",
    ("hooks.py", "evaluate"): "evaluation",
    ("stop.py", "after"): "agreeing on whether to stop",
    ("store.py", "save"): "save",
    ("store.py", "wait"): "waiting for a save",
    ("store.py", "load_checkpoint"): "loading a checkpoint",
    ("store.py", "load_hf_weights"): "loading a checkpoint",
    ("storage.py", "await_storage"): "waiting for storage",
    **{(f"{engine}_engine.py", name): phase for engine in ("fsdp2", "deepspeed") for name, phase in (
        ("finish_gradients", "gradient reduction"), ("optimizer_step", "optimizer"),
    )},
}  # fmt: skip
TORCH_PHASES = {("convert_frame.py", "_compile"): "compiling", ("compile_fx.py", "_compile_fx_inner"): "compiling"}
"""of torch._dynamo and torch._inductor"""
SAVE, LOAD, COMPILING, STORAGE = "save", "loading a checkpoint", "compiling", "waiting for storage"
SAVING = (SAVE, "waiting for a save")
MOVING = (*SAVING, LOAD)
"""Phases of which a watcher sees by the bytes they move that they come further."""
_SAVING_THREADS = ("checkpoint-file", "AsyncCheckpointExecutor", "checkpoint")
"""Names, without their numbers, of those that write a save in the background; each waits for the one before it."""

# Where the main thread of a GPU run stands while the device works off its queue.
SYNCHRONIZING = {("engine.py", name) for name in ("forward_backward", "_global_count", "clip_gradients")}


class Place(NamedTuple):
    phase: str
    """such as "forward and backward, forward of micro-batch 3 in chunk 1" """
    call: str
    """the innermost function, or the collective and who called it, such as "all_reduce in reduce_from_group (collectives.py:61)" """
    is_waiting: bool
    """whether it stands in a call that other ranks must answer"""
    is_training: bool = False
    """whether that is part of a training step"""

    def __str__(self) -> str:
        return f"{self.phase}: {self.call}"


def place_of_thread(thread: int, on_gpu: bool = False) -> Place:
    """Where a thread of this process is right now; `thread` is its `threading.get_ident()`."""
    frame = sys._current_frames().get(thread)
    place = _place([] if frame is None else list(traceback.walk_stack(frame)), on_gpu)
    if place.is_waiting or not place.phase.endswith(SAVING):
        return place
    background = _place_of_background_save()
    return place if background is None else place._replace(call=background.call, is_waiting=background.is_waiting)


def _place_of_background_save() -> Place | None:
    """Of the thread that others of this process wait for; None where none works."""
    frames = sys._current_frames()
    threads = {thread.name.rpartition("_")[0]: thread.ident for thread in threading.enumerate()}
    for name in _SAVING_THREADS:
        frame = frames.get(threads.get(name))
        if frame is not None and frame.f_code.co_name != "_worker":  # where a pool's thread waits for work
            return _place(list(traceback.walk_stack(frame)))
    return None


def place_of_error(error: BaseException) -> Place:
    """Where it was raised."""
    return _place(list(traceback.walk_tb(_innermost(error)))[::-1])


def _innermost(error: BaseException) -> TracebackType | None:
    while error.__cause__ is not None:
        error = error.__cause__
    return error.__traceback__


def _place(stack: list[tuple[FrameType, int]], on_gpu: bool = False) -> Place:
    """`stack` is innermost first."""
    if not stack:
        return Place("not running", "no frame", False)
    phases = [_phase(frame) for frame, _ in reversed(stack)]
    is_training = any(frame.f_code.co_name == "train_step" for frame, _ in stack)
    collective = ""
    for depth, (frame, line) in enumerate(stack):
        code = frame.f_code
        if code.co_filename.endswith("distributed_c10d.py"):
            collective = code.co_name if code.co_name != "wrapper" else collective
        elif not _is_in(frame, "torch") and not code.co_filename.endswith("contextlib.py"):
            call = f"{code.co_name} ({Path(code.co_filename).name}:{line})"
            return Place(_join(phases), f"{collective} in {call}" if collective else call, _waits(stack[: depth + 1], on_gpu), is_training)
    return Place(_join(phases), collective or stack[0][0].f_code.co_name, _waits(stack, on_gpu), is_training)


def _waits(stack: list[tuple[FrameType, int]], on_gpu: bool) -> bool:
    code = stack[0][0].f_code
    here = Path(code.co_filename).name, code.co_name
    if here[0] == "pipeline_parallel.py" or (on_gpu and here in SYNCHRONIZING):
        return True
    return any(_is_in(frame, "torch.distributed") for frame, _ in stack)


def _is_in(frame: FrameType, package: str) -> bool:
    return (frame.f_globals.get("__name__", "") + ".").startswith(package + ".")


def _phase(frame: FrameType) -> str | None:
    code = frame.f_code
    where = Path(code.co_filename).name, code.co_name
    name = PHASES.get(where) or TORCH_PHASES.get(where)
    action = frame.f_locals.get("action") if name in ("forward", "backward", "weight gradients") else None
    return name if action is None else f"{name} of micro-batch {action.microbatch} in chunk {action.chunk}"


def _join(phases: list[str | None]) -> str:
    known = list(dict.fromkeys(phase for phase in phases if phase is not None))
    return ", ".join(known) or "between phases"
