"""A pipeline as stages of tasks: a block that sees the whole corpus ends one stage, searches what it collected, and begins the next."""

from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from megatron_llama3.curation.global_block import GlobalBlock
from megatron_llama3.curation.observe import Observed, Tally, WriteTallies, read_tallies
from megatron_llama3.curation.pipeline import Pipeline
from megatron_llama3.curation.storage.documents import ReadDocuments, WriteDocuments
from megatron_llama3.curation.storage.input import ReadInput
from megatron_llama3.data.preprocess_inputs import Source


@dataclass
class Stage:
    """Tasks that may run at once, after all of the stage before. tallies: where a stage over documents leaves its counts."""

    name: str
    tasks: int
    steps: list[PipelineStep]
    tallies: str | None = None


def build_stages(pipeline: Pipeline, sources: list[Source], output: Path, tasks: int) -> list[Stage]:
    """All stages of a run, in order. The last one's documents go to `OUTPUT/work/documents`."""
    work = output / "work"
    stages: list[Stage] = []
    name, steps = "input", [ReadInput(sources, pipeline.input, str(output / "rejected"))]
    for number, (block_name, block) in enumerate(pipeline.blocks, 1):
        if not isinstance(block, GlobalBlock):
            steps.append(Observed(block_name, block))
            continue
        folder = work / f"{number:02d}_{block_name}"
        steps += [WriteDocuments(str(folder / "documents")), block.collect(str(folder), tasks)]
        stages.append(_over_documents(name, tasks, steps, work))
        for search in block.search(str(folder), tasks):
            stages.append(Stage(f"{folder.name}_{search.name}", search.tasks, [search.step]))
        name, steps = folder.name, [ReadDocuments(str(folder / "documents")), Observed(block_name, block.apply(str(folder)))]
    steps.append(WriteDocuments(str(work / "documents"), pipeline.compression))
    return [*stages, _over_documents(name, tasks, steps, work)]


def _over_documents(name: str, tasks: int, steps: list[PipelineStep], work: Path) -> Stage:
    folder = str(work / "tallies" / name)
    return Stage(name, tasks, [*steps, WriteTallies(folder, [step for step in steps if hasattr(step, "tally")])], folder)


def funnel(stages: list[Stage]) -> list[Tally]:
    """The rows of the report: the input, each block, and what could not be written."""
    rows = [row for stage in stages if stage.tallies for row in read_tallies(stage.tallies, stage.tasks)]
    return [row for row in rows if row.name != "written" or row.reasons]
