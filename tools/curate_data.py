"""Raw text to training documents: extraction, filters and deduplication, as a YAML says, through datatrove's executors.

    python tools/curate_data.py examples/curate_web.yaml --output data/curated --tasks 16 --workers 16 --report data/curated.html

writes data/curated/documents/*.jsonl.zst, which tools/preprocess_data.py takes, and prints what each block kept and dropped. Killed at any
moment, the same command goes on and ends with the same documents. What of the input is no document is listed in data/curated/rejected/.
"""

import argparse
import sys
from pathlib import Path

from megatron_llama3.config.errors import UserError, exit_on_user_error


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("pipeline", metavar="PIPELINE.yaml", help="input, blocks in order, output: docs/curation.md")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or one that this command began")
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local", help="where tasks run")
    parser.add_argument("--tasks", type=int, default=1, help="parts of the input; the documents are the same under any number")
    parser.add_argument("--workers", type=int, help="tasks at a time (default: all)")
    parser.add_argument("--report", metavar="FILE.html", help="a page that shows the funnel, with samples of what was dropped")
    return parser.parse_args(arguments)


def main() -> None:
    flags = parse_arguments()
    for name in ("tasks", "workers"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)}: must be at least 1")
    if flags.report and not Path(flags.report).absolute().parent.is_dir():
        raise UserError(f"--report {flags.report}: there is no such folder")
    try:
        from megatron_llama3.curation.execute import ExecutorOptions, curate
        from megatron_llama3.curation.pipeline import load_pipeline
        from megatron_llama3.curation.report import report_html, report_text
        from megatron_llama3.curation.storage.files import whole_file
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[curation]' in the project's folder") from None

    pipeline = load_pipeline(flags.pipeline)
    options = ExecutorOptions(flags.executor, flags.tasks, flags.workers or flags.tasks)
    rows = curate(pipeline, flags.output, options, lambda line: print(line, flush=True))
    print(report_text(rows))
    if flags.report:
        with whole_file(flags.report) as file:
            title, yaml = f"Curation: {Path(flags.pipeline).name}", Path(flags.pipeline).read_text(encoding="utf-8")
            file.write(report_html(rows, title, yaml).encode(errors="replace"))
    if rows[0].reasons:
        print(f"{sum(rows[0].reasons.values()):,} records of the input are no documents: see {flags.output}/rejected", file=sys.stderr)


def command() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    command()
