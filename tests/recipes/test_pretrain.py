"""The pretraining recipe end to end on forked ranks, and once through torchrun with bad input."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.checkpoint.native import threaded_writer
from megatron_llama3.checkpoint.native.manifest import damaged_files, read_manifest
from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.planning.local_ranks import RankFailedError, run_ranks
from megatron_llama3.recipes.pretrain import pretrain
from megatron_llama3.tokenizer.llama3 import Tokenizer
from megatron_llama3.training import loop, stop

VOCABULARY = 101
ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 2 --hidden-size 24 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 --vocab-size 101 "
    "--seq-length 16 --global-batch-size 4 --lr 1e-3 --lr-decay-iters 8 --eval-interval 4 --eval-iters 1"
)
TWO_BY_TWO = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"


def run(flags: str, world_size: int = 1, before=lambda: None) -> None:
    run_ranks(world_size, _rank, flags, before)


def _rank(flags: str, before) -> None:
    before()
    pretrain(parse_run_config(flags.split()))


def metrics(folder: Path, key: str = "loss") -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["iteration"]: r[key] for r in records if key in r}


def latest(folder: Path) -> str:
    return (folder / "latest_checkpointed_iteration.txt").read_text()


def test_a_run_goes_on_under_another_layout(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(f"{MODEL} --data-path {data} --train-iters 8 --save {whole}")
    flags = f"{MODEL} --data-path {data} --save {parts} --load {parts}"
    run(f"{flags} --train-iters 5 --save-interval 2")
    run(f"{flags} --train-iters 8 {TWO_BY_TWO}", 4)
    assert latest(parts) == "8"
    assert metrics(parts) == pytest.approx(metrics(whole), rel=1e-6)
    validation = metrics(parts, "validation_loss")
    assert validation.pop(5)  # the end of the first part
    assert validation == pytest.approx(metrics(whole, "validation_loss"), rel=1e-6)
    assert {p.name for p in parts.glob("iter_*")} == {"iter_0000002", "iter_0000004", "iter_0000005", "iter_0000008"}


def test_what_may_differ_from_the_checkpoint(data, tmp_path):
    first = tmp_path / "first"
    base = f"{MODEL} --data-path {data} --save {first}"
    run(f"{base} --train-iters 2")
    resume = f"{base} --load {first} --train-iters 3"
    for change, message in [
        ("--lr 2e-3", "--lr is 0.002 here and 0.001 in .* add --override-opt-param-scheduler"),
        ("--num-layers 3", "--num-layers is 3 here and 2 in .* must match"),
        ("--seq-length 8", "--seq-length is 8 here and 16 in .* add --override-data"),
        ("--finetune --hidden-size 48", "--hidden-size is 48 here and 24 in .* must match"),
    ]:
        with pytest.raises(RankFailedError, match=f"UserError: {message}"):
            run(f"{resume} {change}")
    run(f"{resume} --lr 2e-3 --override-opt-param-scheduler --seq-length 8 --override-data")
    assert latest(first) == "3"
    second, untrained = tmp_path / "second", tmp_path / "untrained"
    run(f"{MODEL} --data-path {data} --save {second} --load {first} --finetune --train-iters 1 --seq-length 8")
    assert latest(second) == "1"
    run(f"{MODEL} --data-path {data} --log-dir {untrained} --train-iters 1 --seq-length 8")
    assert metrics(second)[1] < metrics(untrained)[1]  # it starts from trained weights, with the first data


def test_load_from_an_empty_folder(data, tmp_path):
    flags = f"{MODEL} --data-path {data} --train-iters 1 --load {tmp_path} --save {tmp_path / 'other'}"
    with pytest.raises(RankFailedError, match=r"UserError: .*no native checkpoint"):
        run(flags)


def test_auto_resume_goes_on_from_the_last_whole_checkpoint(data, tmp_path):
    """Started by one command line again and again: from another run's weights first, then from its own saves, past a damaged one."""
    first, whole, broken = tmp_path / "first", tmp_path / "whole", tmp_path / "broken"
    run(f"{MODEL} --data-path {data} --save {first} --train-iters 1")
    flags = f"{MODEL} --data-path {data} --load {first} --finetune --auto-resume --save-interval 2 --eval-iters 0 --train-iters"
    run(f"{flags} 8 --save {whole}")
    run(f"{flags} 5 --save {broken} {TWO_BY_TWO}", 4)
    (broken / "iter_0000005" / "__0_0.distcp").write_bytes(b"cut short")
    (broken / "iter_0000006.partial").mkdir()
    run(f"{flags} 8 --save {broken} {TWO_BY_TWO}", 4)
    assert latest(broken) == "8"
    records = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert all(0 < r["save_stall_seconds"] < r["time"] for r in records if "loss" not in r)
    assert metrics(broken) == pytest.approx(metrics(whole), rel=1e-6)


