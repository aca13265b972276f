"""scripts/preprocess_array.sbatch, each array task run as Slurm would: the shards merged are what one machine makes."""

import os
import subprocess
import sys

from megatron_llama3.data.preprocess import preprocess
from tests.tools.preprocess_helpers import ENVIRONMENT, ROOT, documents, options, output_bytes, vocabulary_folder, write_jsonl


def _run(command, **variables):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(command, env={**ENVIRONMENT, "PATH": path, **variables}, cwd=ROOT, capture_output=True, text=True, check=False)


def test_tasks_of_an_array_share_the_input(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", documents(30 + i, seed=i) * 60) for i in range(5)]
    whole = options(tmp_path, *files, prefix="whole")
    preprocess(whole)
    script, shards = str(ROOT / "scripts" / "preprocess_array.sbatch"), tmp_path / "shards"
    flags = ["--output-prefix", str(shards / "c"), "--tokenizer-model", str(vocabulary_folder(tmp_path)), "--append-eod"]
    for task in range(4, 7):  # --array=4-6
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "2"}
        done = _run(["bash", script, "--input", *map(str, files), *flags], SLURM_SUBMIT_DIR=str(ROOT), **slurm)
        assert done.returncode == 0, done.stderr
    merged = tmp_path / "merged_text_document"
    assert all(path.stat().st_size for path in shards.glob("*.bin"))
    done = _run([sys.executable, "tools/merge_datasets.py", "--input", str(shards), "--output-prefix", str(merged)])
    assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        assert output_bytes(whole)[suffix] == merged.with_suffix(suffix).read_bytes()


def test_without_an_array_it_says_so():
    done = _run(["bash", str(ROOT / "scripts" / "preprocess_array.sbatch")])
    assert done.returncode != 0
    assert "--array" in done.stderr
