"""Pretraining (paper, section 3.4): from an indexed dataset to a checkpoint.

    torchrun --nproc-per-node 8 -m megatron_llama3.recipes.pretrain --model-name llama3-8b --data-path DATA ...
    python -m megatron_llama3.recipes.pretrain --dry-run --world-size 16384 ...

Every flag is a field of megatron_llama3/config/; `--help` lists them. A config that cannot work is refused before torch is imported.
"""

import sys
import time
from functools import partial

from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.launcher import check_launcher, wait_for_rank_0
from megatron_llama3.config.run import RunConfig
from megatron_llama3.config.storage import patiently
from megatron_llama3.tokenizer.llama3 import check_vocabulary_size
from megatron_llama3.training.failures import run_and_exit
from megatron_llama3.training.launcher_guard import end_with_launcher
from megatron_llama3.training.stop import StopReasons


def pretrain(config: RunConfig) -> int:
    """Returns the exit status, see training/failures.py."""
    since, stop, minutes = time.time(), StopReasons(config), config.training.storage_retry_minutes
    if config.data.tokenizer_model is not None:
        patiently(lambda: check_vocabulary_size(config.data.tokenizer_model, config.model.vocab_size), minutes)
    # Imported here and in _run, so that refusals and dry runs take no seconds of torch.
    import torch.distributed as dist

    from megatron_llama3.checkpoint.save_lock import held
    from megatron_llama3.data.loader import build_train_and_valid_streams
    from megatron_llama3.parallel.groups import destroy_groups, initialize_groups
    from megatron_llama3.planning.estimate import describe
    from megatron_llama3.training.flight_recorder import keep_collectives

    keep_collectives()
    streams = patiently(lambda: build_train_and_valid_streams(config), minutes)
    groups = initialize_groups(config.parallel, config.training.distributed_timeout_minutes)
    if groups.rank == 0:
        print(*config.notices, describe(config), sep="\n", flush=True)

    with held(config.checkpoint.save, groups, minutes) as lock:
        state = _run(config, groups, streams, stop, lock, since)

    dist.barrier(groups.control)  # the launcher ends every rank when the first one leaves with a status other than 0
    destroy_groups()
    return stop.exit_status(state)


def _run(config: RunConfig, groups, streams, stop: StopReasons, lock, since: float):
    """From the checkpoint to go on from, if there is one, to the reason to stop; returns the last TrainState."""
    from megatron_llama3.checkpoint.start import find_start, load_start
    from megatron_llama3.recipes.hooks import Observers, hooks_in_order
    from megatron_llama3.training.build import build_engine
    from megatron_llama3.training.events import EventLog
    from megatron_llama3.training.failures import noted_failures
    from megatron_llama3.training.loop import train
    from megatron_llama3.training.objectives import NextToken
    from megatron_llama3.training.profiling import memory_history
    from megatron_llama3.training.watchdog import Watchdog
    from megatron_llama3.training.whereabouts import LOAD

    say = partial(print, flush=True) if groups.rank == 0 else lambda line: None
    events, watchdog = EventLog(config), Watchdog(config.training, groups, EventLog(config))  # its thread has a log of its own
    start = find_start(config, groups)  # refused before any weight is made, and any word about it kept, if it does not fit
    if groups.rank == 0:
        events.add("launch", since=since)
    engine, objective = build_engine(config, groups), NextToken()
    if start is not None:
        watchdog.announce(LOAD)
    start, state = load_start(start, config, engine, streams[0])
    say(_kernels(config, engine))
    say(f"loaded {start.folder} at iteration {state.iteration}" if start else "starting from initial weights")

    observers = Observers(config, groups, state, events, watchdog)
    hooks = hooks_in_order(engine, objective, streams, config, observers, start, stop)
    hooks += [lambda *step: lock.check()] if lock is not None else []
    observers.record("start", state, since=since, loaded=start and str(start.folder), world_size=config.parallel.world_size)
    with memory_history(config, groups.rank), noted_failures(observers.events, state, groups.rank):
        reason = train(engine, objective, streams[0], state, config, hooks, stop)
    observers.record("stop", state, reason=reason, is_finished=state.iteration >= config.training.train_iters)
    observers.close()
    say(f"stopped at iteration {state.iteration}: {reason}")
    return state


def _kernels(config: RunConfig, engine) -> str:
    """What the model computes with, as a line for the log."""
    from megatron_llama3.model.attention import choose_kernel
    from megatron_llama3.model.norm import fused_norm

    kernel = choose_kernel(config.training.attention_kernel, engine.groups.device, engine.compute_dtype)
    return f"attention kernel: {kernel}; RMSNorm: {fused_norm()[0]}; engine: {config.parallel.engine}"


def main() -> int:
    config = parse_run_config(sys.argv[1:])
    if not config.dry_run:
        check_launcher()
        end_with_launcher()
        wait_for_rank_0(config.training.distributed_timeout_minutes)
        return pretrain(config)
    from megatron_llama3.planning.estimate import describe

    print(*config.notices, describe(config), sep="\n")
    return 0


def command() -> None:
    run_and_exit(main)


if __name__ == "__main__":
    command()
