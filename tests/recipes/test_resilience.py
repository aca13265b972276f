"""Ranks that are killed, stopped or told to stop: the others end by themselves in bounded time, say why, and the next start goes on."""

import json
import os
import pickle
import re
import signal
import time
from dataclasses import replace

import pytest
import torch

from megatron_llama3.checkpoint import store
from megatron_llama3.checkpoint.native import open_native_tensors
from megatron_llama3.checkpoint.native.counted_files import _CountedFile
from megatron_llama3.checkpoint.start import Start
from megatron_llama3.checkpoint.store import CheckpointWriter
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.loader import TrainingStream
from megatron_llama3.model.llama import Llama
from megatron_llama3.recipes import hooks
from megatron_llama3.training import engine
from megatron_llama3.training.events import EventLog, read_lines
from megatron_llama3.training.state import TrainState
from tests.recipes.jobs import FLAGS, TWO_BY_TWO, events, losses, slow_steps, start, statuses, wait_for

ROLLBACK = "--train-iters 10 --save-interval 2 --max-skips-in-a-row 2"


@pytest.mark.slow
def test_a_signal_ends_with_status_75_and_the_next_start_finishes(data, tmp_path):
    flags = f"{FLAGS} --data-path {data} --train-iters 40 --save {tmp_path} --load {tmp_path}"
    ranks = start(flags, 2, tmp_path / "log", slow_steps)
    wait_for(lambda: len(losses(tmp_path)) >= 3)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert statuses(ranks) == [75, 75]
    stopped_at = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped_at < 40
    assert [(e["reason"], e["is_finished"]) for e in events(tmp_path, "stop")] == [("SIGUSR1 was received", False)]
    assert statuses(start(flags, 2, tmp_path / "log")) == [0, 0]
    assert [e["iteration"] for e in events(tmp_path, "start")] == [0, stopped_at]
    assert sorted(losses(tmp_path)) == list(range(1, 41))


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_who_say_so(data, tmp_path):
    flags = f"{FLAGS} --data-path {data} --train-iters 400 --save {tmp_path} --load {tmp_path} --save-interval 2 {TWO_BY_TWO}"
    ranks = start(flags, 4, tmp_path / "log", slow_steps)
    wait_for(lambda: len(losses(tmp_path)) >= 3)
    os.kill(ranks[3].pid, signal.SIGKILL)
    assert statuses(ranks) == [75, 75, 75, -signal.SIGKILL]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 3
    assert all(re.match(r"error: rank [0-2] on \S+ lost contact with another rank in .*: .* start the run again", line) for line in lines)
    assert [e["reason"] for e in events(tmp_path, "failure")] == ["another rank was lost"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])  # rank 0 holds the job's key-value store
def test_a_stopped_rank_is_named_and_the_job_ends(data, tmp_path, victim):
    flags = f"{FLAGS} --data-path {data} --train-iters 400 --save {tmp_path} --hang-timeout-seconds 4 {TWO_BY_TWO}"
    ranks = start(flags, 4, tmp_path / "log", slow_steps)
    wait_for(lambda: len(losses(tmp_path)) >= 3)
    os.kill(ranks[victim].pid, signal.SIGSTOP)
    others = [rank for rank in range(4) if rank != victim]
    assert statuses([ranks[rank] for rank in others]) == [75] * 3
    ranks[victim].kill()
    (hang,) = events(tmp_path, "hang")
    assert hang["rank"] == victim
    assert hang["state"].startswith("does not answer")
    assert re.search(rf"^hang: rank {victim} on \S+ does not answer", (tmp_path / "log").read_text(), re.M)


