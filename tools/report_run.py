"""How well a run used its time: effective training time, what interrupted it, and loss, tokens/s and MFU over wall time.

    python tools/report_run.py RUN_FOLDER [--plot report.png] [--html report.html]

RUN_FOLDER is the run's --log-dir, or its --save folder, with events.jsonl and metrics.jsonl over all its starts. Effective training time is
the time of the steps that the weights are made of, over the wall time since the first start (paper, section 3.3.4: over 90%); steps lost
with a crash, skipped or rolled back do not count. The HTML file is complete in itself.
"""

import argparse
import base64
import html
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error
from megatron_llama3.training.events import EVENTS_FILE, METRICS_FILE, read_lines

BEGINNINGS = ("launch", "start")
"""events with which a start of the run begins: the process, and training in it"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of events.jsonl and metrics.jsonl")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw loss, tokens/s and MFU over wall time")
    parser.add_argument("--html", type=Path, metavar="HTML", help="write the report with its plots as one file")
    arguments = parser.parse_args()
    events, metrics = read_lines(arguments.folder / EVENTS_FILE), read_lines(arguments.folder / METRICS_FILE)
    starts = split_by_start(events, metrics)
    if not starts:
        raise UserError(f"{arguments.folder / EVENTS_FILE}: no start of a run is in it; give the folder of --log-dir or --save")
    lines = report(starts)
    print(*lines, sep="\n")
    if arguments.plot:
        arguments.plot.write_bytes(draw(starts, metrics, "png"))
        print(f"plots: {arguments.plot}")
    if arguments.html:
        arguments.html.write_text(page(arguments.folder.name, lines, draw(starts, metrics, "svg")), encoding="utf-8")
        print(f"report: {arguments.html}")


@dataclass
class Start:
    """What one start of the run left, until the next. Times are seconds since 1970."""

    began: float
    iteration: int | None = None
    """of the checkpoint it went on from; None if it ended before it could train"""
    events: list[dict] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)

    @property
    def records(self) -> list[dict]:
        return self.events + self.metrics

    @property
    def last_sign(self) -> float:
        return max(record["time"] for record in self.records)

    @property
    def last_iteration(self) -> int:
        return max(record.get("iteration", 0) for record in self.records)

    @property
    def startup_seconds(self) -> float:
        """Until training began: imports, groups, loading; all of it where training never began."""
        begun = [event["time"] for event in self.events if event["event"] == "start"]
        return (begun[0] if begun else self.last_sign) - self.began

    def total(self, event: str, key: str) -> float:
        return sum(e[key] for e in self.events if e["event"] == event)

    def cause_of_end(self) -> str:
        """A hang or failure is what ended it, whatever came after it; a start that left no word was killed, or still runs."""
        by_kind = {event["event"]: event for event in reversed(self.events)}
        if "hang" in by_kind:
            hang = by_kind["hang"]
            return f"hang of rank {hang['rank']} on {hang['host']}"
        if "failure" in by_kind:
            return _kind_of(by_kind["failure"]["reason"])
        if "stop" in by_kind:
            return by_kind["stop"]["reason"]
        return "no word (killed)" if self.iteration is not None else "no word (ended before it could train)"

    @property
    def was_told_to_end(self) -> bool:
        kinds = {event["event"] for event in self.events}
        return "stop" in kinds and not kinds & {"hang", "failure"}

    @property
    def is_finished(self) -> bool:
        return any(event.get("is_finished") for event in self.events)


def _kind_of(reason: str) -> str:
    """A failure's reason without what differs from one time to the next: step and rank in a checkpoint's file names."""
    return re.sub(r"__\d+_\d+\.distcp", "__RANK.distcp", re.sub(r"iter_\d+", "iter_STEP", reason))


def split_by_start(events: list[dict], metrics: list[dict]) -> list[Start]:
    """Events and metrics by the start of the run that they belong to."""
    events = [event for event in events if {"event", "time"} <= event.keys() and (event["event"] not in BEGINNINGS or "since" in event)]
    first = next((i for i, event in enumerate(events) if event["event"] in BEGINNINGS), len(events))
    starts: list[Start] = []
    for event in events[first:]:
        is_known = bool(starts) and starts[-1].iteration is None and event.get("since") == starts[-1].began
        if event["event"] in BEGINNINGS and not is_known:
            starts.append(Start(event["since"]))
        if event["event"] == "start":
            starts[-1].iteration = event["iteration"]
        starts[-1].events.append(event)
    borders = [start.events[0]["time"] for start in starts[1:]] + [float("inf")]
    for record in (record for record in metrics if "time" in record):
        owner = next((start for start, end in zip(starts, borders) if record["time"] < end), None)
        if owner is not None:
            owner.metrics.append(record)
    return starts


def report(starts: list[Start]) -> list[str]:
    """The lines that are printed."""
    last = starts[-1]
    wall = last.last_sign - starts[0].began
    counted = [record for start in starts for record in start.records if "useful_seconds" in record]
    useful = max(counted, key=lambda record: record["time"])["useful_seconds"] if counted else 0.0
    down = [max(0.0, later.began - earlier.last_sign) for earlier, later in pairwise(starts)]
    trained = [start for start in starts if start.iteration is not None]
    lost = [max(0, earlier.last_iteration - later.iteration) for earlier, later in pairwise(trained)]
    spent = {
        "start-up": sum(start.startup_seconds for start in starts),
        "stalls of saves": sum(start.total("save", "stall_seconds") for start in starts),
        "evaluation": sum(start.total("evaluate", "seconds") for start in starts),
        "down between starts": sum(down),
    }
    spent["steps lost, skipped or rolled back, and the rest"] = max(0.0, wall - useful - sum(spent.values()))
    state = "finished" if last.is_finished else "not finished"
    reached = max(start.last_iteration for start in [last, *trained[-1:]])
    lines = [
        f"run                 {reached:,} iterations, {state}, {clock(wall)} since its first start",
        f"effective training  {useful / wall:.1%} of that time: {clock(useful)}",
        *(f"  {seconds / wall:>6.1%}  {clock(seconds)}  {what}" for what, seconds in spent.items()),
    ]
    told = Counter(start.cause_of_end() for start in starts[:-1] if start.was_told_to_end)
    causes = Counter(start.cause_of_end() for start in starts[:-1] if not start.was_told_to_end)
    lines += [f"interruptions       {causes.total()}; {sum(lost):,} steps lost and done again", *_counted(causes)]
    lines += [f"stops asked for     {told.total()}", *_counted(told)]
    if not last.is_finished:
        lines.append(f"last word           {last.cause_of_end()}")
    return lines + trouble(starts)


def _counted(causes: Counter) -> list[str]:
    return [f"  {count:>6}  {cause}" for cause, count in causes.most_common()]


def trouble(starts: list[Start]) -> list[str]:
    """Skipped steps, rollbacks and slow ranks; nothing where there were none."""
    events = [event for start in starts for event in start.events]
    skips = {event["iteration"]: event for event in events if event["event"] == "skip"}
    rollbacks = {event["iteration"]: event for event in events if event["event"] == "rollback"}
    slow = Counter(f"rank {event['rank']} on {event['host']}" for event in events if event["event"] == "straggler")
    lines = [f"skipped steps       {len(skips)}; what they read: tools/inspect_dataset.py --load RUN --step ITERATION"] if skips else []
    lines += [f"  iteration {iteration}: {event['reason']}" for iteration, event in sorted(skips.items())]
    lines += [f"rollbacks           {len(rollbacks)}"] if rollbacks else []
    lines += [f"  iteration {i}: to {e['to']}, {e['lost_updates']} updates lost" for i, e in sorted(rollbacks.items())]
    lines += [f"slow ranks          {sum(slow.values())} reports"] if slow else []
    return lines + [f"  {count:>6}  {rank}" for rank, count in slow.most_common(10)]


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:>4}:{minutes:02}:{seconds:02}"


def draw(starts: list[Start], metrics: list[dict], kind: str) -> bytes:
    """A picture of loss, tokens/s and MFU over hours since the first start; grey lines are later starts, red ones skipped steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def hours(record: dict) -> float:
        return (record["time"] - starts[0].began) / 3600

    figure, axes = pyplot.subplots(3, sharex=True, figsize=(10, 9), layout="constrained")
    has_mfu = any("mfu_causal_attention" in record for record in metrics)
    third = ("mfu_causal_attention", "MFU (causal FLOPs)") if has_mfu else ("tflops_per_rank_causal_attention", "TFLOP/s a rank")
    for axis, (key, label) in zip(axes, [("loss", "loss"), ("tokens_per_second", "tokens/s"), third]):
        for start in starts:
            points = [(hours(record), record[key]) for record in start.metrics if key in record]
            axis.plot(*zip(*points), color="tab:blue", marker="." if len(points) == 1 else "")
        for start in starts[1:]:
            axis.axvline((start.began - starts[0].began) / 3600, color="gray", linewidth=0.5)
        axis.set(ylabel=label)
    validation = [(hours(record), record["validation_loss"]) for record in metrics if "validation_loss" in record]
    if validation:
        axes[0].plot(*zip(*validation), "o", color="tab:orange", label="validation")
        axes[0].legend()
    for event in (event for start in starts for event in start.events if event["event"] == "skip"):
        axes[0].axvline(hours(event), color="tab:red", linewidth=0.5)
    axes[-1].set(xlabel="hours since the first start")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def page(name: str, lines: list[str], svg: bytes) -> str:
    """The report as one HTML file that needs nothing else."""
    title, text = html.escape(f"Run {name}"), html.escape("\n".join(lines))
    picture = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    style = "body{font-family:sans-serif;max-width:70em;margin:2em auto}img{width:100%}pre{background:#f4f4f4;padding:1em}"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f'{head}<h1>{title}</h1><pre>{text}</pre><img alt="loss, tokens/s and MFU over wall time" src="{picture}"></html>\n'


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
