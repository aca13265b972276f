"""Real text for benchmarks/curation.py out of Debian's documentation packages: manual pages and HTML, as unpacked by dpkg -x."""

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

MANUAL_FOLDERS = {
    "en": "man",
    "de": "man/de",
    "fr": "man/fr",
    "ja": "man/ja",
    "zh": "man/zh_CN",
    "es": "man/es",
    "it": "man/it",
    "pl": "man/pl",
    "ru": "man/ru",
    "nl": "man/nl",
    "cs": "man/cs",
    "da": "man/da",
    "uk": "man/uk",
    "pt": "man/pt_BR",
    "sv": "man/sv",
    "tr": "man/tr",
    "hu": "man/hu",
    "fi": "man/fi",
}


@dataclass(frozen=True)
class Site:
    """HTML pages of one make: where in usr/share, what of them is content (CSS selectors), and what else stands on each page."""

    pages: str
    content: str
    boilerplate: tuple[str, ...]
    weight: int = 1


_DOCBOOK = "body > div.sect1, body > div.sect2, body > div.section, body > div.chapter, body > div.refentry"
SITES = (
    Site("doc/linux-doc-6.1/html/**/*.html", "div[itemprop=articleBody]", ("View page source", "Built with", "development community"), 3),
    Site("doc/debian-handbook/html/en-US/s*.html", _DOCBOOK, ("Documentation Site", "Product Site")),
    Site("doc/python3.11/html/**/*.html", "div.body", ("Report a Bug", "Show Source", "Quick search", "Created using")),
    Site("doc/postgresql-doc-15/html/*.html", _DOCBOOK, ("Prev</a>",)),
    Site("doc/apache2-doc/manual/en/**/*.html", "#page-content", ("Report a bug", "Apache License, Version", "Available Languages")),
    Site("doc/git-doc/*.html", "#content", ("Last updated",)),
    Site("doc/sqlite3/*.html", "", ("Small. Fast. Reliable", "Search Documentation", "Choose any three", "This page last modified")),
    Site("gimp/2.0/help/en/*.html", _DOCBOOK, ("Report a bug in GIMP", "Report a documentation error")),
    Site("doc/nodejs/api/*.html", "#apicontent", ("Code repository and issue tracker", "Usage and example", "View on GitHub")),
    Site("doc/erlang-doc/lib/*/doc/html/*.html", "#content", ("Expand All", "Contract All")),
    Site("doc/libboost1.74-doc/doc/html/**/*.html", _DOCBOOK, ("Distributed under the Boost Software License", "People</a>")),
    Site("doc/exim4-doc-html/spec_html/*.html", "#chapter", ("Website design by", "Mailing Lists")),
    Site("doc/bind9-doc/arm/*.html", "div.document", ("View page source", "Internet Systems Consortium")),
    Site("cppreference/doc/html/en/**/*.html", "#mw-content-text", ("From cppreference.com",)),
    Site("debian-reference/ch*.en.html", _DOCBOOK, ("Prev</a>",)),
    Site("doc/installation-guide-amd64/en/ch*.html", _DOCBOOK, ("Prev</a>",)),
)
NOT_CONTENT = (
    "script, style, .headerlink, .mark, .toc, .toctree-wrapper, .contents, .navfooter, "
    "#quickview, .toplang, .bottomlang, .lang-toggle, .top, .t-navbar, .editsection"
)
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
        if path.is_symlink():  # the same page under another name
            continue
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
        elif line.startswith((".", "'", "\\{")):
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


def languages_in(folder: Path) -> list[str]:
    """Those of which there are enough manual pages."""
    return [name for name, man in MANUAL_FOLDERS.items() if len(list((folder / "usr/share" / man).glob("man[1-8]/*.gz"))) >= 20]


def html_pages(folder: Path, count: int, seed: int = 0) -> list[tuple[Site, str]]:
    """About that many pages of the sites that are there, by their weights."""
    found = {site: sorted((folder / "usr/share").glob(site.pages)) for site in SITES}
    total, rng = sum(site.weight for site, paths in found.items() if paths), Random(seed)
    chosen = [(site, path) for site, paths in found.items() for path in rng.sample(paths, min(len(paths), count * site.weight // total))]
    return [(site, path.read_text(encoding="utf-8", errors="replace")) for site, path in chosen]


def pages_with(folder: Path, pattern: str, count: int) -> list[str]:
    """Pages whose HTML has the pattern, as many of each site."""
    pages = []
    present = [paths for site in SITES if site.content and (paths := sorted((folder / "usr/share").glob(site.pages)))]
    for paths in present:
        of_site = []
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) < 300_000 and re.search(pattern, text):
                of_site.append(text)
            if len(of_site) == count // len(present):
                break
        pages += of_site
    return pages
