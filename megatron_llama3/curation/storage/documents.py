"""Documents between stages and at the end: one JSONL file a task, whole or absent."""

import os

import orjson
import zstandard
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from megatron_llama3.curation.observe import Tally
from megatron_llama3.curation.storage.files import task_file, whole_file
from megatron_llama3.data.preprocess_inputs import open_source

_SUFFIXES = {"zstd": "jsonl.zst", "none": "jsonl"}


class WriteDocuments(PipelineStep):
    """Writes `FOLDER/RANK.jsonl[.zst]`, {"text", "id", "metadata"} a line, also without documents, and passes the documents on."""

    type = "WRITER"
    name = "documents"

    def __init__(self, folder: str, compression: str = "zstd"):
        super().__init__()
        self.folder, self.compression, self.tally = folder, compression, Tally("written")

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with whole_file(task_file(self.folder, rank, _SUFFIXES[self.compression])) as raw:
            file = zstandard.ZstdCompressor(3).stream_writer(raw, closefd=False) if self.compression == "zstd" else raw
            for document in data:
                self.tally.enters(document)
                record = {"text": document.text, "id": document.id, "metadata": document.metadata}
                try:
                    file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
                except TypeError as error:  # orjson's JSONEncodeError is one: a lone surrogate, a type that JSON does not know
                    self.tally.drops(ascii(document.id), ascii(document.text[:1000]), f"error: {error}")
                    continue
                self.tally.leaves(document)
                yield document
            if file is not raw:
                file.close()


class ReadDocuments(PipelineStep):
    """Reads what `WriteDocuments` of the same rank wrote, compressed."""

    type = "READER"
    name = "documents"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        path = os.path.join(self.folder, f"{rank:05d}.{_SUFFIXES['zstd']}")
        with open_source(path, ".zst") as lines:
            for line in lines:
                yield Document(**orjson.loads(line))
