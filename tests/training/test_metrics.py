"""What a run leaves to be read: a line on the console, the same numbers as JSON lines, and in Weights & Biases' own format."""

import fcntl
import json
import os
import re
import struct
import sys
import termios
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from megatron_llama3.config.run import RunConfig
from megatron_llama3.model.counts import flops_per_token
from megatron_llama3.training import metrics, wandb_run
from megatron_llama3.training.metrics import MetricsLogger
from megatron_llama3.training.state import TrainState
from megatron_llama3.training.step import StepResult

BATCH, LENGTH, RANKS = 4, 32, 2


def config_for(tmp_path, **logging) -> RunConfig:
    config = RunConfig()
    config.parallel.world_size = RANKS
    config.training.train_iters = 6
    config.logging.log_interval = 2
    config.logging.log_dir = str(tmp_path)
    for name, value in logging.items():
        setattr(config.logging, name, value)
    return config


def log_two_steps(config: RunConfig, monkeypatch) -> list[dict]:
    """Two steps that took four seconds, of which one was a pause; then an evaluation."""
    clock = iter([100.0, 104.0])
    state = TrainState()
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
        logger = MetricsLogger(config, state)
        logger.training_paused(1.0)
        for step, loss in ((1, 5.0), (2, 4.0)):
            state.iteration, state.consumed_tokens = step, step * BATCH * LENGTH
            logger(state, StepResult(loss, 0.5, 1e-3 * step, BATCH, LENGTH), False)
    logger.evaluated(state, 4.25)
    logger.close()
    return [json.loads(line) for line in logger.path.read_text().splitlines()]


def test_the_record_holds_what_happened_since_the_last_one(tmp_path, monkeypatch, capsys):
    config = config_for(tmp_path)
    monkeypatch.setattr(metrics, "_peak_tflops", lambda: 989.0)
    step, evaluation = log_two_steps(config, monkeypatch)
    assert (step["iteration"], step["consumed_tokens"], step["loss"], step["lr"]) == (2, 2 * BATCH * LENGTH, 4.5, 2e-3)
    assert (step["gradient_norm"], step["global_batch_size"], step["seq_length"]) == (0.5, BATCH, LENGTH)
    assert step["seconds_per_step"] == pytest.approx(1.5)
    assert step["tokens_per_second"] == pytest.approx(2 * BATCH * LENGTH / 3)
    for kind in ("full", "causal"):
        tflops = 2 * BATCH * LENGTH / 3 * flops_per_token(config.model, LENGTH, causal=kind == "causal") / RANKS / 1e12
        assert step[f"tflops_per_rank_{kind}_attention"] == pytest.approx(tflops)
        assert step[f"mfu_{kind}_attention"] == pytest.approx(tflops / 989)
    assert step["memory_bytes"] > 2**20
    assert step["memory_bytes"] % 1024 == 0, "the kernel counts in KiB"
    assert abs(step["time"] - time.time()) < 600
    assert evaluation["validation_loss"] == 4.25
    line, *_ = capsys.readouterr().out.splitlines()
    memory = f"{step['memory_bytes'] / 2**30:.2f} GiB"
    for part in (memory, "iteration 2/6", "256 tokens", "loss 4.5000", "grad norm 0.500", "85 tokens/s", "MFU", "0:00:06 left"):
        assert part in line


