"""Real text for benchmarks/curation.py out of Debian's documentation packages: manual pages and HTML, as unpacked by dpkg -x."""

import gzip
import re
from pathlib import Path
from random import Random

MANUAL_FOLDERS = {"en": "man", "de": "man/de", "fr": "man/fr", "ja": "man/ja", "zh": "man/zh_CN"}
HANDBOOK_FOLDERS = {"en": "en-US", "de": "de-DE", "fr": "fr-FR", "ja": "ja-JP", "zh": "zh-CN"}
_SPECIAL = {
    "(co": "©",
    "(bu": "•",
    "(em": "—",
    "(en": "–",
    "(aq": "'",
    "(dq": '"',
    "(lq": "“",
    "(rq": "”",
    "e": "\\",
    "-": "-",
    "(ga": "`",
    "(ha": "^",
    "(ti": "~",
}
_ESCAPE = re.compile(r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s[+-]?\d+|[&%|^c)/,:]|(\(..|e|-)|\*(?:\(..|\[[^\]]*\]|.)|\[[^\]]*\]|[ ~0])")
_PARAGRAPH = re.compile(r"^\.(?:PP|P|LP|TP|IP|HP|RS|RE|Pp|br|sp|It|Bl|El|Bd|Ed)\b.*$")
_HEADING = re.compile(r"^\.(?:SH|SS|Sh|Ss)\s+(.*)$")


def manual_pages(folder: Path, language: str, count: int, seed: int = 0) -> list[str]:
    """Texts of that many pages with at least 1,000 characters (300 in Japanese and Chinese), always the same ones."""
    files = sorted((folder / "usr/share" / MANUAL_FOLDERS[language]).glob("man[1-8]/*.gz"))
    if not files:
        raise SystemExit(f"{folder}: has no manual pages in {language}; unpack Debian's packages there (see --help)")
    Random(seed).shuffle(files)
    texts = []
    for path in files:
        text = plain_manual(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
        if len(text) >= (300 if language in ("ja", "zh") else 1000):
            texts.append(text)
        if len(texts) == count:
            break
    return texts


def plain_manual(source: str) -> str:
    """A manual page's text: requests out, escapes resolved, filled paragraphs on one line."""
    paragraphs, words, verbatim = [], [], False
    for line in source.split("\n"):
        verbatim = line.startswith((".nf", ".EX")) or (verbatim and not line.startswith((".fi", ".EE")))
        heading = _HEADING.match(line)
        if heading or _PARAGRAPH.match(line) or not line.strip():
            paragraphs, words = [*paragraphs, " ".join(words)], [heading[1].strip('"')] if heading else []
        elif line.startswith((".", "'")):
            if re.match(r"^\.(?:[BIR]{1,2}|SM|SB|Nm|Ar|Fl|Xr|Pa|Cm|Dv|Va)\s", line):
                words.append(re.sub(r'(?<!\\)"| (?=[.,;:)])', "", line.partition(" ")[2]))
            continue
        else:
            words.append(line)
        if heading or verbatim:
            paragraphs, words = [*paragraphs, " ".join(words)], []
    lines = [
        _ESCAPE.sub(lambda match: _SPECIAL.get(match[1] or "", " " if match[0] in ("\\ ", "\\~", "\\0") else ""), p)
        for p in [*paragraphs, " ".join(words)]
    ]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def html_pages(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Pages of the kernel's documentation and of the handbook, in the proportion 3 to 1."""
    documents = folder / "usr/share/doc"
    kernel, handbook = (
        sorted((documents / "linux-doc-6.1/html").rglob("*.html")),
        sorted((documents / "debian-handbook/html/en-US").glob("s*.html")),
    )
    rng = Random(seed)
    chosen = [*rng.sample(kernel, min(len(kernel), count * 3 // 4)), *rng.sample(handbook, min(len(handbook), count // 4))]
    return [path.read_text(encoding="utf-8", errors="replace") for path in chosen]


def pages_with(folder: Path, pattern: str, count: int) -> list[str]:
    """Pages of the kernel's documentation whose HTML has the pattern."""
    pages = []
    for path in sorted((folder / "usr/share/doc/linux-doc-6.1/html").rglob("*.html")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) < 300_000 and re.search(pattern, text):
            pages.append(text)
        if len(pages) == count:
            break
    return pages