def test_exit_interval(data, tmp_path):
    run(f"{MODEL} --data-path {data} --train-iters 8 --exit-interval 3 --save {tmp_path}")
    assert latest(tmp_path) == "3"


def test_exit_duration(data, tmp_path):
    clock = iter([0.0, 30.0, 61.0])

    def make_minutes_fly() -> None:
        class Clock:
            monotonic = staticmethod(lambda: next(clock))

        stop.time = Clock

    run(f"{MODEL} --data-path {data} --train-iters 8 --exit-duration-in-mins 1 --save {tmp_path}", before=make_minutes_fly)
    assert latest(tmp_path) == "2"


def test_sigterm_on_one_rank_saves_and_stops_all(data, tmp_path):
    def terminate_rank_3_in_its_second_step() -> None:
        step, calls = loop.train_step, []

        def signalled(*args):
            calls.append(1)
            if len(calls) == 2 and os.environ["RANK"] == "3":
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        loop.train_step = signalled

    flags = f"{MODEL} --data-path {data} --train-iters 8 --exit-signal-handler --save {tmp_path} {TWO_BY_TWO}"
    run(flags, 4, terminate_rank_3_in_its_second_step)
    assert latest(tmp_path) == "2"


def test_asynchronous_saves_beside_what_ranks_agree_on_every_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(threaded_writer, "BYTES_A_THREAD", 1 << 12)
    flags = f"{MODEL} --data-path {data} --train-iters 8 --save-interval 1 --exit-signal-handler --exit-duration-in-mins 60 --eval-iters 0"
    run(f"{flags} --save {tmp_path} --keep-last 2 --keep-every 3", 4)
    assert latest(tmp_path) == "8"
    left = sorted(tmp_path.glob("iter_*"))
    assert [path.name for path in left] == ["iter_0000003", "iter_0000006", "iter_0000007", "iter_0000008"]
    assert not [line for folder in left for line in damaged_files(folder)]
    files = {path.name for path in left[-1].iterdir()}
    assert read_manifest(left[-1]).keys() == files - {"manifest.json"}
    assert files >= {f"__{rank}_{name}.distcp" for rank in range(4) for name in ("0", "1_0")}


def test_another_tokenizer_is_refused(data, tmp_path):
    for name, last in (("first", b"aa"), ("second", b"bb")):
        Tokenizer({bytes([i]): i for i in range(256)} | {last: 256}).save(tmp_path / name)
    base = f"{MODEL} --vocab-size 513 --data-path {data} --save {tmp_path / 'run'} --load {tmp_path / 'run'}"
    run(f"{base} --train-iters 1 --tokenizer-model {tmp_path / 'first'}")
    with pytest.raises(RankFailedError, match=r"UserError: --tokenizer-model .*second is another one"):
        run(f"{base} --train-iters 2 --tokenizer-model {tmp_path / 'second'}")
    with pytest.raises(RankFailedError, match=r"Error: --tokenizer-model .*first has 513 entries, --vocab-size 512 is smaller"):
        run(f"{base} --train-iters 2 --vocab-size 512 --tokenizer-model {tmp_path / 'first'}")


def test_non_finite_loss_is_an_error(data, tmp_path):
    with pytest.raises(RankFailedError, match=r"UserError: iteration 6: 5 steps were skipped in a row.*no checkpoint"):
        run(f"{MODEL} --data-path {data} --train-iters 8 --lr 1e30 --clip-grad 0")


