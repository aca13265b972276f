"""Stages run by datatrove's executors: on this machine, on Slurm or on Ray.

    OUTPUT/documents/00000.jsonl.zst   what is left, a file a task; the folder appears last, and means that the run is complete
    OUTPUT/rejected/00000.jsonl        what of the input was no document
    OUTPUT/report.json                 the funnel
    OUTPUT/pipeline.json               what the folder is the work of
    OUTPUT/work/                       documents in between, what blocks collected, logs, completions

Every file is whole or absent, and a task's files depend on nothing but its rank, so a task that was killed is simply run again.
"""

import ctypes
import fcntl
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.stats import PipelineStats

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.names import nearest
from megatron_llama3.curation.observe import Tally
from megatron_llama3.curation.pipeline import Pipeline
from megatron_llama3.curation.stages import Stage, build_stages, funnel
from megatron_llama3.curation.storage.files import whole_file

_ROOT = str(Path(__file__).parents[2])
_PR_SET_PDEATHSIG = 1
_OURS = ("pipeline", "tasks", "workers", "logging_dir", "depends", "depends_job_id", "skip_completed", "job_name", "job_id_retriever")
_OURS += ("max_array_launch_parallel",)  # its jobs could not be waited for: datatrove tells the last one's number only


@dataclass(frozen=True)
class ExecutorOptions:
    """kind: local, slurm or ray. workers: tasks at a time, of `tasks`."""

    kind: str = "local"
    tasks: int = 1
    workers: int = 1


def curate(pipeline: Pipeline, output: str, options: ExecutorOptions, say: Callable[[str], None] = print) -> list[Tally]:
    """Runs what is not done yet, and returns the funnel. Raises UserError, also where a task failed; the same call goes on from there."""
    folder = Path(os.path.abspath(output))
    sources = pipeline.input.sources()
    with _locked(folder):
        _claim(folder, pipeline, sources, options.tasks)
        stages = build_stages(pipeline, sources, folder, options.tasks)
        if not (folder / "documents").exists():
            run = {"local": _run_here, "slurm": _run_on_slurm, "ray": _run_on_ray}[options.kind]
            run(stages, folder / "work" / "stages", options, pipeline, say)
            with whole_file(folder / "report.json") as file:
                file.write(json.dumps([asdict(row) for row in funnel(stages)], ensure_ascii=False, indent=1).encode())
            for aside in (folder / "work" / "documents").glob(".*"):  # of tasks that were killed
                aside.unlink()
            os.replace(folder / "work" / "documents", folder / "documents")
        return [Tally(**row) for row in json.loads((folder / "report.json").read_text())]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, no child keeps it when this process is killed
            yield
    except BlockingIOError:
        raise UserError(f"--output {folder}: another run is at work in it") from None


def _claim(folder: Path, pipeline: Pipeline, sources: list, tasks: int) -> None:
    """Refuses a folder that holds the work of another pipeline, input or number of tasks."""
    path = folder / "pipeline.json"
    inputs = [[source.path, source.size, source.mtime_ns] for source in sources]
    claim = {**pipeline.work, "tasks": tasks, "files": pipeline.files, "sources": inputs}
    claim = json.loads(json.dumps(claim, default=str))
    if not path.exists():
        if foreign := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith((".lock", ".pipeline.json"))):
            raise UserError(f"--output {folder}: holds {foreign[0]}, which is not a curation's; choose an empty folder")
        with whole_file(path) as file:
            file.write(json.dumps(claim, indent=1).encode())
        return
    before = json.loads(path.read_text())
    if different := [key for key in claim if claim[key] != before.get(key)]:
        what = {
            "sources": "the input files have changed",
            "files": "a file that a block reads has changed",
            "tasks": f"it was begun with --tasks {before.get('tasks')}",
        }
        reason = what.get(different[0], f"it was begun with other {different[0]}")
        raise UserError(f"--output {folder}: {reason}; choose another folder, or remove this one")


def _check_done(stage: Stage, executor: PipelineExecutor, error: Exception | None = None) -> None:
    incomplete = executor.get_incomplete_ranks(skip_completed=True)
    if error or incomplete:
        said = f": {type(error).__name__}: {' '.join(str(error).split())}" if error else ""
        log = executor.logging_dir.resolve_paths(f"logs/task_{(incomplete or [0])[0]:05d}.log")
        raise UserError(f"stage {stage.name}: {len(incomplete)} of {stage.tasks} tasks did not end well{said}; see {log}") from error


class _Quiet:
    """Logs and tracebacks go to the task's file only; the screen gets the one line of `_check_done`."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            return super()._run_for_rank(rank, local_rank, node_rank)


class _LocalExecutor(_Quiet, LocalPipelineExecutor):
    pass


class _RayExecutor(_Quiet, RayPipelineExecutor):
    pass


class _SlurmExecutor(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Tallies say more, and one job less a stage."""