def stopped_in(owner, name: str) -> None:
    """Rank 2 stops at the beginning of its second call of that function, as a node does that is swapped out."""
    function, calls = getattr(owner, name), []

    def stops(*args):
        calls.append(1)
        if os.environ["RANK"] == "2" and len(calls) == (1 if name == "_load_tensors" else 2):
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*args)

    setattr(owner, name, stops)


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "phase"), [(CheckpointWriter, "save", "save"), (store, "_load_tensors", "loading a checkpoint")])
def test_a_rank_that_stops_in_a_save_or_load_is_named_with_it(data, tmp_path, owner, name, phase):
    """By --hang-timeout-seconds, and not by the ten minutes of a collective."""
    flags = f"{FLAGS} --data-path {data} --train-iters 40 --save {tmp_path} --save-interval 4 --auto-resume {TWO_BY_TWO}"
    if name == "_load_tensors":
        assert statuses(start(f"{flags} --exit-interval 4", 4, tmp_path / "log")) == [0] * 4
    began = time.monotonic()
    ranks = start(f"{flags} --hang-timeout-seconds 5", 4, tmp_path / "log", lambda: stopped_in(owner, name))
    assert statuses([ranks[rank] for rank in (0, 1, 3)]) == [75] * 3
    assert time.monotonic() - began < 100
    ranks[2].kill()
    (hang,) = events(tmp_path, "hang")
    assert (hang["rank"], hang["state"], hang["phase"]) == (2, "does not answer, last seen", phase)
    assert re.search(rf"^hang: rank 2 on \S+ does not answer, last seen in {phase} ", (tmp_path / "log").read_text(), re.M)


@pytest.mark.slow
def test_a_file_that_is_never_written_names_the_rank_that_waits_for_its_disk(data, tmp_path):
    """In the background, while the others wait for it in a collective of their own background threads."""

    def stuck_on_rank_1() -> None:
        sync, calls = os.fsync, []

        def stuck(descriptor):
            calls.append(1)
            if os.environ["RANK"] == "1" and len(calls) == 2:
                time.sleep(1000)
            return sync(descriptor)

        os.fsync = stuck

    flags = f"{FLAGS} --data-path {data} --train-iters 40 --save {tmp_path} --save-interval 4 --hang-timeout-seconds 5"
    assert statuses(start(flags, 2, tmp_path / "log", stuck_on_rank_1)) == [75, 75]
    (hang,) = events(tmp_path, "hang")
    assert (hang["rank"], hang["phase"], hang["state"]) == (1, "save, waiting for a save", "is behind, it is")
    assert hang["call"].startswith("stuck (test_resilience.py")


@pytest.mark.slow
def test_a_save_that_is_slower_than_the_limit_is_no_hang(data, tmp_path):
    def slow_disk() -> None:
        write = _CountedFile.write
        _CountedFile.write = lambda *args: (time.sleep(0.15), write(*args))[1]

    flags = f"{FLAGS} --data-path {data} --train-iters 3 --save {tmp_path} --hang-timeout-seconds 2"
    began = time.monotonic()
    assert statuses(start(flags, 2, tmp_path / "log", slow_disk)) == [0, 0]
    assert time.monotonic() - began > 4
    assert events(tmp_path, "hang") == []


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_named_with_its_phase(data, tmp_path):
    def stuck_in_the_data_of_step_3() -> None:
        plan_batch, calls = TrainingStream.plan_batch, []

        def stuck(*args):
            calls.append(1)
            if len(calls) == 5 and os.environ["RANK"] == "1":  # each step plans its own batch and, to read ahead, the next one
                time.sleep(1000)
            return plan_batch(*args)

        TrainingStream.plan_batch = stuck

    flags = f"{FLAGS} --data-path {data} --train-iters 400 --log-dir {tmp_path} --hang-timeout-seconds 2"
    assert statuses(start(flags, 2, tmp_path / "log", stuck_in_the_data_of_step_3)) == [75, 75]
    (hang,) = events(tmp_path, "hang")
    assert (hang["rank"], hang["state"], hang["phase"], hang["iteration"]) == (1, "is behind, it is", "reading data", 2)
    assert hang["call"].startswith("stuck (test_resilience.py")
    assert max(losses(tmp_path)) == 2
    traces = [pickle.loads((tmp_path / "flight_recorder" / "gloo" / f"rank_{rank}").read_bytes()) for rank in (0, 1)]
    calls = [[(e["process_group"], e["profiling_name"], e["collective_seq_id"]) for e in trace["entries"]] for trace in traces]
    assert calls[0][:-1] == calls[1], "rank 1 lacks the collective in which rank 0 waits for it"
    assert "_global_count" in [frame["name"] for frame in traces[0]["entries"][-1]["frames"]]