def launched(flags: str, ranks: int) -> tuple[int, list[str]]:
    """(exit status, lines on stderr) under torchrun; no process of it is left."""
    command = [sys.executable, str(ROOT / "scripts" / "torchrun.py"), "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_llama3.recipes.pretrain", *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    left = subprocess.run(["pgrep", "-f", flags.split()[-1]], capture_output=True, text=True).stdout.split()
    assert not left
    return done.returncode, done.stderr.splitlines()


def with_one_bad_document(prefix: Path) -> Path:
    """Only one rank reads it in the first step."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for number in range(40):
            writer.add_document(np.full(500, VOCABULARY if number == 20 else 1))
        writer.finalize()
    return prefix


@pytest.mark.slow
def test_a_token_id_beyond_the_vocabulary_is_one_line(tmp_path):
    prefix = with_one_bad_document(tmp_path / "bad")
    status, lines = launched(f"{MODEL} --tensor-model-parallel-size 2 --split 1,0,0 --train-iters 400 --data-path {prefix}", 4)
    assert status == 2, lines
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "bad" in error
    assert "101" in error
    assert not [line for line in lines if "Traceback" in line]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_data_is_one_line_under_torchrun(tmp_path, damage):
    prefix = with_one_bad_document(tmp_path / "damaged")
    index = prefix.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-9])
    if damage == "missing":
        index.unlink()
    status, lines = launched(f"{MODEL} --train-iters 2 --data-path {prefix}", 2)
    assert status == 2, lines
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "damaged" in error
    assert not [line for line in lines if "Traceback" in line]


def test_a_run_told_in_samples_is_the_run_told_in_steps(data, tmp_path):
    steps, samples = tmp_path / "steps", tmp_path / "samples"
    run(f"{MODEL} --data-path {data} --train-iters 8 --lr-warmup-iters 2 --eval-iters 0 --save {steps}")
    by_samples = MODEL.replace("--lr-decay-iters 8", "--lr-decay-samples 32 --lr-warmup-samples 8")
    run(f"{by_samples} --data-path {data} --train-samples 35 --eval-iters 0 --save {samples}")
    assert latest(samples) == "8"
    assert metrics(samples, "lr") == pytest.approx(metrics(steps, "lr"), rel=1e-12)
    assert metrics(samples) == metrics(steps)


def test_traces_tensorboard_and_garbage(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = f"{MODEL} --data-path {data} --train-iters 4 --eval-iters 0 --log-dir {tmp_path} --tensorboard-dir {tmp_path}/tb --manual-gc"
    run(f"{flags} --tensor-model-parallel-size 2 --profile --profile-step-start 1 --profile-step-end 3 --profile-ranks 1", 2)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank1_steps2-3.json.gz"
    names = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    board = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {event.step: event.value for event in board.Scalars("loss")} == pytest.approx(metrics(tmp_path), rel=1e-6)


def test_checkpoints_that_a_run_does_not_go_on_from_are_safe(data, tmp_path):
    save = tmp_path / "save"
    flags = f"{MODEL} --data-path {data} --eval-iters 0 --save {save} --save-interval 2"
    run(f"{flags} --train-iters 4")
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*") if path.is_file()}
    advice = "2 checkpoints, the last iter_0000004, which this run does not go on from: add --auto-resume"
    (save / "latest_checkpointed_iteration.txt").rename(tmp_path / "latest")
    for others in ("", f"--load {save}"):  # Megatron's habit, with the latest file lost
        with pytest.raises(RankFailedError, match=advice):
            run(f"{flags} --train-iters 8 {others}")
    (tmp_path / "latest").rename(save / "latest_checkpointed_iteration.txt")
    for others in ("", f"--load {save}/iter_0000002", f"--load {save} --finetune"):
        with pytest.raises(RankFailedError, match=advice):
            run(f"{flags} --train-iters 8 {others}")
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*") if path.is_file()} == before
    run(f"{flags} --train-iters 6 --load {save}/iter_0000002 --overwrite-save --override-opt-param-scheduler")
    assert {path.name for path in save.glob("iter_*")} == {"iter_0000002", "iter_0000004", "iter_0000006"}
    run(f"{flags} --train-iters 2 --overwrite-save")
    assert {path.name for path in save.glob("iter_*")} == {"iter_0000002"}
    assert sorted(metrics(save)) == [1, 2]


def test_a_rank_ends_soon_after_its_launcher(tmp_path):
    program = (
        "import os, sys, time\n"
        "from megatron_llama3.training import launcher_guard\n"
        "launcher_guard.INTERVAL_SECONDS = 0.1\n"
        "if os.fork():\n"
        "    time.sleep(1)\n"
        "    os._exit(9)\n"
        "os.environ['RANK'] = '3'\n"
        "launcher_guard.end_with_launcher()\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == 9
    assert re.fullmatch(r"error: rank 3: its launcher \(process \d+\) is gone; start the run again to go on\n", done.stderr)


def test_nothing_to_learn_changes_no_weight_is_said_and_stops_soon(tmp_path, capfd):
    with IndexedDatasetWriter(tmp_path / "ones", np.uint16) as writer:
        for token in range(100):
            writer.add_document(np.array([token]))
        writer.finalize()
    with pytest.raises(RankFailedError, match=r"5 steps were skipped in a row, the last because no target of the batch counts"):
        run(f"{MODEL} --data-path {tmp_path}/ones --train-iters 20 --eval-iters 0 --weight-decay 0.5")
    assert "iteration 1 | step skipped, 1 in a row: no target of the batch counts" in capfd.readouterr().out
