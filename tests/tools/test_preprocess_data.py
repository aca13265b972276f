"""tools/preprocess_data.py: what it writes from every form of input, and how it treats bad input."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.data import preprocess_inputs, preprocess_lines, preprocess_worker
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.preprocess import preprocess
from tests.tokenizer.vocabularies import small_vocabulary
from tests.tools.preprocess_helpers import (
    ENVIRONMENT,
    TOOL,
    compress,
    decoded,
    documents,
    expected_ids,
    options,
    output_bytes,
    run,
    run_tool,
    small_units,
    vocabulary_folder,
    write_jsonl,
)

TEXTS = documents(120)


def _parquet(path, texts, key="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), key: texts}), path, row_group_size=17)
    return path


def _inputs(form, folder):
    """The same texts in any form of input."""
    folder.mkdir()
    if form == "text":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:04d}.txt").write_bytes(text.encode())
        return [folder]
    if form == "parquet":
        return [_parquet(folder / "a.parquet", TEXTS)]
    plain = write_jsonl(folder / "a.jsonl", TEXTS)
    if form == "jsonl":
        return [plain]
    if form == "glob":
        write_jsonl(folder / "a.jsonl", TEXTS[:50])
        write_jsonl(folder / "b.jsonl", TEXTS[50:])
        return [folder / "*.jsonl"]
    packed = compress(folder / f"b.jsonl{form}", plain.read_bytes())
    plain.unlink()
    return [packed]


@pytest.mark.parametrize("form", ["jsonl", ".gz", ".zst", "parquet", "text", "glob"])
def test_every_form_gives_the_same_tokens(form, tmp_path, monkeypatch):
    small_units(monkeypatch)
    job = options(tmp_path, *_inputs(form, tmp_path / "in"), prepend_bod=True)
    summary, outputs = preprocess(job)
    assert outputs == [f"{tmp_path}/out_text_document"]
    assert decoded(job) == expected_ids(TEXTS, bos=True)
    assert (summary.documents, summary.rejected, summary.characters) == (len(TEXTS), 0, sum(map(len, TEXTS)))
    assert summary.tokens == sum(map(len, decoded(job)))
    assert summary.longest == max(map(len, decoded(job)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == [
        f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".json", ".sources.npy")
    ]


def test_workers_and_units_do_not_change_the_bytes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = options(tmp_path, path, prefix="whole", workers=1)
    preprocess(whole)
    small_units(monkeypatch, 1000)
    for workers in (1, 3):
        job = options(tmp_path, path, prefix=f"by{workers}", workers=workers)
        preprocess(job)
        assert output_bytes(job) == output_bytes(whole)
        assert IndexedDataset(f"{job.prefix}_text_document").largest_id == max(map(max, decoded(job)))


@pytest.mark.slow
def test_megatron_core_reads_it(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    job = options(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    preprocess(job)
    theirs = indexed_dataset.IndexedDataset(f"{job.prefix}_text_document")
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected_ids(TEXTS)
    assert theirs.document_indices.tolist() == list(range(len(TEXTS) + 1))
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for ids in expected_ids(TEXTS):
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = output_bytes(job)
    assert ours[".bin"] == (tmp_path / "theirs.bin").read_bytes()
    assert ours[".idx"] == (tmp_path / "theirs.idx").read_bytes()


def test_origins_lead_back_to_the_lines(tmp_path, monkeypatch):
    small_units(monkeypatch)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    job = options(tmp_path, path)
    preprocess(job)
    dataset, data = IndexedDataset(f"{job.prefix}_text_document"), path.read_bytes()
    assert dataset.sidecar["sources"] == [{"path": str(path), "unit": "bytes"}]
    for text, (source, start, end) in zip(TEXTS, dataset.origins):
        assert source == 0
        assert json.loads(data[start:end])["text"] == text


def test_several_keys_go_to_datasets_of_their_own(tmp_path):
    lines = [json.dumps({"title": f"T{i}", "body": text}) for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"title": "no body"}']))
    job = options(tmp_path, tmp_path / "a.jsonl", json_keys=("title", "body"))
    summary, _ = preprocess(job)
    assert decoded(job, "title") == expected_ids(f"T{i}" for i in range(len(TEXTS)))
    assert decoded(job, "body") == expected_ids(TEXTS)
    assert summary.rejected == 1


def test_special_tokens_are_text_unless_asked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a<|end_of_text|>b"])
    vocabulary, job = small_vocabulary(), options(tmp_path, path, append_eod=False)
    preprocess(job)
    assert max(decoded(job)[0]) < vocabulary.n_bpe
    job = options(tmp_path, path, prefix="parsed", append_eod=False, parse_special_tokens=True)
    preprocess(job)
    assert decoded(job)[0] == [*vocabulary.encode("a"), vocabulary.eos_id, *vocabulary.encode("b")]


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".txt"])
def test_documents_longer_than_memory_should_hold(form, tmp_path, monkeypatch):
    """With small limits, so that a document of 700 KB takes the way of one of 1 GB."""
    small_units(monkeypatch, 10_000)
    for module in (preprocess_lines, preprocess_worker):
        monkeypatch.setattr(module, "BLOCK_BYTES", 5_003)
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 20_011)
    long = " ".join(documents(900))
    texts = [long] if form == ".txt" else ["before", long, "between", long[:30_000], "after"]
    plain = long.encode() if form == ".txt" else write_jsonl(tmp_path / "plain", texts).read_bytes()
    path = tmp_path / f"in{form}"
    if form.endswith(".gz"):
        compress(path, plain)
    else:
        path.write_bytes(plain)
    job = options(tmp_path, path)
    summary, _ = preprocess(job)
    assert decoded(job) == expected_ids(texts)
    assert (summary.documents, summary.characters) == (len(texts), sum(map(len, texts)))
    assert IndexedDataset(f"{job.prefix}_text_document").largest_id == max(map(max, expected_ids(texts)))
    if form == ".jsonl":
        origins = IndexedDataset(f"{job.prefix}_text_document").origins
        assert [json.loads(plain[start:end])["text"] for _, start, end in origins] == texts


BAD_LINES = [
    (b'{"text": "cut off', "broken JSON"),
    (b'{"txt": "x"}', "missing key 'text'"),
    (b'{"text": 7}', "wrong type: 'text' is int"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    (b'{"text": ""}', "empty text"),
    (b'[{"text": "x"}]', "not a JSON object"),
    (b'{"text": "\\udc00"}', "lone surrogate"),
    (b"\x00\x01garbage", "broken JSON"),
]


def test_bad_lines_are_skipped_counted_and_listed(tmp_path, monkeypatch):
    small_units(monkeypatch, 500)
    lines, where = [], {}
    for i, text in enumerate(TEXTS):
        lines.append(json.dumps({"text": text}).encode())
        if i % 10 == 0:
            line, reason = BAD_LINES[i // 10 % len(BAD_LINES)]
            lines += [b"", line]
            where[len(lines)] = reason
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    job = options(tmp_path, tmp_path / "a.jsonl")
    summary, _ = preprocess(job)
    assert decoded(job) == expected_ids(TEXTS)
    report = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert summary.rejected == len(where) == len(report)
    assert {entry["line"] for entry in report} == set(where)
    for entry in report:
        assert entry["file"] == str(tmp_path / "a.jsonl")
        assert where[entry["line"]] in entry["reason"]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_can_be_fatal(line, reason, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' * 3 + line + b"\n")
    status, message = run(options(tmp_path, tmp_path / "a.jsonl", bad_lines="fatal"))
    assert status == 2
    assert f"{tmp_path}/a.jsonl line 4: {reason}" in message
    assert not (tmp_path / "out_text_document.idx").exists()


@settings(max_examples=25, deadline=None)
@given(junk=st.lists(st.one_of(st.binary(max_size=40), st.just(b'{"text": "good"}'), st.just(b"\n")), max_size=30))
def test_no_input_makes_it_hang_or_lose_a_line(junk, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("junk")
    data = b"\n".join(junk)
    (tmp_path / "a.jsonl").write_bytes(data)
    job = options(tmp_path, tmp_path / "a.jsonl", workers=1)
    status, message = run(job)
    assert (status, message) == (0, "")
    report = tmp_path / "out.rejected.jsonl"
    rejected = len(report.read_text().splitlines()) if report.exists() else 0
    assert len(decoded(job)) + rejected == sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


def test_standard_input(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    flags = ["--input", "-", "--output-prefix", tmp_path / "out", "--tokenizer-model", vocabulary_folder(tmp_path), "--append-eod"]
    done = run_tool(*flags, input=data)
    assert done.returncode == 0, done.stderr.decode()
    job = options(tmp_path, tmp_path / "a.jsonl")
    assert decoded(job) == expected_ids(TEXTS)
    assert f"{len(TEXTS)} documents" in done.stdout.decode()


def test_shards_put_together_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_inputs, "MIN_UNIT_BYTES", 200)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[i * 40 : i * 40 + 40]) for i in range(3)]
    files.append(compress(tmp_path / "3.jsonl.gz", files[0].read_bytes()))
    whole = options(tmp_path, *files, prefix="whole")
    preprocess(whole)
    parts = []
    for shard in range(5):
        part = options(tmp_path, *files, num_shards=5, shard_id=shard, workers=1 + shard % 3)
        preprocess(part)
        assert part.prefix.endswith(f"out_{shard:05d}_of_00005")
        parts += decoded(part)
    assert parts == decoded(whole)


REFUSED = [
    (["--input", "{tmp}/absent.jsonl"], "--input"),
    (["--input", "{tmp}/odd.bin"], "--input-format"),
    (["--input", "{tmp}/a.jsonl", "--tokenizer-model", "{tmp}/absent"], "absent"),
    (["--input", "{tmp}/a.jsonl", "--workers", "0"], "--workers 0"),
    (["--input", "{tmp}/a.jsonl", "--num-shards", "2", "--shard-id", "2"], "--shard-id 2"),
    (["--input", "{tmp}/cut.jsonl.gz"], "damaged or cut off"),
    (["--input", "{tmp}/cut.jsonl.zst"], "damaged or cut off"),
    (["--input", "{tmp}/cut.parquet"], "not a readable Parquet file"),
    (["--input", "{tmp}/b.parquet"], "no column 'text'"),
    (["--input", "{tmp}/a.jsonl", "--output-prefix", "/dev/null/x"], "/dev/null"),
    (["--input", "{tmp}/empty.jsonl"], "no documents"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_cannot_be_done_is_one_line(flags, message, tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "odd.bin").write_bytes(b"x")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name in ("cut.jsonl.gz", "cut.jsonl.zst"):
        path = compress(tmp_path / name, plain.read_bytes())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path = _parquet(tmp_path / "cut.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:1000])
    _parquet(tmp_path / "b.parquet", TEXTS, key="body")
    defaults = ["--output-prefix", tmp_path / "out", "--tokenizer-model", vocabulary_folder(tmp_path)]
    done = run_tool(*defaults, *[flag.format(tmp=tmp_path) for flag in flags])
    errors = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_it_starts_without_heavy_imports():
    program = f"import runpy, sys; runpy.run_path({str(TOOL)!r}); import megatron_llama3.data.preprocess\n"
    program += "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "megatron", "transformers", "tokenizers", "tiktoken", "pyarrow", "awkward", "deepspeed"}


def test_a_log_gets_plain_lines(tmp_path, monkeypatch):
    from megatron_llama3.data.preprocess_inputs import Unit
    from megatron_llama3.data.preprocess_progress import Progress

    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with Progress(1000, 10) as progress:
        for _ in range(3):
            progress.add(0, Unit((), 500), 10, 2000, 100)
    assert log.getvalue().splitlines()[-1].startswith("30 documents, 6,000 tokens, ")
    assert "30% done, " in log.getvalue()


def test_a_finished_job_is_not_done_again(tmp_path):
    job = options(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    first, _ = preprocess(job)
    made = os.stat(f"{job.prefix}_text_document.bin").st_mtime_ns
    again, _ = preprocess(job)
    assert again == first
    assert os.stat(f"{job.prefix}_text_document.bin").st_mtime_ns == made
    preprocess(options(tmp_path, tmp_path / "a.jsonl", append_eod=False))
    assert decoded(job) == expected_ids(TEXTS, eos=False)
