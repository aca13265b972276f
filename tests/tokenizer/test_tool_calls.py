"""Tool calls in all forms that Llama 3.x writes, among text, and cut at every place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama3.tokenizer.tool_calls import ToolCall, ToolCallReader, read_tool_calls

F, A, B = ToolCall("f", {"a": 1}), ToolCall("a", {"x": 1}), ToolCall("b", {"y": 2})
WEATHER = ToolCall("get_weather", {"city": "Paris"})
TOOLS = ("f", "g", "a", "b", "now", "get_weather", "math.factorial", "brave_search", "wolfram_alpha")

READ = {
    "JSON": ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
    "arguments": ('{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [WEATHER]),
    "arguments as a string": ('{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}', "", [WEATHER]),
    "no parameters": ('{"name": "now", "parameters": null}', "", [ToolCall("now", {})]),
    "name alone": ('{"name": "now"}', "", [ToolCall("now", {})]),
    "two with semicolon": ('{"name":"a","parameters":{"x":1}}; {"name":"b","parameters":{"y":2}}', "", [A, B]),
    "two without": ('{"name":"a","parameters":{"x":1}}\n{"name":"b","parameters":{"y":2}}', "", [A, B]),
    "list": ('[{"name":"a","parameters":{"x":1}}, {"name":"b","parameters":{"y":2}}]', "", [A, B]),
    "text before": ('Sure. {"name":"a","parameters":{"x":1}}', "Sure. ", [A]),
    "text after": ('{"name":"a","parameters":{"x":1}} I called it.', " I called it.", [A]),
    "nested JSON": ('{"name":"a","parameters":{"x":[1,{"y":"}"}]}}', "", [ToolCall("a", {"x": [1, {"y": "}"}]})]),
    "list of more than calls": ('[{"name":"a","parameters":{"x":1}}, 3]', "[, 3]", [A]),
    "tag": ('<function=f>{"a": 1}</function>', "", [F]),
    "tag without end": ('<function=f>{"a": 1}', "", [F]),
    "tag, nested": ('<function=f>{"a": {"b": 1}}</function>', "", [ToolCall("f", {"a": {"b": 1}})]),
    "tag, brace in string": ('<function=f>{"a": "x}y"}</function>', "", [ToolCall("f", {"a": "x}y"})]),
    "tag, tag in string": ('<function=f>{"q": "a<function=g>{}"}</function>', "", [ToolCall("f", {"q": "a<function=g>{}"})]),
    "two tags": ('<function=f>{"a": 1}</function><function=g>{}</function>', "", [F, ToolCall("g", {})]),
    "Python, dotted": ("[math.factorial(number=5)]", "", [ToolCall("math.factorial", {"number": 5})]),
    "Python, two": ("[f(a=1), g(b=2)]", "", [F, ToolCall("g", {"b": 2})]),
    "Python, bracket in string": ('[f(a="]")]', "", [ToolCall("f", {"a": "]"})]),
    "Python, no arguments": ("[now()]", "", [ToolCall("now", {})]),
    "Python, values": (
        '[f(a=-1, c=True, d=None, e=[1, 2.5], g={"h": 1}, t=true, n=null)]',
        "",
        [ToolCall("f", {"a": -1, "c": True, "d": None, "e": [1, 2.5], "g": {"h": 1}, "t": True, "n": None})],
    ),
    "Python after text": ("Let me see: [f(a=1)]", "Let me see: ", [F]),
    "built-in": ('brave_search.call(query="say \\"hi\\"")', "", [ToolCall("brave_search", {"query": 'say "hi"'})]),
    "built-in, two keywords": ('wolfram_alpha.call(query="a", units="b")', "", [ToolCall("wolfram_alpha", {"query": "a", "units": "b"})]),
}  # fmt: skip
TEXT = [
    "Plain words.",
    "",
    'You can use brave_search.call(query="x") for this',
    'os.call(query="rm")',
    '{"name":"a","parameters":{"x":NaN}}',
    '{"name":"a","parameters":{"x":1,"x":2}}',
    '{"name":"a","parameters":[1]}',
    '{"name":"a","parameters":{"x":1}',
    '{"name":"Bob","age":3}',
    '{"name":"unknown","parameters":{}}',
    "<function=unknown>{}</function>",
    "<function=f>[1]</function>",
    "[f(1)]",
    "[f(a=1, a=2)]",
    "[f(a=1e400)]",
    "[f(a=g())]",
    "[f(**{})]",
    "[unknown(a=1)]",
    "[see](https://x.org) and {braces} a<b if x[0] < 3",
    "[" * 50_000,
    '{"name":' * 20_000,
    "[f(a=" + "(" * 10_000 + "])" * 10_000,
]


@pytest.mark.parametrize("text, remains, calls", READ.values(), ids=READ)
def test_calls_are_read_whole_and_however_they_are_cut(text, remains, calls):
    assert read_tool_calls(text, TOOLS) == (remains, calls)
    for size in (1, 2, 3, 5):
        assert in_pieces([text[i : i + size] for i in range(0, len(text), size)]) == (remains, calls)
    for cut in range(len(text)):
        assert in_pieces([text[:cut], text[cut:]]) == (remains, calls)


def in_pieces(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader(TOOLS)
    read = [reader.feed(piece) for piece in pieces] + [reader.feed("", is_last=True)]
    return "".join(text for text, _ in read), [call for _, calls in read for call in calls]


@pytest.mark.parametrize("text", TEXT, ids=[text[:30] or "empty" for text in TEXT])
def test_what_is_no_call_stays_text(text):
    assert read_tool_calls(text, TOOLS) == (text, [])
    assert in_pieces([text[:1], text[1:7], text[7:]]) == (text, [])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([text for text, _, _ in READ.values()] + [text for text in TEXT if len(text) < 99] + [" ", "ok ", "é"])),
    st.data(),
)
def test_streamed_or_not_the_same(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert in_pieces(pieces) == read_tool_calls(text, TOOLS)


def test_text_streams_as_soon_as_it_can_be_no_call():
    reader = ToolCallReader(TOOLS)
    assert reader.feed("A list [of") == ("A list [of", [])  # no tool begins so
    assert reader.feed(" things] and {") == (" things] and ", [])
    assert reader.feed('"name') == ("", [])
    assert reader.feed("d things") == ('{"named things', [])


def test_without_a_list_of_tools_an_object_needs_parameters():
    assert read_tool_calls('{"name": "Bob"}') == ('{"name": "Bob"}', [])
    assert read_tool_calls(json.dumps({"name": "f", "parameters": {"a": 1}})) == ("", [F])
