"""What examples/curate_web.yaml needs beside the pages: judged texts, labelled texts, and a quiz to keep out of training.

Each stands in for what a real run has: the judgements for those of a language model, the labels for a person's, the quiz for an evaluation
set. Good are passages of the pages, bad are the same with their words shuffled, or a few words over and over; general is the handbook, code
are the kernel documentation's listings and the pages that mostly consist of them; the quiz is 20 sentences of the pages themselves, which
decontamination must find.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from megatron_llama3.config.errors import UserError, exit_on_user_error

LANGUAGES = ("en-US", "de-DE", "fr-FR", "es-ES", "it-IT", "ja-JP", "zh-CN")
PASSAGE = 1500  # characters
SENTENCE = re.compile(r"(?<=[.?!]) (?=[A-Z])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="has usr/share/doc, as unpacked by dpkg -x; the files are written here")
    parser.add_argument("--pages", type=int, default=100, help="pages of the kernel's documentation, and of each language's handbook")
    flags = parser.parse_args()
    rng = Random(0)
    handbooks = flags.folder / "usr/share/doc/debian-handbook/html"
    handbook = {language: chosen(handbooks / language, flags.pages, rng) for language in LANGUAGES}
    kernel = chosen(flags.folder / "usr/share/doc/linux-doc-6.1/html", flags.pages, rng)
    good = [passage for pages in [*handbook.values(), kernel] for passage in passages(pages)]
    general, code = list(passages(handbook["en-US"])), [*listings(kernel), *passages(page for page in kernel if is_code(page))]
    judged = [{"text": text, "score": 4} for text in good] + [{"text": spoilt(text, rng), "score": 1} for text in good]
    write(flags.folder / "judged.jsonl", judged)
    labelled = [{"text": text, "label": label} for label, texts in (("general", general), ("code", code)) for text in texts]
    write(flags.folder / "labelled.jsonl", labelled)
    write(flags.folder / "quiz.jsonl", [{"question": question} for question in questions([*kernel, *handbook["en-US"]])[:20]])


def chosen(folder: Path, count: int, rng: Random) -> list[str]:
    """HTML of so many pages below a folder, or all if there are fewer."""
    paths = sorted(path for path in folder.rglob("*.html") if "translations" not in path.parts)
    if not paths:
        raise UserError(f"{folder}: has no .html files; examples/curate_web.sh gets them")
    return [path.read_text(encoding="utf-8") for path in rng.sample(paths, min(count, len(paths)))]


def passages(pages: Iterable[str]) -> Iterator[str]:
    """Pieces of the pages' text, long enough to be judged."""
    from megatron_llama3.curation.blocks.extract import html_to_text

    for text in map(html_to_text, pages):
        yield from (text[i : i + PASSAGE] for i in range(0, min(len(text), 4 * PASSAGE), PASSAGE) if len(text) - i > PASSAGE // 5)


def listings(pages: list[str]) -> Iterator[str]:
    from resiliparse.parse.html import HTMLTree

    for page in pages:
        blocks = [block.text for block in HTMLTree.parse(page).body.query_selector_all("pre")[:]]
        yield from (text[:PASSAGE] for text in blocks if len(text) > PASSAGE // 5)


def is_code(page: str) -> bool:
    """Whether at least a third of its text is in listings."""
    from megatron_llama3.curation.blocks.extract import html_to_text

    return 3 * sum(map(len, listings([page]))) > len(html_to_text(page))


def spoilt(text: str, rng: Random) -> str:
    from megatron_llama3.curation.text.words import split_words

    words = split_words(text)
    if rng.random() < 0.3:
        return " ".join(words[:9] * (len(words) // 9))
    return " ".join(rng.sample(words, len(words)))


def questions(pages: list[str]) -> list[str]:
    """A sentence of 12 to 40 words from each page that has one."""
    from megatron_llama3.curation.blocks.extract import html_to_text

    found = []
    for text in map(html_to_text, pages):
        sentences = [s for line in text.split("\n") for s in SENTENCE.split(line) if 12 <= len(s.split()) <= 40 and s.endswith(".")]
        found += sentences[len(sentences) // 2 :][:1]
    return found


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"wrote {path}: {len(records)} lines")


if __name__ == "__main__":
    exit_on_user_error(main)
