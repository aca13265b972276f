"""What scripts/pretrain.sbatch does after each end of a run, with Slurm's commands played by scripts. test_slurm.py has the real ones."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def slurm(tmp_path):
    """Runs the script as attempt `attempt`; `python` is the body of the program that each of two tasks runs. `fits` is what it does
    when it is asked how many ranks fit. Returns its result."""
    commands = {
        # Many nodes: a script that stopped reading after the first would break the pipe and end without a word.
        "scontrol": """case "$*" in
            "show hostnames gpu[7-20000]") seq -f "gpu%.0f" 7 20000 ;;
            "show hostnames ghost1") echo ghost1 ;;
            "show node --oneliner gpu7") echo "NodeName=gpu7 NodeAddr=10.0.0.7 State=IDLE" ;;
            *) echo "scontrol $*" ;; esac""",
        # Each task after the other; the step's status is the largest, as srun's.
        "srun": """echo "srun $*" >>"$LOGS/srun"
            while [[ $1 == --* ]]; do shift; done
            worst=0
            for i in 0 1; do SLURMD_NODENAME=gpu$((7 + i)) SLURM_PROCID=$i SLURM_LOCALID=0 "$@" || worst=$?; done
            exit $worst""",
    }
    variables = {"SLURM_JOB_NODELIST": "gpu[7-20000]", "SLURM_JOB_ID": "31234", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "llama3"}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "LOGS": str(tmp_path / "logs")}

    def run(python: str, *flags: str, attempt: int = 0, fits: str = "true", **more: str) -> subprocess.CompletedProcess:
        asked = f"[[ $* != *fit_world* ]] || {{ {fits}; exit; }}"
        for name, text in {**commands, "python": f"{asked}\n{python}"}.items():
            path = tmp_path / name
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")}
        environment |= variables | {"SLURM_RESTART_COUNT": str(attempt), "PREFLIGHT": "no", **more}
        script = ["bash", "scripts/pretrain.sbatch", *(["examples/pretrain_llama3_70b.sh", *flags] if python else [])]
        return subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    return run


SAVED = "kill -USR1 $PPID; sleep 0.1; exit 75"  # Slurm signals the task's shell as well as the rank


def test_each_task_has_its_rank_and_one_rendezvous(slurm):
    show = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $2 ${*: -4}"'
    done = slurm(show, "--lr", "1e-5", attempt=2)
    recipe = "megatron_llama3.recipes.pretrain --lr 1e-5 --exit-signal-handler --auto-resume"
    assert [line for line in done.stdout.splitlines() if "recipes" in line] == [
        f"0 0 2 10.0.0.7 {20000 + 1234 + 2018} {recipe}",
        f"1 0 2 10.0.0.7 {20000 + 1234 + 2018} {recipe}",
    ], done.stderr
    assert done.returncode == 0
    assert "scontrol" not in done.stdout


def test_srun_gets_the_flags_of_the_environment(slurm, tmp_path):
    slurm("true", SRUN_FLAGS="--container-image=a.sqsh --container-mounts=/b:/b")
    assert (tmp_path / "logs" / "srun").read_text().startswith("srun --container-image=a.sqsh --container-mounts=/b:/b --nodes")


def test_a_saved_run_is_requeued_without_end(slurm):
    for attempt in range(4):
        done = slurm(SAVED, attempt=attempt, MAX_FAILURES="2")
        assert done.returncode == 0, done.stderr
        assert "saved, and work is left; requeued\nscontrol requeue 31234\n" in done.stdout


def test_failures_in_a_row_end_the_job(slurm):
    killed = "((RANK == 1)) || exit 75; kill -KILL $$"  # rank 0 lost contact with rank 1
    assert slurm(killed, attempt=0, MAX_FAILURES="2").stdout.endswith("failure 1 of at most 2 in a row; requeued\nscontrol requeue 31234\n")
    assert slurm(SAVED, attempt=1, MAX_FAILURES="2").stdout.endswith("requeue 31234\n")  # and counts anew
    assert "rank 1 on gpu8: status 137" in slurm(killed, attempt=2, MAX_FAILURES="2").stdout
    done = slurm(killed, attempt=3, MAX_FAILURES="2")
    assert done.returncode == 1
    assert "failure 2 in a row" in done.stdout
    assert "scontrol" not in done.stdout


def test_lost_contact_without_a_signal_is_a_failure(slurm):
    assert "rank 0 on gpu7: status 75" in (done := slurm("exit 75", MAX_FAILURES="1")).stdout
    assert done.returncode == 1


def test_what_is_refused_is_not_requeued(slurm):
    done = slurm("echo error: no such file >&2; exit 2")
    assert done.returncode == 2
    assert "rank 0 on gpu7: status 2" in done.stdout
    assert "scontrol" not in done.stdout


def test_preflight_comes_first_and_may_end_the_attempt(slurm):
    done = slurm('echo "$2 $PREFLIGHT_GPUS"; [[ $2 != tools.preflight ]]', PREFLIGHT="", SLURM_GPUS_PER_NODE="h100:8")
    assert "tools.preflight 8\n" in done.stdout
    assert "recipes.pretrain" not in done.stdout
    assert done.stdout.endswith("scontrol requeue 31234\n")


def test_without_an_example(slurm):
    done = slurm("")
    assert done.returncode == 2
    assert done.stderr.startswith("error: name the example to run")


def test_a_node_without_an_address_is_one_line(slurm):
    done = slurm("exit 0", SLURM_JOB_NODELIST="ghost1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "scontrol show node ghost1 gives no NodeAddr" in done.stderr


def test_a_missing_program_is_not_requeued_and_the_reason_is_in_the_jobs_log(slurm):
    done = slurm("exit 127")
    assert done.returncode == 2
    assert "rank 0 on gpu7: status 127 (see" in done.stdout
    assert "a program or script is missing or cannot be run; not requeued" in done.stdout
    assert "scontrol" not in done.stdout


def test_the_jobs_log_has_the_words_of_the_first_rank_that_failed(slurm, tmp_path):
    (tmp_path / "logs").mkdir()
    # The real srun writes what a rank prints into this file; here the program does it.
    say = 'mkdir -p "$LOGS"; ((RANK == 1)) || exit 75; echo "error: --lr -1: must be above 0" >>"$LOGS/rank_00001_gpu8.log"; exit 2'
    done = slurm(say)
    assert done.returncode == 2
    assert "rank 1 on gpu8: status 2: error: --lr -1: must be above 0 (see" in done.stdout
    assert "a flag or a file was refused; not requeued" in done.stdout


def test_the_rendezvous_is_where_rank_0_is_placed(slurm, tmp_path):
    (tmp_path / "hosts").write_text("gpu7\ngpu9\ngpu7\n")
    arbitrary = {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_HOSTFILE": str(tmp_path / "hosts"), "SLURM_JOB_NODELIST": "none"}
    done = slurm('echo "at $MASTER_ADDR"', **arbitrary)
    assert "at 10.0.0.7" in done.stdout


def test_of_the_nodes_that_are_there_as_many_are_used_as_the_flags_fit_on(slurm):
    """And the next attempt says what has changed."""
    show, asked = (
        'echo "of $WORLD_SIZE"',
        'echo "$LARGEST of $STEP" >"$LOGS/asked"; echo $((LARGEST - GIVE)); echo "DP $((LARGEST - GIVE))"',
    )
    first = slurm(show, fits=asked, GIVE="0", SLURM_JOB_NUM_NODES="3", SLURM_NTASKS_PER_NODE="4")
    assert "12 tasks on 3 of 3 nodes: DP 12 (gpu[7-20000])" in first.stdout
    assert first.stdout.count("\nof 12\n") == 2
    assert "others than before" not in first.stdout
    fewer = slurm(show, attempt=1, fits=asked, GIVE="4", SLURM_JOB_NUM_NODES="2", SLURM_NTASKS_PER_NODE="4")
    changed = "4 tasks on 1 of 2 nodes: DP 4 (before: 12 tasks on 3 of 3 nodes: DP 12)"
    assert f"the nodes are others than before, and the run goes on with the same batches: {changed}" in fewer.stdout
    assert fewer.stdout.count("\nof 4\n") == 2


@pytest.mark.parametrize("fits", ["exit 127", "echo error: --lr is no flag >&2; exit 2", "echo 4"])
def test_where_that_cannot_be_told_all_tasks_start_and_say_what_is_wrong(slurm, fits):
    done = slurm('echo "of $WORLD_SIZE"', fits=fits, SLURM_JOB_NUM_NODES="2", SLURM_NTASKS_PER_NODE="4")
    assert done.stdout.count("\nof 8\n") == 2