@pytest.mark.slow
def test_a_hang_ends_the_job_also_where_its_event_cannot_be_kept(data, tmp_path):
    def stuck_on_a_full_disk() -> None:
        add, next_batch, calls = EventLog.add, TrainingStream.next_batch, []

        def refuse_hangs(log, event, **fields):
            if event == "hang":
                raise UserError("No space left on device")
            add(log, event, **fields)

        def stuck(*args):
            calls.append(1)
            if len(calls) == 3:
                time.sleep(1000)
            return next_batch(*args)

        EventLog.add, TrainingStream.next_batch = refuse_hangs, stuck

    flags = f"{FLAGS} --data-path {data} --train-iters 400 --log-dir {tmp_path} --hang-timeout-seconds 2"
    assert statuses(start(flags, 1, tmp_path / "log", stuck_on_a_full_disk), seconds=60) == [75]
    assert re.search(r"^hang: rank 0 on \S+ is behind", (tmp_path / "log").read_text(), re.M)


@pytest.mark.slow
@pytest.mark.parametrize("free", [4 << 10, 36 << 10])
def test_a_disk_too_full_for_a_save_is_one_line(data, tmp_path, small_disk, free):
    """Where there is no room for the config, and where the tensors fill it up."""
    save = small_disk("64k")
    (save / "ballast").write_bytes(bytes((64 << 10) - free))
    flags = f"{FLAGS} --data-path {data} --train-iters 4 --save {save} --log-dir {tmp_path} --save-interval 2 --storage-retry-minutes 0"
    assert statuses(start(flags, 2, tmp_path / "log")) == [75, 75]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
    reason = r"(No space left on device$|a file could not be written to its end: no space left)"
    assert re.match(f"error: --save {save}: checkpoint could not be written: {reason}", lines[0])
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [path.name for path in save.iterdir()] == ["ballast"]


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_ends_the_run_before_the_next_one(data, tmp_path, small_disk):
    save = small_disk("64k")
    (save / "ballast").write_bytes(bytes(28 << 10))
    flags = f"{FLAGS} --data-path {data} --train-iters 2000 --save {save} --log-dir {tmp_path} --save-interval 400"
    assert statuses(start(f"{flags} --storage-retry-minutes 0", 2, tmp_path / "log")) == [75, 75]
    assert "checkpoint could not be written" in (tmp_path / "log").read_text()
    assert 400 <= max(losses(tmp_path)) < 800


@pytest.mark.slow
def test_a_slow_rank_is_named(data, tmp_path):
    def slow_on_rank_2() -> None:
        forward = Llama.forward
        if os.environ["RANK"] == "2":
            Llama.forward = lambda *args, **kwargs: (time.sleep(0.05), forward(*args, **kwargs))[1]

    flags = f"{FLAGS} --data-path {data} --train-iters 12 --log-dir {tmp_path} --log-straggler --straggler-interval 6 {TWO_BY_TWO}"
    assert statuses(start(flags, 4, tmp_path / "log", slow_on_rank_2)) == [0, 0, 0, 0]
    found = events(tmp_path, "straggler")
    assert {e["iteration"] for e in found if e["rank"] == 2} == {6, 12}
    most = max((e for e in found if e["iteration"] == 12), key=lambda e: e["factor"])  # the first steps have what is done once in them
    assert (most["rank"], most["measure"]) == (2, "own work a step")
    assert re.search(r"^straggler: iteration 12 \| rank 2 on \S+ took 0\.\d+ s for own work a step", (tmp_path / "log").read_text(), re.M)


