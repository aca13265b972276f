"""What the tasks of a collecting pass count, as JSON in one folder, for the pass that follows to read whole."""

import json
from pathlib import Path

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.storage.files import task_file, whole_file


def write_task_counts(folder: str, rank: int, world_size: int, counts: dict) -> None:
    """Writes `folder`/RANK.json whole; a task that runs again replaces its own."""
    content = json.dumps({"tasks": world_size, "counts": counts}, ensure_ascii=False)
    with whole_file(task_file(folder, rank, "json")) as file:
        file.write(content.encode("utf-8", "surrogatepass"))


def read_task_counts(folder: str) -> list[dict]:
    """The counts of every task. Raises UserError where a task's are missing, or there are some of another run."""
    contents = []
    for path in sorted(Path(folder).glob("[0-9]*.json")):
        try:
            contents.append(json.loads(path.read_bytes().decode("utf-8", "surrogatepass")))
        except ValueError as error:
            raise UserError(f"{path}: is no JSON ({error}); remove the folder and run the counting pass again") from error
    tasks = {content["tasks"] for content in contents}
    if tasks != {len(contents)}:
        of = " or ".join(map(str, sorted(tasks))) or "all"
        raise UserError(f"{folder}: has the counts of {len(contents)} of {of} tasks; run the counting pass to its end in an empty folder")
    return [content["counts"] for content in contents]
