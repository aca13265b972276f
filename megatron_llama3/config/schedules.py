"""Ramps of batch size and sequence length by tokens seen (paper, section 3.4.1), as pure functions of the config."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from megatron_llama3.config.errors import UserError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Phase(NamedTuple):
    """From `start` tokens on, each step is `global_batch_size` sequences of `seq_length` tokens."""

    start: int
    global_batch_size: int
    seq_length: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


def parse_token_count(text: str) -> int:
    """`252M` -> 252,000,000. Raises ValueError."""
    suffix = text[-1:].upper()
    number = Fraction(text[:-1] if suffix in _SUFFIXES else text) * _SUFFIXES.get(suffix, 1)
    if number < 0 or number.denominator != 1:
        raise ValueError(text)
    return int(number)


def parse_schedule(text: str, flag: str) -> list[tuple[int, int]]:
    """`"0:1024 2.87T:2048"` -> [(0, 1024), (2870000000000, 2048)]. Raises UserError; `flag` names the culprit in its message."""
    steps = []
    for entry in text.split():
        threshold, _, value = entry.partition(":")
        try:
            steps.append((parse_token_count(threshold), int(value)))
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{flag} '{text}': '{entry}' is not TOKENS:VALUE, such as 252M:1024") from None
        if steps[-1][1] < 1:
            raise UserError(f"{flag} '{text}': the value in '{entry}' must be at least 1")
    if not steps or steps[0][0] != 0:
        raise UserError(f"{flag} '{text}': the first threshold must be 0")
    for (earlier, _), (later, _) in pairwise(steps):
        if later <= earlier:
            raise UserError(f"{flag} '{text}': threshold {later:,} does not come after {earlier:,}")
    return steps


def batch_size_steps(config) -> list[tuple[int, int]]:
    """(tokens, global batch size) of a RunConfig; one entry without a schedule."""
    training, flag = config.training, "--step-batch-size-schedule"
    if training.step_batch_size_schedule is not None:
        return parse_schedule(training.step_batch_size_schedule, flag)
    return [(0, training.global_batch_size or training.micro_batch_size * config.parallel.data_parallel_size)]


def seq_length_steps(config) -> list[tuple[int, int]]:
    """(tokens, sequence length) of a RunConfig; one entry without a schedule."""
    if config.data.seq_length_schedule is not None:
        return parse_schedule(config.data.seq_length_schedule, "--seq-length-schedule")
    return [(0, config.data.seq_length)]


def phases(config) -> list[Phase]:
    """Both schedules of a RunConfig merged, in order of tokens."""
    batches, lengths = batch_size_steps(config), seq_length_steps(config)
    starts = sorted({start for start, _ in batches + lengths})
    merged = [Phase(start, _value_at(batches, start), _value_at(lengths, start)) for start in starts]
    return merged[:1] + [p for before, p in pairwise(merged) if (p.global_batch_size, p.seq_length) != before[1:]]


def _value_at(steps: list[tuple[int, int]], tokens: int) -> int:
    return [value for start, value in steps if start <= tokens][-1]


def phase_at(config, consumed_tokens: int) -> tuple[int, int]:
    """(global batch size, sequence length) of the step that starts at `consumed_tokens`; a threshold reached begins its phase."""
    return _value_at(batch_size_steps(config), consumed_tokens), _value_at(seq_length_steps(config), consumed_tokens)


def tokens_after(config, iterations: int) -> int:
    """Tokens seen after so many optimizer steps from the start of the run."""
    consumed = 0
    for phase, most in _steps_of_phases(config):
        steps = iterations if most is None else min(iterations, most)
        consumed += steps * phase.tokens_per_step
        iterations -= steps
    return consumed


def iterations_of(config, samples: int) -> int:
    """Optimizer steps that read at most so many sequences from the start of the run, as Megatron-LM counts them: a rest is not read."""
    iterations = 0
    for phase, most in _steps_of_phases(config):
        steps = samples // phase.global_batch_size
        if most is None or steps < most:
            return iterations + steps
        iterations += most
        samples -= most * phase.global_batch_size
    return iterations


def _steps_of_phases(config) -> Iterator[tuple[Phase, int | None]]:
    """Each phase with its optimizer steps; None for the last, which has no end."""
    consumed, plan = 0, phases(config)
    for phase, following in pairwise(plan):
        steps = max(0, -(-(following.start - consumed) // phase.tokens_per_step))
        consumed += steps * phase.tokens_per_step
        yield phase, steps
    yield plan[-1], None
