"""Runs a function on gloo ranks forked from this process, which has imported everything already: a world costs half a second."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llama3.parallel.groups import megatron_parallel_state

megatron_parallel_state()  # imported once, in the parent
FORK = multiprocessing.get_context("fork")


class RankFailedError(AssertionError):
    pass


def run_ranks(world_size: int, function: Callable, *args, timeout: float | None = None) -> list:
    """`function(*args)` on each rank of a gloo world. Returns the results in rank order; the first failure ends all ranks and is raised
    with the rank's traceback. `timeout` in seconds; by default longer the more ranks share a core."""
    timeout = timeout or 240.0 * max(1.0, world_size / (os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receive, send = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_rank_main, args=(rank, world_size, f"{folder}/store", send, function, args), daemon=True)
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()


def start_ranks(world_size: int, main: Callable[[], None], log: Path) -> list[multiprocessing.Process]:
    """`main()` on ranks as a launcher starts them: they meet over TCP, their output is added to `log`, and each ends with its own exit
    status. The caller joins them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        here = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(FORK.Process(target=_launched_main, args=(here | place, main, log), daemon=True))
        processes[-1].start()
    return processes


def _launched_main(environment: dict[str, str], main: Callable[[], None], log: Path) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    main()


def _collect(pipes: list, deadline: float) -> list:
    results, open_pipes = {}, dict(enumerate(pipes))
    while open_pipes:
        ready = wait(list(open_pipes.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(f"ranks {sorted(open_pipes)} did not finish in time")
        for rank in [r for r, p in open_pipes.items() if p in ready]:
            try:
                ok, value = pickle.loads(open_pipes.pop(rank).recv_bytes())
            except EOFError:
                raise RankFailedError(f"rank {rank} died") from None
            if not ok:
                raise RankFailedError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[r] for r in range(len(pipes))]


def _rank_main(rank: int, world_size: int, store_path: str, pipe, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # a recipe wants to see them; the store below stands for them
    torch.set_num_threads(1)
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # as initialize_groups sets it
    try:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        pipe.send_bytes(pickle.dumps((True, function(*args))))
        _leave_together()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    pipe.close()
    os._exit(0)


def _leave_together() -> None:
    """A rank that ended while others still connect to it would fail them."""
    with suppress(RuntimeError):  # another rank failed and is gone, which it has told
        if dist.is_initialized():
            dist.barrier()
