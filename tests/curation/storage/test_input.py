"""Every line of the input is a document or a listed rejection, and tasks share it without gap or overlap."""

import gzip
import os

import orjson
import pytest
import zstandard

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.storage.input import Input, ReadInput
from tests.curation.runs import prose, write_jsonl

BROKEN = [
    (b'{"text": "cut off', "broken JSON"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    (b'{"text": 12}', "wrong type"),
    (b'{"title": "none"}', "missing key 'text'"),
    (b'{"text": ""}', "empty text in 'text'"),
    (b"[1, 2]", "not a JSON object but list"),
    (b'{"text": "\\ud800"}', "lone surrogate in 'text'"),
    (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "broken JSON"),
]


def read(spec: Input, folder, tasks: int):
    """(documents, rejected records, reasons)."""
    found, rejected, reasons = [], [], {}
    for rank in range(tasks):
        step = ReadInput(spec.sources(), spec, str(folder))
        found += step.run(None, rank, tasks)
        rejected += map(orjson.loads, (folder / f"{rank:05d}.jsonl").read_bytes().splitlines())
        for reason, count in step.tally.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return found, rejected, reasons


@pytest.fixture
def corpus(tmp_path):
    """Three kinds of file with 20 documents each, broken lines and blank ones among them."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        records = [{"text": prose(100 * number + seed, 30), "url": f"u{seed}", "metadata": {"date": 1}} for seed in range(20)]
        records[5:5] = [line for line, _ in BROKEN] + [b"", b"  "]
        write_jsonl(folder / name, records)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress((folder / "c.jsonl").read_bytes()))
    (folder / "b.jsonl").unlink()
    (folder / "c.jsonl").unlink()
    return folder


def test_broken_lines_are_counted_and_listed(corpus, tmp_path):
    found, rejected, reasons = read(Input((str(corpus),)), tmp_path / "rejected", 1)
    assert [document.text for document in found] == [prose(100 * n + seed, 30) for n in range(3) for seed in range(20)]
    assert found[0].metadata == {"date": 1, "url": "u0", "file_path": str(corpus / "a.jsonl")}
    assert reasons == {reason: 3 * sum(other == reason for _, other in BROKEN) for _, reason in BROKEN}
    content = (corpus / "a.jsonl").read_bytes()
    for row, (line, reason) in zip(rejected, BROKEN):
        assert content[row["byte"] :].startswith(line + b"\n")
        assert row["reason"].startswith(reason)


@pytest.mark.parametrize("tasks", [2, 3, 7, 100])
def test_any_number_of_tasks_reads_the_same(corpus, tmp_path, tasks):
    one, many = (read(Input((str(corpus),)), tmp_path / str(count), count) for count in (1, tasks))
    assert [(document.id, document.text) for document in many[0]] == [(document.id, document.text) for document in one[0]]
    assert many[1:] == one[1:]


def test_ids_are_kept_and_made_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 7, "text": "seven"}, {"text": "none"}])
    assert [document.id for document in read(Input((str(path),)), tmp_path / "r", 1)[0]] == ["7", f"a.jsonl:{len(path.read_bytes()) - 17}"]


def test_names_that_utf8_cannot_spell_become_escapes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "\\ud800", "text": "one", "of": {"url": ["x\\udfff", 1]}}\n')
    (tmp_path / "in" / os.fsdecode(b"b\xff.jsonl")).write_bytes(b'{"text": "two"}\n{"text": ""}\n')
    for tasks in (1, 3):
        found, rejected, _ = read(Input((str(tmp_path / "in"),)), tmp_path / str(tasks), tasks)
        assert [(document.id, document.text) for document in found] == [("\\ud800", "one"), ("b\\udcff.jsonl:0", "two")]
        assert found[0].metadata["of"] == {"url": ["x?", 1]}
        assert found[1].metadata["file_path"] == rejected[0]["path"] == str(tmp_path / "in" / "b\\udcff.jsonl")
    (tmp_path / "in" / os.fsdecode(b"b\xff.jsonl")).write_bytes(b"")
    found, rejected, _ = read(Input((str(tmp_path / "in"),), format="files"), tmp_path / "files", 1)
    assert (len(found), rejected[0]["reason"]) == (1, "empty text")


def test_a_damaged_file_is_reported_and_the_next_one_read(tmp_path):
    data = zstandard.ZstdCompressor().compress(b'{"text": "one"}\n' * 5000)
    (tmp_path / "a.jsonl.zst").write_bytes(data[: len(data) // 2])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    found, rejected, reasons = read(Input((str(tmp_path / "*.jsonl*"),)), tmp_path / "r", 1)
    assert found[-1].text == "two"
    assert len(rejected) == 1
    assert reasons == {"damaged file, its rest is lost": 1}


def test_files_as_documents(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "a.html").write_text("<p>one\n")
    (folder / "b.1.gz").write_bytes(gzip.compress("zwei ä".encode()))
    (folder / "c.bin").write_bytes(b"\x80\x81")
    (folder / "d.txt").write_bytes(b"")
    (folder / "e.html").write_bytes('<meta charset="iso-8859-1"><p>café'.encode("latin-1"))
    for tasks in (1, 3):
        found, rejected, reasons = read(Input((str(folder),), format="files"), tmp_path / str(tasks), tasks)
        assert [document.text for document in found] == ["<p>one\n", "zwei ä", '<meta charset="iso-8859-1"><p>café']
        assert reasons == {"invalid UTF-8": 1, "empty text": 1}
        assert len(rejected) == 2


def warc_record(url: str, body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", record: str = "response") -> bytes:
    content = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    head = f"WARC/1.0\r\nWARC-Type: {record}\r\nWARC-Record-ID: <urn:x:{url}>\r\nWARC-Date: 2024-01-02T03:04:05Z\r\n"
    head += f"WARC-Target-URI: {url}\r\nContent-Type: application/http; msgtype=response\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def test_a_crawls_warc_files(tmp_path):
    records = [
        warc_record("http://a.org/1", "<p>naïve".encode()),
        warc_record("http://a.org/2", "<meta charset=iso-8859-1><p>café".encode("latin-1"), "text/html"),
        warc_record("http://a.org/3", b"\x89PNG", "image/png"),
        warc_record("http://a.org/4", b"gone", status="404 Not Found"),
        warc_record("http://a.org/5", b"question", record="request"),
        warc_record("http://a.org/6", b" \n"),
    ]
    folder = tmp_path / "crawl"
    folder.mkdir()
    (folder / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    (folder / "b.warc").write_bytes(records[0] + records[1][:-20])
    (folder / "c.warc").write_bytes(b"no archive " * 100)
    (folder / "d.warc.gz").write_bytes(gzip.compress(records[0])[:-20])
    for tasks in (1, 3):
        found, rejected, reasons = read(Input((str(folder),), format="warc"), tmp_path / str(tasks), tasks)
        assert [document.text for document in found] == ["<p>naïve", "<meta charset=iso-8859-1><p>café", "<p>naïve"]
        assert reasons == {
            "not text but image/png": 1,
            "HTTP status 404": 1,
            "empty text": 1,
            "cut off": 1,
            "damaged file, its rest is lost": 2,
        }
        assert len(rejected) == 6
    page = found[0]
    assert (page.id, page.metadata["url"], page.metadata["date"]) == ("<urn:x:http://a.org/1>", "http://a.org/1", "2024-01-02T03:04:05Z")
    assert page.metadata["file_path"] == str(folder / "a.warc.gz")


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing there"):
        Input((str(tmp_path / "none"),)).sources()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="format: files"):
        Input((str(tmp_path / "a.txt"),)).sources()
    with pytest.raises(UserError, match=r"input\.format is 'arc': choose from jsonl, files, warc"):
        Input((str(tmp_path),), format="arc").sources()
