"""The texts of files, folders and globs, one after another: what training a tokenizer and measuring one read."""

from collections.abc import Iterator, Sequence

from megatron_llama3.config.errors import UserError
from megatron_llama3.data.preprocess_inputs import Source, expand_inputs, open_source
from megatron_llama3.data.preprocess_lines import BadRecordError, BlankLineError, check_record, parse_json


def read_texts(paths: Sequence[str], input_format: str = "auto", key: str = "text", max_bytes: int | None = None) -> Iterator[str]:
    """Every text, up to `max_bytes` of UTF-8 in all. Raises UserError at the first record that holds none."""
    left = max_bytes
    for source in expand_inputs(paths, input_format):
        for text in _texts_of(source, key):
            yield text
            if left is not None and (left := left - len(text.encode())) <= 0:
                return


def _texts_of(source: Source, key: str) -> Iterator[str]:
    if source.kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(1024, columns=[key]):
                yield from (text for text in batch.column(0).to_pylist() if text)
        return
    with open_source(source.path, source.compression) as stream:
        if source.kind == "text":
            yield stream.read().decode("utf-8", errors="replace")
            return
        for number, line in enumerate(stream, 1):
            try:
                record = parse_json(line)
                check_record(record, [key])
                yield record[key]
            except BlankLineError:
                continue
            except BadRecordError as error:
                raise UserError(f"{source.path} line {number}: {error}") from None
