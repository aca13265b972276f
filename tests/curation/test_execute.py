"""Whole runs: the same documents under any number of tasks, any executor and any number of kills."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.execute import _wait_for_jobs
from tests.curation.runs import killed_at, prose, run, write_jsonl, write_pipeline, written

ROOT = Path(__file__).parents[2]
BANNER = "subscribe to our newsletter"


@pytest.fixture
def pipeline(tmp_path):
    """Of 30 pages: 25 good ones with a banner, a copy, an older version, a page of nothing but the banner, and 2 broken lines."""
    records = [{"text": f"{prose(seed)}\n{BANNER}", "url": f"http://a.org/{seed}", "date": "2024-02-01"} for seed in range(25)]
    records.insert(3, {"text": f"{prose(8).upper()}\n{BANNER}", "url": "http://mirror.org/8"})
    records.insert(9, {"text": prose(99), "url": "http://a.org/4", "date": "2023-01-01"})
    records.insert(14, {"text": f"{BANNER}.\n---", "url": "http://a.org/menu"})
    records.insert(20, b'{"text": "cut')
    records.insert(21, b"7")
    write_jsonl(tmp_path / "corpus.jsonl", records)
    blocks = "blocks: [url_dedup, minhash_dedup, line_dedup]\nslurm: {partition: local, time: '00:10:00'}\n"
    return write_pipeline(tmp_path, f"input: {{path: {tmp_path / 'corpus.jsonl'}}}\n{blocks}")


@pytest.fixture
def expected(pipeline, tmp_path):
    output = tmp_path / "expected"
    run(pipeline, output)
    return written(output)


def test_what_goes_and_what_stays(pipeline, tmp_path):
    rows = run(pipeline, tmp_path / "out", tasks=2)
    documents = written(tmp_path / "out")
    assert [row.name for row in rows] == ["input", "url_dedup", "minhash_dedup", "line_dedup"]
    assert [(row.documents_in, row.documents_out) for row in rows] == [(30, 28), (28, 27), (27, 26), (26, 25)]
    assert rows[0].reasons == {"broken JSON": 1, "not a JSON object but int": 1}
    assert rows[3].reasons == {"no_line_left": 1}
    assert rows[3].changed == 25
    texts = [document["text"] for document in documents]
    assert texts == [prose(8).upper() if seed == 3 else prose(seed - (seed > 3)) for seed in range(26) if seed != 9]


def test_any_number_of_tasks_gives_the_same_documents(pipeline, expected, tmp_path):
    run(pipeline, tmp_path / "out", tasks=5)
    assert written(tmp_path / "out") == expected


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(pipeline, expected, tmp_path):
    output, kills = tmp_path / "out", 0
    while killed_at(6, pipeline, output, tasks=2):
        kills += 1
        assert not (output / "documents").exists()
        assert kills < 40, "no start gets further than the one before"
    assert kills > 3
    assert written(output) == expected
    assert [path for path in output.glob("documents/*") if path.name.startswith(".")] == []


@pytest.mark.slow
def test_processes_give_the_same_documents(pipeline, expected, tmp_path):
    run(pipeline, tmp_path / "out", tasks=3, workers=2)
    assert written(tmp_path / "out") == expected


def test_a_folder_of_other_work_is_refused(pipeline, tmp_path):
    run(pipeline, tmp_path / "out")
    with pytest.raises(UserError, match="begun with --tasks 1"):
        run(pipeline, tmp_path / "out", tasks=2)
    (tmp_path / "other").mkdir()
    other = write_pipeline(tmp_path / "other", Path(pipeline).read_text().replace("line_dedup", "line_dedup: {times: 3}"))
    with pytest.raises(UserError, match="begun with other blocks"):
        run(other, tmp_path / "out")
    with open(tmp_path / "corpus.jsonl", "ab") as file:
        file.write(b"\n")
    with pytest.raises(UserError, match="the input files have changed"):
        run(pipeline, tmp_path / "out")


def test_a_list_that_changed_since_is_refused(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"text": prose(1)}])
    (tmp_path / "words.txt").write_text("snorfle\n")
    block = f"blocks: [dirty_words: {{words: [{tmp_path / 'words.txt'}]}}]\n"
    pipeline = write_pipeline(tmp_path, f"input: {{path: {tmp_path / 'in.jsonl'}}}\n{block}")
    run(pipeline, tmp_path / "out")
    assert len(run(pipeline, tmp_path / "out")) == 2
    (tmp_path / "words.txt").write_text("blargish\n")
    with pytest.raises(UserError, match="a file that a block reads has changed"):
        run(pipeline, tmp_path / "out")


def test_a_foreign_folder_is_refused(pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        run(pipeline, tmp_path / "out")


def test_a_failed_task_is_one_line_and_can_go_on(pipeline, expected, tmp_path):
    output = tmp_path / "out"
    run(pipeline, output, tasks=2)
    shutil.rmtree(output / "documents")
    shutil.rmtree(output / "work" / "stages" / "08_03_line_dedup" / "completions")
    lost = output / "work" / "03_line_dedup" / "documents" / "00001.jsonl.zst"
    lost.rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"stage 03_line_dedup: . of 2 tasks did not end well: FileNotFoundError.*task_0000.\.log"):
        run(pipeline, output, tasks=2)
    assert not (output / "documents").exists()
    (tmp_path / "aside").rename(lost)
    run(pipeline, output, tasks=2)
    assert written(output) == expected


@pytest.mark.slow
def test_ray_gives_the_same_documents(pipeline, expected, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    run(pipeline, tmp_path / "out", "ray", tasks=2, workers=2)
    assert written(tmp_path / "out") == expected


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    return slurm


@pytest.mark.slow
def test_slurm_gives_the_same_documents(on_slurm, pipeline, expected, tmp_path):
    run(pipeline, tmp_path / "out", "slurm", tasks=3, workers=2)
    assert written(tmp_path / "out") == expected


@pytest.mark.slow
def test_what_slurm_refuses_is_one_line(on_slurm, pipeline, tmp_path):
    text = Path(pipeline).read_text().replace("partition: local", "partition: none")
    with pytest.raises(UserError, match=r"stage input: sbatch refused it \(1\)"):
        run(write_pipeline(tmp_path, text), tmp_path / "out", "slurm")


@pytest.mark.slow
def test_an_array_is_waited_for_to_its_last_task(on_slurm, tmp_path):
    """Slurm gives the array's own number to the task that it starts last, which may be the first to end."""
    (tmp_path / "job.sh").write_text("#!/bin/bash\nsleep $((6 * (1 - SLURM_ARRAY_TASK_ID)))\n")
    job = on_slurm.submit("--array=0-1", "--output=/dev/null", str(tmp_path / "job.sh"))
    _wait_for_jobs([job], "submitted", lambda line: None)
    assert on_slurm.states(job) == ["COMPLETED", "COMPLETED"]


@pytest.mark.slow
def test_the_command(pipeline, expected, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "curate_data.py"), pipeline, "--output", str(tmp_path / "out")]
    command += ["--report", str(tmp_path / "report.html")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"2 records of the input are no documents: see {tmp_path / 'out'}/rejected"]
    assert "line_dedup" in done.stdout
    assert written(tmp_path / "out") == expected
    assert "no_line_left" in (tmp_path / "report.html").read_text()
    done = subprocess.run([*command, "--tasks", "0"], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (2, "error: --tasks 0: must be at least 1\n")