def test_a_gpu_is_known_by_the_most_telling_part_of_its_name(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA GB200": 2500.0, "NVIDIA B200": 2250.0, "Tesla T4": None}
    names |= {"NVIDIA H100 NVL": 835.0, "NVIDIA H200": 989.0, "NVIDIA H200 NVL": 835.0, "NVIDIA A100-SXM4-80GB": 312.0}
    monkeypatch.setattr(metrics.torch.cuda, "is_available", lambda: True)
    for name, peak in names.items():
        monkeypatch.setattr(metrics.torch.cuda, "get_device_name", lambda name=name: name)
        assert metrics._peak_tflops() == peak


def test_lines_reach_a_log_file_at_once(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("builtins.print", lambda *text, flush=False: flushed.append(flush))
    log_two_steps(config_for(tmp_path), monkeypatch)
    assert flushed == [True, True]


@contextmanager
def terminal(monkeypatch):
    """In the place of standard output, of 100 columns; what it yields returns the lines that stand on it, the last without its end."""
    monkeypatch.delenv("COLUMNS", raising=False)
    theirs, ours = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = b""

    def lines() -> list[str]:
        nonlocal shown
        sys.stdout.flush()
        os.set_blocking(theirs, False)
        try:
            while more := os.read(theirs, 1 << 16):
                shown += more
        except BlockingIOError:
            pass
        return re.split("\r*\n", shown.decode())

    with os.fdopen(ours, "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "__stdout__", output)
        yield lines
    os.close(theirs)


@pytest.mark.parametrize("peak", [None, 989.0])
def test_a_terminal_keeps_the_losses_above_the_bar(tmp_path, monkeypatch, peak):
    monkeypatch.setattr(metrics, "_peak_tflops", lambda: peak)
    config = config_for(tmp_path)
    config.training.train_iters = 1_200_000
    state = TrainState(iteration=1_199_990)
    with terminal(monkeypatch) as lines:
        logger = MetricsLogger(config, state)
        for loss in (5.0, 4.0, 3.0, 2.0):
            state.iteration, state.consumed_tokens = state.iteration + 1, state.consumed_tokens + BATCH * LENGTH
            logger(state, StepResult(loss, 0.5, 1e-3, BATCH, LENGTH), False)
        logger.evaluated(state, 4.25)
        *above, bar = lines()
        logger.close()
    # What stood in a line before is written over with blanks; the bar's block characters count as one.
    assert all(len(text) <= 100 for line in [*above, bar] for text in line.split("\r"))
    seen = [line.rpartition("\r")[2].rstrip() for line in above]
    starts = ["iteration 1199992/1200000 | loss 4.5000 | grad norm 0.500 | lr 1.000e-03 | ", "iteration 1199994/1200000 | loss 2.5000 | "]
    assert [line[: len(start)] for line, start in zip(seen, starts)] == starts
    assert seen[2:] == ["iteration 1199994 | validation loss 4.2500"]
    assert "1199994/1200000 [" in bar.rpartition("\r")[2]


def test_what_a_save_and_a_skipped_step_leave(tmp_path, monkeypatch, capsys):
    logger, state = MetricsLogger(config_for(tmp_path), TrainState()), TrainState(iteration=3, consumed_tokens=99, skipped_in_a_row=2)
    logger.saved(state, 0.25)
    logger(state, StepResult(float("nan"), 1.0, 1e-3, BATCH, LENGTH, "the loss is nan"), False)
    assert capsys.readouterr().out.splitlines() == [
        "iteration 3 | saving a checkpoint, training stood still for 0.25 s",
        "iteration 3 | step skipped, 2 in a row: the loss is nan",
    ]
    (record,) = map(json.loads, logger.path.read_text().splitlines())
    assert (record["iteration"], record["consumed_tokens"], record["save_stall_seconds"]) == (3, 99, 0.25)
    assert (logger.tokens, logger.steps, logger.losses) == (BATCH * LENGTH, 1, [])


@pytest.mark.slow
def test_weights_and_biases_gets_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_two_steps(config_for(tmp_path, wandb_project="test", wandb_exp_name="two-steps", wandb_save_dir=str(tmp_path)), monkeypatch)
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = run.read_bytes()
    assert b"two-steps" in content
    assert b"validation_loss" in content


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; its list of calls."""
    calls = []
    run = SimpleNamespace(
        id="r1",
        config=SimpleNamespace(update=lambda values, allow_val_change: calls.append(values)),
        define_metric=lambda name, step_metric: calls.append((name, step_metric)),
        log=lambda record: calls.append(("log", record["iteration"])),
        finish=lambda: calls.append("finish"),
    )
    module = SimpleNamespace(init=lambda **how: calls.append(how) or run, teardown=lambda: calls.append("teardown"), Error=ValueError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize("folder, log_dir, expected", [("w", "l", "w"), (None, "l", "l"), (None, None, ".")])
def test_what_weights_and_biases_is_told(tmp_path, monkeypatch, wandb, folder, log_dir, expected):
    monkeypatch.chdir(tmp_path)
    config = config_for(tmp_path, wandb_project="p", wandb_exp_name="n", wandb_save_dir=folder, log_dir=log_dir)
    logger = MetricsLogger(config, TrainState())
    logger.evaluated(TrainState(iteration=3), 2.0)
    logger.close()
    how, values, *calls = wandb
    assert values["training"]["train_iters"] == 6
    what = {"project": "p", "name": "n", "dir": expected, "mode": "offline", "id": "None", "resume": "allow"}
    assert {name: str(value) for name, value in how.items()} == what
    assert calls == [("*", "iteration"), ("log", 3), "finish", "teardown"], "its own process writes the file, and is waited for"
    assert log_dir is None or (tmp_path / log_dir / wandb_run.ID_FILE).read_text() == "r1"


def test_nothing_is_started_that_nobody_asked_for(tmp_path, wandb):
    logger = MetricsLogger(config_for(tmp_path, log_dir=None), TrainState())
    logger.evaluated(TrainState(iteration=3), 2.0)
    logger.close()
    assert (logger.wandb, logger.tensorboard, logger.bar, logger.path, wandb) == (None, None, None, None, [])
    assert not [*tmp_path.iterdir()]


def test_tensorboards_steps_begin_after_the_checkpoint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.chdir(tmp_path)
    writer = SimpleNamespace(add_scalar=lambda *what: calls.append(what), flush=list, close=lambda: calls.append("close"))
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: calls.append((folder, purge_step)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    logger = MetricsLogger(config_for(tmp_path, tensorboard_dir="here"), TrainState(iteration=7))
    logger.saved(TrainState(iteration=8, consumed_tokens=99), 0.5)
    logger.close()
    assert calls == [("here", 8), ("iteration", 8, 8), ("consumed_tokens", 99, 8), ("save_stall_seconds", 0.5, 8), "close"]


def test_a_terminal_has_a_bar(tmp_path, monkeypatch, capsys):
    calls = []

    class Bar:
        def __init__(self, **how):
            how.pop("file")
            calls.append(how)
            self.write, self.close = (lambda line: calls.append(line.split(" | grad")[0])), (lambda: calls.append("close"))
            self.update = lambda: calls.append("update")

    monkeypatch.setattr(metrics, "tqdm", Bar)
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True, raising=False)
    logger = MetricsLogger(config_for(tmp_path), TrainState(iteration=2))
    for step in (3, 4):
        logger(TrainState(iteration=step), StepResult(step, 0.5, 1e-3, BATCH, LENGTH), False)
    logger.evaluated(TrainState(iteration=4), 2.0)
    logger.close()
    bar = {"total": 6, "initial": 2, "unit": "step", "dynamic_ncols": True}
    assert calls == [bar, "update", "iteration 4/6 | loss 3.5000", "update", "iteration 4 | validation loss 2.0000", "close"]
    assert capsys.readouterr().out == ""


def test_an_interval_without_a_good_step_and_the_last_step(tmp_path, monkeypatch, capsys):
    logger = MetricsLogger(config_for(tmp_path, log_interval=10), TrainState())
    logger(TrainState(iteration=1), StepResult(float("nan"), float("inf"), 1e-3, BATCH, LENGTH, "the loss is nan"), False)
    logger(TrainState(iteration=2), StepResult(float("nan"), float("inf"), 1e-3, BATCH, LENGTH, "the loss is nan"), True)
    logger(TrainState(iteration=3, useful_seconds=4.5), StepResult(2.0, 0.25, 1e-3, BATCH, LENGTH), True)
    bad, good = map(json.loads, logger.path.read_text().splitlines())
    assert (bad["iteration"], bad["skipped_steps"], bad.keys() & {"loss", "gradient_norm"}) == (2, 2, set())
    assert (good["iteration"], good["loss"], good["gradient_norm"], good["useful_seconds"]) == (3, 2.0, 0.25, 4.5)
    assert "skipped_steps" not in good
    assert "no loss | no grad norm" in capsys.readouterr().out
    assert (logger.tokens, logger.steps, logger.losses) == (0, 0, [])


@pytest.mark.parametrize("seconds, text", [(0.9, "0:00:00"), (61, "0:01:01"), (3599.9, "0:59:59"), (36_000 + 65, "10:01:05")])
def test_the_clock(seconds, text):
    assert metrics._clock(seconds) == text


def test_memory_of_a_gpu_is_what_was_allocated_at_most(monkeypatch):
    monkeypatch.setattr(metrics.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(metrics.torch.cuda, "max_memory_allocated", lambda: 123)
    assert metrics._memory_bytes() == 123


def test_norms_of_layers_are_a_record_of_their_own(tmp_path):
    logger = MetricsLogger(config_for(tmp_path), TrainState())
    result = StepResult(5.0, 0.5, 1e-3, BATCH, LENGTH, None, {"layers.0": 0.3, "norm": 0.4})
    logger(TrainState(iteration=1, consumed_tokens=128), result, False)  # no step of --log-interval
    logger.close()
    (record,) = map(json.loads, logger.path.read_text().splitlines())
    del record["time"]
    assert record == {"iteration": 1, "consumed_tokens": 128, "gradient_norm/layers.0": 0.3, "gradient_norm/norm": 0.4}


@pytest.mark.slow
def test_all_starts_of_a_run_are_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        log_two_steps(config_for(tmp_path, wandb_project="test", wandb_save_dir=str(tmp_path)), monkeypatch)
    ids = {path.name.split("-")[3] for path in tmp_path.glob("wandb/offline-run-*")}
    assert ids == {(tmp_path / wandb_run.ID_FILE).read_text()}


def test_samples_are_lines_and_one_record(tmp_path, capsys):
    logger = MetricsLogger(config_for(tmp_path), TrainState())
    logger.sampled(TrainState(iteration=5, consumed_tokens=9), ["a\nb", "c"])
    logger.close()
    (record,) = map(json.loads, logger.path.read_text().splitlines())
    assert (record["iteration"], record["samples"]) == (5, "a\nb\n\nc")
    assert capsys.readouterr().out.splitlines() == [r"iteration 5 | sample: 'a\nb'", "iteration 5 | sample: 'c'"]
