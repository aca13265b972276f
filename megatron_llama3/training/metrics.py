"""What a person watching a run sees: lines, on a terminal as wide as that and above a progress bar; and the same numbers as JSON lines and
in Weights & Biases (offline unless told otherwise) and TensorBoard. Rank 0 writes."""

import resource
import shutil
import sys
import time

import torch
from tqdm import tqdm

from megatron_llama3.config.run import RunConfig
from megatron_llama3.model.counts import flops_per_token
from megatron_llama3.training.events import METRICS_FILE, line_file, log_folder
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult
from megatron_llama3.training.tensorboard import TensorBoard
from megatron_llama3.training.wandb_run import WandB

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "GB200": 2500.0,
    "B200": 2250.0,
}
"""Dense bf16 tensor-core TFLOP/s by the vendor's sheets, by a part of the device's name; the first that fits counts."""


class MetricsLogger:
    """A hook for `training.loop.train`."""

    def __init__(self, config: RunConfig, state: TrainState):
        self.config = config
        self.peak_tflops = _peak_tflops()
        folder = log_folder(config)
        self.path = folder / METRICS_FILE if folder is not None else None
        self.lines = line_file(self.path) if self.path is not None else None
        self.wandb = WandB(config) if config.logging.wandb_project is not None else None
        self.tensorboard = TensorBoard(config.logging.tensorboard_dir, state.iteration + 1) if config.logging.tensorboard_dir else None
        self.bar = None
        if sys.stdout.isatty():
            self.bar = tqdm(total=config.training.train_iters, initial=state.iteration, unit="step", file=sys.stdout, dynamic_ncols=True)
        self.since, self.tokens, self.steps, self.losses = time.monotonic(), 0, 0, []

    def __call__(self, state: TrainState, result: StepResult, is_last: bool) -> None:
        self.tokens += result.global_batch_size * result.seq_length
        self.steps += 1
        if result.skipped is None:
            self.losses.append(result.loss)
        else:
            self.print_line(f"iteration {state.iteration} | step skipped, {state.skipped_in_a_row} in a row: {result.skipped}")
        if result.layer_gradient_norms is not None:
            norms = {f"gradient_norm/{part}": norm for part, norm in result.layer_gradient_norms.items()}
            self._record({"iteration": state.iteration, "consumed_tokens": state.consumed_tokens} | norms)
        if state.iteration % self.config.logging.log_interval == 0 or is_last:
            self._write(state, result)
        if self.bar is not None:
            self.bar.update()

    def evaluated(self, state: TrainState, loss: float) -> None:
        """Notes the loss on the validation split."""
        self.print_line(f"iteration {state.iteration} | validation loss {loss:.4f}")
        self._record({"iteration": state.iteration, "consumed_tokens": state.consumed_tokens, "validation_loss": loss})

    def sampled(self, state: TrainState, texts: list[str]) -> None:
        """Notes what the model wrote."""
        for text in texts:
            self.print_line(f"iteration {state.iteration} | sample: {text!r}")
        self._record({"iteration": state.iteration, "consumed_tokens": state.consumed_tokens, "samples": "\n\n".join(texts)})

    def training_paused(self, seconds: float) -> None:
        """Between the last step and the next something else was done, which is no training time."""
        self.since += seconds  # as if the interval of these metrics had begun later

    def saved(self, state: TrainState, stall_seconds: float) -> None:
        """Notes a checkpoint, and for how long training stood still for it (the rest is written in the background)."""
        self.print_line(f"iteration {state.iteration} | saving a checkpoint, training stood still for {stall_seconds:.2f} s")
        self._record({"iteration": state.iteration, "consumed_tokens": state.consumed_tokens, "save_stall_seconds": stall_seconds})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.lines is not None:
            self.lines.close()
        if self.wandb is not None:
            self.wandb.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self, state: TrainState, result: StepResult) -> None:
        now = time.monotonic()
        seconds, ranks = now - self.since, self.config.parallel.world_size
        tokens_per_second = self.tokens / seconds
        record = {
            "iteration": state.iteration,
            "consumed_tokens": state.consumed_tokens,
            "lr": result.lr,
            "global_batch_size": result.global_batch_size,
            "seq_length": result.seq_length,
            "seconds_per_step": seconds / self.steps,
            "tokens_per_second": tokens_per_second,
            "memory_bytes": _memory_bytes(),
            "useful_seconds": state.useful_seconds,
        }
        if self.losses:
            record["loss"] = sum(self.losses) / len(self.losses)
        if result.skipped is None:
            record["gradient_norm"] = result.gradient_norm
        if len(self.losses) < self.steps:
            record["skipped_steps"] = self.steps - len(self.losses)
        # Per rank and second; the model FLOPs of the paper's MFU, recomputation not counted.
        for kind in ("full", "causal"):
            flops = flops_per_token(self.config.model, result.seq_length, causal=kind == "causal")
            record[f"tflops_per_rank_{kind}_attention"] = tokens_per_second * flops / ranks / 1e12
            if self.peak_tflops is not None:
                record[f"mfu_{kind}_attention"] = record[f"tflops_per_rank_{kind}_attention"] / self.peak_tflops
        steps_left = self.config.training.train_iters - state.iteration
        self._show(record, seconds / self.steps * steps_left)
        self._record(record)
        self.since, self.tokens, self.steps, self.losses = now, 0, 0, []

    def _show(self, record: dict, seconds_left: float) -> None:
        iteration = f"iteration {record['iteration']}/{self.config.training.train_iters}"
        parts = [
            f"loss {record['loss']:.4f}" if "loss" in record else "no loss",
            f"grad norm {record['gradient_norm']:.3f}" if "gradient_norm" in record else "no grad norm",
            f"lr {record['lr']:.3e}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            _both_kinds(record, "tflops_per_rank", "{:.3g}") + " TFLOP/s a rank",
        ]
        if self.peak_tflops is not None:
            parts.append("MFU " + _both_kinds(record, "mfu", "{:.1%}"))
        parts += [f"{record['memory_bytes'] / 2**30:.2f} GiB"]
        if self.bar is not None:  # which says how long it will take
            self.print_line(_as_wide_as([iteration, *parts], shutil.get_terminal_size().columns))
            return
        print(" | ".join([iteration, f"{record['consumed_tokens']:,} tokens", *parts, f"{_clock(seconds_left)} left"]), flush=True)

    def print_line(self, line: str) -> None:
        """One line, above the progress bar if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def _record(self, record: dict) -> None:
        if self.lines is not None:
            self.lines.add(record | {"time": time.time()})
        if self.wandb is not None:
            self.wandb.add(record)
        if self.tensorboard is not None:
            self.tensorboard.add(record)


def _as_wide_as(parts: list[str], columns: int) -> str:
    """The parts that fit into one line of a terminal, without those that would go beyond it."""
    line, *rest = parts
    for part in rest:
        longer = f"{line} | {part}"
        line = longer if len(longer) <= columns else line
    return line


def _both_kinds(record: dict, key: str, form: str) -> str:
    """By counting the query-key pairs that a causal mask leaves, and by counting all of them."""
    causal, full = (form.format(record[f"{key}_{kind}_attention"]) for kind in ("causal", "full"))
    return f"{causal} causal/{full} full"


def _peak_tflops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _memory_bytes() -> int:
    """The most that was allocated on the GPU, or without one the process's largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
