"""The chat format of Llama 3 and 3.1 (paper 4.1.1): headers name who speaks, end tokens say whose turn it is.

    <|begin_of_text|>, then per message <|start_header_id|>role<|end_header_id|>\\n\\n content <|eot_id|> (or <|eom_id|>)

`ChatFormat` gives the ids of Meta's own ChatFormat in llama-models. `with_tools` lays out system prompt, tool definitions and calls as
the published Hugging Face chat template of Llama 3.1 does. Content is always plain text: a special token spelled in it stays text.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.llama3 import Tokenizer
from megatron_llama3.tokenizer.tool_calls import QUERY_TOOLS, ToolCall, read_tool_calls

ROLES = ("system", "user", "assistant", "ipython")
CODE_INTERPRETER = "code_interpreter"
ToolFormat = Literal["json", "function_tag", "python_list"]

# What an exported model's tokenizer_config.json carries: plain dialogs, as `ChatFormat.encode_dialog` has them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role']) + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Message:
    """One message. role: system, user, assistant, or ipython (also "tool": a tool's output).

    end_of_message: the turn goes on after a tool's answer, so <|eom_id|> ends it. python_tag: <|python_tag|> stands before the content.
    """

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    end_of_message: bool = False
    python_tag: bool = False


@dataclass
class ChatFormat:
    """Dialogs to ids and replies back. tool_format: how calls of custom tools are written."""

    tokenizer: Tokenizer
    tool_format: ToolFormat = "json"
    _headers: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    def encode_header(self, role: str) -> list[int]:
        """ids of <|start_header_id|>role<|end_header_id|> and the two newlines."""
        role = "ipython" if role == "tool" else role
        if role not in ROLES:
            raise UserError(f"role {role!r}: must be one of {', '.join(ROLES)} or tool")
        if role not in self._headers:
            tokenizer = self.tokenizer
            name, newlines = tokenizer.encode(role), tokenizer.encode("\n\n")
            self._headers[role] = [tokenizer.start_header_id, *name, tokenizer.end_header_id, *newlines]
        return list(self._headers[role])

    def encode_message(self, message: Message) -> list[int]:
        """Header, content and end token; the first len(encode_header(role)) ids are the header."""
        tokenizer, ids = self.tokenizer, self.encode_header(message.role)
        if message.python_tag or (message.tool_calls and message.tool_calls[0].name == CODE_INTERPRETER):
            ids.append(tokenizer.python_tag_id)
        ids += tokenizer.encode(message.content)
        for call in message.tool_calls:
            ids += tokenizer.encode(write_tool_call(call, self.tool_format))
        return [*ids, tokenizer.eom_id if message.end_of_message else tokenizer.eot_id]

    def encode_dialog(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[int]:
        """BOS and all messages; with `generation_prompt` the header of the assistant's next message."""
        ids = [self.tokenizer.bos_id]
        for message in messages:
            ids += self.encode_message(message)
        return ids + self.encode_header("assistant") if generation_prompt else ids

    def decode_reply(self, ids: Sequence[int], tools: Collection[str] | None = None) -> Message:
        """The assistant's message in generated ids, which may begin with its header and end with an end token.

        tools: the names that it may call; None allows any. What is no call stays content; after <|python_tag|> it is code.
        """
        ids, header = list(ids), self.encode_header("assistant")
        if ids[: len(header)] == header:
            ids = ids[len(header) :]
        end = ids[-1] if ids and ids[-1] in self.tokenizer.stop_ids else None
        ids = ids[:-1] if end is not None else ids
        tagged = bool(ids) and ids[0] == self.tokenizer.python_tag_id
        content = self.tokenizer.decode(ids[tagged:])
        end_of_message = end == self.tokenizer.eom_id
        text, calls = read_tool_calls(content, tools)
        if not calls and tagged:
            return Message("assistant", "", (ToolCall(CODE_INTERPRETER, {"code": content}),), end_of_message)
        return Message("assistant", text, tuple(calls), end_of_message, tagged)


def write_tool_call(call: ToolCall, tool_format: ToolFormat = "json") -> str:
    """The text of a call, as llama-models' ToolUtils writes it."""
    if call.name in QUERY_TOOLS:
        return f'{call.name}.call(query="{call.arguments["query"]}")'
    if call.name == CODE_INTERPRETER:
        return call.arguments["code"]
    if tool_format == "function_tag":
        return f"<function={call.name}>{json.dumps(call.arguments)}</function>"
    if tool_format == "python_list":
        return f"[{call.name}({', '.join(f'{name}={_python_value(value)}' for name, value in call.arguments.items())})]"
    return json.dumps({"type": "function", "name": call.name, "parameters": call.arguments})


def _python_value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_python_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}={_python_value(inner)}' for name, inner in value.items())}}}"
    return str(value)


def with_tools(
    messages: Sequence[Message],
    tools: Sequence[dict] | None = None,
    builtin_tools: Sequence[str] | None = None,
    today: str = "26 Jul 2024",
    tools_in_user_message: bool = True,
) -> list[Message]:
    """The dialog as the Hugging Face template of Llama 3.1 lays it out, for `ChatFormat.encode_dialog`.

    tools: JSON schemas of custom functions. builtin_tools: names of built-in tools that are on; the turn then goes on after a call.
    """
    system, rest = "", list(messages)
    if rest and rest[0].role == "system":
        system = rest.pop(0).content.strip()
    lines = []
    if tools is not None or builtin_tools is not None:
        lines.append("Environment: ipython\n")
    if builtin_tools is not None:
        lines.append(f"Tools: {', '.join(name for name in builtin_tools if name != CODE_INTERPRETER)}\n\n")
    lines.append(f"Cutting Knowledge Date: December 2023\nToday Date: {today}\n\n")
    laid_out = []
    if tools is not None and tools_in_user_message:
        if not rest:
            raise UserError("tools_in_user_message: the dialog has no first user message to hold the tools")
        guidance = "Given the following functions, please respond with a JSON for a function call with its proper arguments"
        guidance += " that best answers the given prompt.\n\n" + _definitions(tools)
        laid_out.append(Message("user", guidance + rest.pop(0).content.strip()))
    elif tools is not None:
        guidance = "You have access to the following functions. To call a function, please respond with JSON for a function call."
        lines.append(guidance + _definitions(tools))
    return [Message("system", "".join(lines) + system), *laid_out, *(_lay_out(message, builtin_tools) for message in rest)]


def _definitions(tools: Sequence[dict]) -> str:
    reply = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    schemas = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    return f"{reply}Do not use variables.\n\n{schemas}"


def _lay_out(message: Message, builtin_tools: Sequence[str] | None) -> Message:
    if message.role in ("tool", "ipython"):
        return replace(message, content=json.dumps(message.content, ensure_ascii=False))
    if not message.tool_calls:
        return replace(message, content=message.content.strip())
    if len(message.tool_calls) > 1:
        raise UserError(f"{len(message.tool_calls)} tool calls in one message: Llama 3.1 makes one at a time")
    call, builtin = message.tool_calls[0], builtin_tools is not None
    if builtin and call.name in builtin_tools:
        arguments = ", ".join(f'{name}="{value}"' for name, value in call.arguments.items())
        return Message("assistant", f"{call.name}.call({arguments})", end_of_message=True, python_tag=True)
    parameters = json.dumps(call.arguments, ensure_ascii=False)
    return Message("assistant", f'{{"name": "{call.name}", "parameters": {parameters}}}', end_of_message=builtin)