def poisoned_from(first: int, last: int):
    """The loss overflows in these steps; told by the data, so that a step that is done again is bad again."""

    def before() -> None:
        next_batch, make = TrainingStream.next_batch, engine.make_microbatches
        positions = []

        def noted(stream, *args):
            positions.append(stream.state_dict()["sources"][0]["sequences"] // 4 + 1)
            return next_batch(stream, *args)

        def poisoned(*args):
            factor = 3e38 if first <= positions[-1] <= last else 1.0
            return [m._replace(loss_mask=m.loss_mask * factor) for m in make(*args)]

        TrainingStream.next_batch, engine.make_microbatches = noted, poisoned

    return before


@pytest.mark.slow
def test_bad_steps_in_a_row_roll_the_run_back_and_a_resumed_run_does_the_same(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = f"{FLAGS} --data-path {data} --train-iters 10 --save-interval 2 --max-skips-in-a-row 2 {TWO_BY_TWO}"
    bad = poisoned_from(6, 7)
    assert statuses(start(f"{flags} --save {whole}", 4, tmp_path / "log", bad)) == [0] * 4
    # Step 6 was saved while it was unclear what was wrong: the run goes back to step 4, and step 5 is lost too.
    (back,) = events(whole, "rollback")
    assert (back["iteration"], back["to"], back["lost_updates"]) == (7, 4, 1)
    assert [(e["iteration"], e["in_a_row"], e["loss"]) for e in events(whole, "skip")] == [(6, 1, "inf"), (7, 2, "inf")]
    assert events(whole, "skip")[0]["data_ends_at"] == [{"prefix": data, "epoch": 0, "token_offset": 6 * 4 * 16}]
    state = json.loads((whole / "iter_0000010" / "train_state.json").read_text())
    assert (state["iteration"], state["lost_updates"], state["rolled_back_to"]) == (10, 3, [4])
    assert state["data"]["sources"][0]["sequences"] == 40
    rates = {r["iteration"]: r["lr"] for r in read_lines(whole / "metrics.jsonl") if "lr" in r}
    assert rates[8] == rates[5] != rates[4]  # the fifth update again

    # Ended between the two bad steps, and started anew.
    assert statuses(start(f"{flags} --save {parts} --exit-interval 6", 4, tmp_path / "log", bad)) == [0] * 4
    assert statuses(start(f"{flags} --save {parts} --load {parts}", 4, tmp_path / "log", bad)) == [0] * 4
    assert losses(parts) == losses(whole)
    ours, theirs = (open_native_tensors(folder / "iter_0000010") for folder in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].rows(0, ours[key].shape[0]), theirs[key].rows(0, theirs[key].shape[0])) for key in ours)


@pytest.fixture(scope="module")
def rolled_back_on_one_rank(data, tmp_path_factory) -> dict[int, float | None]:
    folder = tmp_path_factory.mktemp("one")
    assert statuses(start(f"{FLAGS} {ROLLBACK} --data-path {data} --save {folder}", 1, folder / "log", poisoned_from(6, 7))) == [0]
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--pipeline-model-parallel-size 2", "--zero-stage 2", "--zero-stage 3"])
def test_a_rollback_under_deepspeed_gives_the_losses_of_one_rank(data, tmp_path, rolled_back_on_one_rank, layout):
    pytest.importorskip("megatron_llama3.training.deepspeed_engine")
    flags = f"{FLAGS} {ROLLBACK} --data-path {data} --save {tmp_path} --engine deepspeed {layout}"
    assert statuses(start(flags, 2, tmp_path / "log", poisoned_from(6, 7)), seconds=300) == [0, 0]
    assert [(e["iteration"], e["to"]) for e in events(tmp_path, "rollback")] == [(7, 4)]
    found, expected = losses(tmp_path), rolled_back_on_one_rank
    assert [step for step, loss in found.items() if loss is None] == [6, 7]
    assert found.keys() == expected.keys()
    good = [step for step in found if found[step] is not None]
    assert [found[step] for step in good] == pytest.approx([expected[step] for step in good], rel=1e-5)


def test_each_rollback_in_a_row_goes_one_checkpoint_further_back(tmp_path, monkeypatch):
    """Past those that are damaged, in their weights or in their state."""
    monkeypatch.setattr(hooks, "damage", lambda folder: "damaged" if folder.name in ("iter_0000003", "iter_0000005") else None)
    config = RunConfig()
    config.checkpoint.save = str(tmp_path / "run")
    for iteration, skipped in ((2, 0), (3, 0), (4, 0), (6, 1)):
        folder = tmp_path / "run" / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        counts = {"iteration": iteration, "consumed_samples": 0, "consumed_tokens": 0, "skipped_in_a_row": skipped}
        (folder / "train_state.json").write_text(json.dumps(counts | {"data": {}}))
    (tmp_path / "run" / "iter_0000005").mkdir()
    (tmp_path / "run" / "iter_0000005" / "train_state.json").write_text('{"iter')
    state, found = TrainState(iteration=9), []
    while (target := hooks._rollback_target(config, state, None)) is not None:
        found.append(target.name)
        state.rolled_back_to.append(int(target.name[5:]))
    assert found == ["iter_0000004", "iter_0000002"]
    start = Start(tmp_path / "run" / "iter_0000004", config.checkpoint)
    assert hooks._rollback_target(RunConfig(), TrainState(iteration=9), start) == start.folder
    assert hooks._rollback_target(RunConfig(), TrainState(iteration=9), replace(start, is_hf=True)) is None
