"""Lines out of any byte range, and strings out of lines too long to hold, against what plain Python makes of the same bytes."""

import io
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.data import preprocess_lines
from megatron_llama3.data.preprocess_lines import BadRecordError, LongLine, check_record, line_blocks, parse_json, stream_json
from tests.tokenizer.vocabularies import TEXTS

LINES = st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=12)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(preprocess_lines, "BLOCK_BYTES", 7)
    monkeypatch.setattr(preprocess_lines, "LONG_LINE_BYTES", 20)


def _lines(stream, start, end):
    found = []
    for offset, block in line_blocks(stream, start, end):
        if isinstance(block, LongLine):
            found.append((offset, b"".join(block)))
            continue
        for line in block.removesuffix(b"\n").split(b"\n"):
            found.append((offset, line))
            offset += len(line) + 1
    return found


@settings(max_examples=300, deadline=None)
@given(lines=LINES, cuts=st.lists(st.integers(0, 400)), end=st.booleans(), block=st.sampled_from([7, 1000]))
def test_ranges_share_the_lines_without_loss_or_repeat(lines, cuts, end, block):
    data = b"\n".join(lines) + (b"\n" if end else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess_lines, "BLOCK_BYTES", block)
        patch.setattr(preprocess_lines, "LONG_LINE_BYTES", 20)
        borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        found = [line for start, stop in itertools.pairwise(borders) for line in _lines(io.BytesIO(data), start, stop)]
    offset, expected = 0, []
    for line in data.split(b"\n"):
        expected.append((offset, line))
        offset += len(line) + 1
    if not expected[-1][1]:
        expected.pop()  # what follows the last newline is no line
    assert found == expected


def test_a_long_line_left_half_read_does_not_spoil_the_next(small_blocks):
    data = b"x" * 100 + b"\nshort\n"
    lines = line_blocks(io.BytesIO(data), 0, len(data))
    offset, line = next(lines)
    assert (offset, isinstance(line, LongLine)) == (0, True)
    next(line)
    assert list(lines) == [(101, b"short\n")]
    assert (line.size, line.length) == (100, 101)


def _streamed(line, keys, chunk):
    """{key: text} by stream_json, fed `chunk` bytes at a time."""
    texts: dict[str, list[str]] = {}
    for key, piece in stream_json((line[i : i + chunk] for i in range(0, len(line), chunk)), keys):
        if piece is None:
            texts[key] = []
        else:
            texts[key].append(piece)
    return {key: "".join(parts) for key, parts in texts.items()}


def _whole(line, keys):
    record = parse_json(line)
    check_record(record, keys, may_be_empty=True)
    return {key: record[key] for key in keys}


def _nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)


VALUES = st.recursive(TEXTS | st.integers() | st.none() | st.booleans(), _nested, max_leaves=6)
ACTIONS = st.sampled_from(["replace", "delete", "insert", "cut"])
RECORDS = st.dictionaries(TEXTS | st.sampled_from(["text", 'te"xt', "te\\xt"]), VALUES, max_size=4)


@settings(max_examples=300, deadline=None)
@given(record=RECORDS, text=TEXTS, escaped=st.booleans(), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40))
def test_streamed_json_equals_parsed_json(record, text, escaped, indent, chunk):
    line = json.dumps({**record, "text": text, "z": [text, {"text": 1}]}, ensure_ascii=escaped, indent=indent).encode()
    assert _streamed(line, ["text"], chunk) == {"text": text} == _whole(line, ["text"])


@settings(max_examples=600, deadline=None)
@given(text=TEXTS, place=st.integers(0, 10**6), byte=st.integers(0, 255), action=ACTIONS, chunk=st.integers(1, 40))
def test_broken_json_is_refused_streamed_as_parsed(text, place, byte, action, chunk):
    line = bytearray(json.dumps({"id": [1, {"a": text}], "text": text, "more": "x"}, ensure_ascii=bool(byte % 2)).encode())
    place %= len(line)
    if action == "cut":
        del line[place:]
    else:
        line[place : place + (action != "insert")] = b"" if action == "delete" else bytes([byte])
    line = bytes(line)
    try:
        expected = _whole(line, ["text"])
    except BadRecordError:
        with pytest.raises(BadRecordError):
            _streamed(line, ["text"], chunk)
    else:
        assert _streamed(line, ["text"], chunk) == expected


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a', "broken JSON"),
    (b'{"text": "a"} x', "broken JSON"),
    (b'{"txt": "a"}', "missing key 'text'"),
    (b'{"text": 5}', "wrong type: 'text' is int"),
    (b'{"text": null}', "wrong type: 'text' is NoneType"),
    (b'{"text": ["a"]}', "wrong type: 'text' is list"),
    (b'["text"]', "not a JSON object but list"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "\\x41"}', "broken JSON"),
    (b'{"text": "a\x01"}', "broken JSON"),
    (b'{"text": ""}', "empty text in 'text'"),
])  # fmt: skip
def test_reasons(line, reason):
    with pytest.raises(BadRecordError, match=reason):
        check_record(parse_json(line), ["text"])
    if not reason.startswith("empty"):
        with pytest.raises(BadRecordError, match=reason.split(" at ")[0]):
            _streamed(line, ["text"], 5)


def test_nan_beside_the_text_is_let_through():
    line = b'{"text": "a", "score": NaN}'
    assert _whole(line, ["text"]) == _streamed(line, ["text"], 3) == {"text": "a"}


def test_of_a_key_given_twice_the_last_counts():
    line = b'{"text": "first", "text": "second"}'
    assert _whole(line, ["text"]) == _streamed(line, ["text"], 4) == {"text": "second"}
