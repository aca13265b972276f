"""What the report says of a run whose history is known to the second."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "report_run.py"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """100 s: killed at step 5 after a save at 4, then a rank hangs at step 6, then it ends at step 8; 60 s of steps count."""
    events = [
        {"event": "start", "time": 10, "since": 0, "iteration": 0, "useful_seconds": 0},
        {"event": "save", "time": 34, "iteration": 4, "stall_seconds": 2, "useful_seconds": 20},
        {"event": "start", "time": 50, "since": 45, "iteration": 4, "useful_seconds": 20},
        {"event": "skip", "time": 52, "iteration": 5, "reason": "the loss is nan", "loss": "nan", "useful_seconds": 20},
        {"event": "hang", "time": 60, "iteration": 6, "rank": 3, "host": "n7"},
        {"event": "failure", "time": 61, "iteration": 6, "reason": "another rank was lost"},
        {"event": "start", "time": 65, "since": 62, "iteration": 4, "useful_seconds": 20},
        {"event": "skip", "time": 66, "iteration": 5, "reason": "the loss is nan", "loss": "nan", "useful_seconds": 20},
        {"event": "stop", "time": 100, "iteration": 8, "reason": "--train-iters is reached", "is_finished": True, "useful_seconds": 60},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "sto')
    steps = [(20, 2), (35, 5), (58, 6), (90, 8)]
    lines = [{"time": t, "iteration": i, "loss": 3.0, "tokens_per_second": 9.0, "useful_seconds": 1} for t, i in steps]
    lines.append({"iteration": 9, "loss": 1.0})  # of no known time: passed over
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_time_and_causes(folder):
    done = run(folder)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:7] == [
        "run 8 iterations, finished, 0:01:40 since its first start",
        "effective training 60.0% of that time: 0:01:00",
        "18.0% 0:00:18 start-up",
        "2.0% 0:00:02 stalls of saves",
        "0.0% 0:00:00 evaluation",
        "11.0% 0:00:11 down between starts",
        "9.0% 0:00:09 steps lost, skipped or rolled back, and the rest",
    ]
    assert lines[7:10] == ["interruptions 2; 3 steps lost and done again", "1 no word (killed)", "1 hang of rank 3 on n7"]
    assert lines[10] == "stops asked for 0"
    assert lines[11].startswith("skipped steps 1;")  # done twice, one step


def test_ends_that_were_asked_for_early_deaths_and_kinds_of_failures(tmp_path):
    failed = "runs/a/iter_{:07d}.partial/__{}_0.distcp: No space left on device"
    events = [
        {"event": "launch", "time": 1, "since": 0},
        {"event": "launch", "time": 3, "since": 2},  # the one before died in loading
        {"event": "start", "time": 5, "since": 2, "iteration": 0, "useful_seconds": 0},
        {"event": "stop", "time": 10, "iteration": 4, "reason": "--exit-duration-in-mins 1 is over", "useful_seconds": 4},
        {"event": "start", "time": 12, "since": 11, "iteration": 4, "useful_seconds": 4},
        {"event": "failure", "time": 15, "iteration": 6, "reason": failed.format(6, 1)},
        {"event": "launch", "time": 16, "since": 16},
        {"event": "start", "time": 17, "since": 16, "iteration": 4, "useful_seconds": 4},
        {"event": "failure", "time": 18, "iteration": 5, "reason": failed.format(5, 3)},
        {"event": "launch", "time": 20, "since": 19},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    lines = [" ".join(line.split()) for line in run(tmp_path).stdout.splitlines()]
    assert lines[0] == "run 5 iterations, not finished, 0:00:20 since its first start"
    assert lines[2] == "35.0% 0:00:07 start-up"
    assert lines[7:12] == [
        "interruptions 3; 2 steps lost and done again",
        "2 runs/a/iter_STEP.partial/__RANK.distcp: No space left on device",
        "1 no word (ended before it could train)",
        "stops asked for 1",
        "1 --exit-duration-in-mins 1 is over",
    ]
    assert lines[12] == "last word no word (ended before it could train)"


def test_pictures(folder):
    pytest.importorskip("matplotlib")
    done = run(folder, "--plot", folder / "report.png", "--html", folder / "report.html")
    assert done.returncode == 0, done.stderr
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "effective training  60.0%" in page
    assert 'src="data:image/svg+xml;base64,' in page
    assert "http" not in page.split('src="')[0]


def test_no_run_there(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'events.jsonl'}: no start of a run is in it")
