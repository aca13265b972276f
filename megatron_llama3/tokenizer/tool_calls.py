"""Reading a tool call out of what the assistant wrote: the forms that Llama 3.1 and 3.2 use (Meta's prompt-format pages)."""

import ast
import json
import re
from typing import Any

_BUILTIN = re.compile(r'\b(\w+)\.call\(query="([^"]*)"\)')
_FUNCTION_TAG = re.compile(r"<function=([^}]+)>(\{.*?\})")


def read_name_and_arguments(text: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of the first call, or None. Forms: `<function=f>{...}`, JSON, `[f(a=1)]`, `brave_search.call(query="...")`."""
    return _function_tag(text) or _json_call(text) or _python_list(text) or _builtin(text)


def _function_tag(text: str) -> tuple[str, dict] | None:
    match = _FUNCTION_TAG.search(text)
    if not match:
        return None
    try:
        return match[1], json.loads(match[2])
    except ValueError:
        return None


def _json_call(text: str) -> tuple[str, dict] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("parameters"), dict):
        return call["name"], call["parameters"]
    return None


def _python_list(text: str) -> tuple[str, dict] | None:
    try:
        calls = ast.parse(text.strip(), mode="eval").body
        if not isinstance(calls, ast.List) or not calls.elts or not all(_plain_call(call) for call in calls.elts):
            return None
        first = calls.elts[0]
        return first.func.id, {keyword.arg: ast.literal_eval(keyword.value) for keyword in first.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _plain_call(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args and all(word.arg for word in node.keywords)


def _builtin(text: str) -> tuple[str, dict] | None:
    match = _BUILTIN.search(text)
    return (match[1], {"query": match[2]}) if match else None
