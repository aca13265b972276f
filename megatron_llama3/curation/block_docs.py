"""The blocks as Markdown, from their docstrings and signatures: what docs/curation.md holds between its two marks.

python -m megatron_llama3.curation.block_docs --write docs/curation.md
"""

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import yaml

from megatron_llama3.curation.pipeline import BLOCKS, block_class_of, block_parameters
from megatron_llama3.curation.storage.files import whole_file

BEGIN, END = "<!-- blocks: python -m megatron_llama3.curation.block_docs -->", "<!-- end of blocks -->"
_WIDTH = 140
_WRAP = {"break_long_words": False, "break_on_hyphens": False}


def block_reference() -> str:
    """A heading, the keys with their defaults, and the docstring of every block, by name."""
    parts = []
    for name in BLOCKS:
        block_class = block_class_of(name)
        parameters = block_parameters(block_class)
        keys = ", ".join(f"{p.name}: {'NEEDED' if p.default is p.empty else _as_yaml(p.default)}" for p in parameters.values())
        text = "\n\n".join(_filled(paragraph, parameters) for paragraph in inspect.getdoc(block_class).split("\n\n"))
        parts.append(f"### `{name}`\n\n`{{{keys}}}`\n\n{text}")
    return "\n\n".join(parts)


def _as_yaml(value: object) -> str:
    value = [list(part) if isinstance(part, tuple) else part for part in value] if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n").removesuffix("\n...")


def _filled(paragraph: str, names: Iterable[str]) -> str:
    """One paragraph, or a list if it explains arguments: `name: what it is.`, or `name, name: ...`."""
    text = " ".join(paragraph.split())
    name = "|".join(map(re.escape, names))
    entries = re.split(rf"(?:^|(?<=\.) )(?=(?:{name})(?:, (?:{name}))*: )", text)
    items = [re.sub(r"^([\w, ]+):", lambda match: f"- `{match[1].replace(', ', '`, `')}`:", entry) for entry in entries[1:]]
    parts = filter(None, [entries[0], *items])
    return "\n".join(textwrap.fill(part, _WIDTH, subsequent_indent="  " * part.startswith("- "), **_WRAP) for part in parts)


def with_reference(document: str) -> str:
    """The document with the reference between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{block_reference()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--write", metavar="DOCUMENT.md", help="puts it there between the marks; without it, it is printed")
    flags = parser.parse_args()
    if not flags.write:
        print(block_reference())
        return
    text = with_reference(Path(flags.write).read_text(encoding="utf-8"))
    with whole_file(flags.write) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