def _in_order(stages: list[Stage], make: Callable[[Stage, str], PipelineExecutor], logs: Path, say: Callable[[str], None]) -> None:
    for number, stage in enumerate(stages, 1):
        executor = make(stage, str(logs / f"{number:02d}_{stage.name}"))
        started, error = time.monotonic(), None
        todo = len(executor.get_incomplete_ranks())
        try:
            executor.run()
        except UserError:
            raise
        except Exception as caught:
            error = caught
        _check_done(stage, executor, error)
        say(f"[{number}/{len(stages)}] {stage.name}: {todo} of {stage.tasks} tasks run, {time.monotonic() - started:.1f} s")


def _run_here(stages: list[Stage], logs: Path, options: ExecutorOptions, pipeline: Pipeline, say: Callable[[str], None]) -> None:
    _die_with_parent()

    def make(stage: Stage, logging_dir: str) -> PipelineExecutor:
        workers = min(options.workers, stage.tasks)
        return _LocalExecutor(stage.steps, tasks=stage.tasks, workers=workers, logging_dir=logging_dir)

    _in_order(stages, make, logs, say)


def _die_with_parent() -> None:
    """datatrove's manager process would outlive a killed run for ever."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        os.register_at_fork(after_in_child=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))


def _executor_arguments(kind: str, given: dict[str, Any], executor_class: type, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The YAML's group for an executor, checked against what the executor takes."""
    known = [name for name in inspect.signature(executor_class).parameters if name not in _OURS]
    for name in given:
        if name not in known:
            raise UserError(f"{kind}.{name} is not known{nearest(str(name), known)}")
    for name in needed:
        if name not in given:
            raise UserError(f"{kind}.{name} is missing in the YAML, which --executor {kind} needs")
    return given


def _run_on_ray(stages: list[Stage], logs: Path, options: ExecutorOptions, pipeline: Pipeline, say: Callable[[str], None]) -> None:
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray: ray is not installed: pip install ray") from None
    given = dict(pipeline.ray)
    address = given.pop("address", None)
    arguments = {"mem_per_cpu_gb": 0.5, **_executor_arguments("ray", given, RayPipelineExecutor)}
    started = not ray.is_initialized()
    if started:
        here = {"num_cpus": options.workers * arguments.get("cpus_per_task", 1), "include_dashboard": False}
        cluster = {"address": address} if address else here
        environment = {"PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")])}
        ray.init(**cluster, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})

    def make(stage: Stage, logging_dir: str) -> PipelineExecutor:
        workers = min(options.workers, stage.tasks)
        return _RayExecutor(stage.steps, tasks=stage.tasks, workers=workers, logging_dir=logging_dir, **arguments)

    try:
        _in_order(stages, make, logs, say)
    finally:
        if started:
            ray.shutdown()


def _run_on_slurm(stages: list[Stage], logs: Path, options: ExecutorOptions, pipeline: Pipeline, say: Callable[[str], None]) -> None:
    """Submits an array a stage, each after the one before, and waits for the last."""
    for command in ("sbatch", "squeue"):
        if not shutil.which(command):
            raise UserError(f"--executor slurm: {command} is not on the PATH")
    arguments = {"qos": None, **_executor_arguments("slurm", pipeline.slurm, SlurmPipelineExecutor, needed=("partition", "time"))}
    arguments["sbatch_args"] = {"kill-on-invalid-dep": "yes", **(arguments.get("sbatch_args") or {})}
    bin_folder = Path(sys.executable).parent
    setting = f'export PATH="{bin_folder}:$PATH" PYTHONPATH="{_ROOT}:$PYTHONPATH"'
    arguments["env_command"] = "\n".join(filter(None, [arguments.get("env_command"), setting]))
    jobs = logs / "slurm_jobs.json"
    _wait_for_jobs(json.loads(jobs.read_text()) if jobs.exists() else [], "of an earlier start", say)
    executors, ids = [], []
    for number, stage in enumerate(stages, 1):
        logging_dir = str(logs / f"{number:02d}_{stage.name}")
        depends = executors[-1] if executors else None
        name = f"curate_{stage.name}"
        executor = _SlurmExecutor(
            stage.steps, tasks=stage.tasks, workers=options.workers, logging_dir=logging_dir, depends=depends, job_name=name, **arguments
        )
        try:
            executor.run()
        except subprocess.CalledProcessError as error:  # what sbatch said is on the screen
            raise UserError(f"stage {stage.name}: sbatch refused it ({error.returncode}); mend the YAML's slurm group") from None
        executors.append(executor)
        if executor.job_id != -1:
            ids.append(executor.job_id)
            with whole_file(jobs) as file:
                file.write(json.dumps(ids).encode())
    _wait_for_jobs(ids, "submitted", say)
    for stage, executor in zip(stages, executors):
        _check_done(stage, executor)


def _wait_for_jobs(ids: list[str], which: str, say: Callable[[str], None]) -> None:
    if ids:
        say(f"waiting for Slurm jobs {which}: {', '.join(ids)}")
    while ids:
        queue = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True)
        if queue.returncode:
            say(f"squeue: {queue.stderr.strip()}")
        elif not set(queue.stdout.split()) & set(ids):
            break
        time.sleep(2)
