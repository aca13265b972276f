"""HTML to plain text: boilerplate out, mathematics as TeX and code with its lines and indentation kept (paper 3.1.1).

Resiliparse parses and lays out the text. What is boilerplate is decided here: its own rule for the main content loses a twelfth of Debian's
pages and keeps a quarter of what is planted around them (benchmarks/RESULTS.md). Formulas and code leave the tree first, each replaced by a
mark, and come back verbatim; so neither whitespace rules nor the removal of markdown markers (which hurt a model trained mostly on web
text) can touch them.
Collections of nodes are sliced (`[:]`) before a loop: iterating over them is quadratic in resiliparse 2.0.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree
from resiliparse.parse.html.node import ELEMENT, TEXT

from megatron_llama3.curation.blocks.formulas import formulas

_NEVER_CONTENT = {"nav", "footer", "dialog", "menu", "noscript", "template", "button", "select"}
_BOILERPLATE_TAGS = {"aside", "header", "form"}
_BOILERPLATE_ROLES = {"navigation", "banner", "contentinfo", "search", "dialog", "alertdialog", "complementary"}
# Removed for their names, unless they hold much text; and those that go only where they lead away, since content is called so too.
_OUTSIDE = (
    "breadcrumbs?|navbar|navigation|navlinks?|navheader|navfooter|docnav|share|sharing|social|newsletter|subscribe|signup|advert|advertisement|ads|"
    "sponsor(?:ed)?|promo|promotion|popup|modal|pagination|pager|masthead|copyright|footer|sitefooter|disqus|login|editsection|mw-editsection|printfooter|"
    "catlinks|siteSub|contentSub|noprint|headerlink|linenos|lineno|gutter"
)
_BESIDE = "sidebar|sphinxsidebar|related(?![_-]work)|recommended|toc|overlay|skip|widget|toolbar|tagline|slogan|toplang|bottomlang"
_BANNER_NAME, _OUTSIDE_NAME, _BESIDE_NAME, _NOTE_NAME = (
    re.compile(rf"(?:^|[\s_-])(?:{names})(?:$|[\s_-])", re.IGNORECASE)
    for names in ("cookies?|consent|gdpr", _OUTSIDE, _BESIDE, "footnotes?|notes?|admonition|warning|tip|callout")
)
_CONTENT_TAGS = {"main", "article", "h1"}
_BLOCKS = {"ul", "ol", "dl", "table", "div", "p", "section", "center"}
_MOSTLY = 0.5  # an element with more than this share of the page's text is the page, whatever it is called
_MENU_LINKS, _MENU_SHARE = 3, 0.8
_PROSE, _LABEL, _SOME_LINKS = 600, 40, 0.3  # this much text, with fewer links, is content in spite of its element's name
# What a site says of itself, in a line of its own; phrases that prose has too count only in a short one.
_BOILERPLATE_LINE = re.compile(
    r"\b(?:we|(?:this|our|the) (?:web ?)?(?:site|page|service|shop|platform)s?) (?:also )?uses? cookies|accept (?:all )?cookies|"
    r"cookie (?:settings|preferences)|all rights reserved|alle rechte vorbehalten|tous droits réservés|"
    r"diese (?:web)?site (?:benutzt|verwendet) cookies|ce site utilise des cookies|"
    r"subscribe to our|sign up for our|enable javascript|skip to (?:main )?content|"
    r"^(?:this page )?(?:was )?last (?:modified|updated|edited|changed)\b.{0,30}\d|"
    r"^(?:©|\(c\)|copyright)\s*(?:©|\(c\))?\s*(?:19|20)\d\d(?:[\s,–-]|\d{4})*(?:(?-i:[A-Z(])|by\b|$)",
    re.IGNORECASE,
)
_SHORT_BOILERPLATE_LINE = re.compile(
    r"privacy policy|cookie policy|terms of (?:use|service)|share (?:this|on)\b|click here to", re.IGNORECASE
)
_LONGEST_BOILERPLATE_LINE, _SHORT = 250, 80
# A mark is a number between two private characters that no page uses for text.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_EMPTY_LINES = re.compile(r"\n\s*\n\s*\n+")
_DEEPEST = 400  # Python's stack ends at 1,000 calls
_LINES_OF_CODE = "div, li, tr, p, .line"


class ExtractHtml(BaseFilter):
    """The main content of each document's HTML becomes its text. Dropped: `no_content` and `unreadable_html`.

    min_characters: a page whose content is shorter than this has none.
    """

    name = "HTML to text"

    def __init__(self, min_characters: int = 1, exclusion_writer: DiskWriter | None = None):
        super().__init__(exclusion_writer)
        self.min_characters = min_characters

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        try:
            text = html_to_text(doc.text)
        except BaseException as error:
            # resiliparse is Rust: what goes wrong inside it arrives as a PanicException, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return False, "unreadable_html"
        if len(text) < max(1, self.min_characters):
            return False, "no_content"
        self.stat_update("characters_of_html", value=len(doc.text), unit="doc")
        doc.text = text
        return True


def html_to_text(html: str) -> str:
    """Plain text of a page's main content; empty where it has none."""
    tree = HTMLTree.parse(html.replace(_OPEN, "").replace(_CLOSE, ""))
    if tree is None or tree.body is None:
        return ""
    kept: list[str] = []

    def mark(content: str) -> str:
        kept.append(content)
        return f"{_OPEN}{len(kept) - 1}{_CLOSE}"

    for element, tex in formulas(tree):
        element.replace_with(tree.create_text_node(f" {mark(tex)} " if tex else " "))
    _take_out_code(tree, mark)
    _rows_on_lines(tree)
    whole = sum(_length(text) for text in [tree.body.text, *kept])
    _prune(tree.body, _MOSTLY * whole, kept)
    options = {"alt_texts": True, "list_bullets": False, "links": False, "form_fields": False, "noscript": False, "comments": False}
    text = extract_plain_text(tree, preserve_formatting=True, **options)
    return _put_back(_clean_lines(text), kept).strip("\n")


def _take_out_code(tree: HTMLTree, mark: Callable[[str], str]) -> None:
    """`pre` with its lines, and short code inside a line. Marks of formulas inside stay and are put back later."""
    body = tree.body
    for pre in body.query_selector_all("pre")[:]:
        for gutter in pre.query_selector_all(".linenos, .lineno, .gutter, .line-numbers-rows, .copy-button, button")[:]:
            gutter.remove()
        for line_break in pre.query_selector_all("br")[:]:
            line_break.replace_with(tree.create_text_node("\n"))
        for line in pre.query_selector_all(_LINES_OF_CODE)[:]:
            if line.tag != "span" and not (line.text or "").endswith("\n"):
                line.append(tree.create_text_node("\n"))
        code = "\n".join(line.rstrip() for line in (pre.text or "").strip("\n").split("\n"))
        pre.text = mark(code) if code.strip() else ""
    for code in body.query_selector_all("code, kbd, samp, tt, var")[:]:
        if not code.closest("pre") and (code.text or "").strip() and not _MARK.search(code.text):
            code.text = mark(" ".join(code.text.split()))


def _rows_on_lines(tree: HTMLTree) -> None:
    """A table's cell that is one paragraph becomes its text, so that a row stays a line."""
    for paragraph in tree.body.query_selector_all("td > p:only-child, th > p:only-child")[:]:
        for child in paragraph.child_nodes[:]:
            paragraph.parent.insert_before(child, paragraph)
        paragraph.remove()


@dataclass
class _Size:
    """What an element holds: characters of text and of link text (spaces aside), links, and whether a mark of the main content is in it."""

    text: int = 0
    link_text: int = 0
    links: int = 0
    is_content: bool = False

    def add(self, other: "_Size") -> None:
        self.text += other.text
        self.link_text += other.link_text
        self.links += other.links
        self.is_content |= other.is_content


def _length(text: str) -> int:
    """Characters, spaces aside."""
    return len("".join(text.split()))


def _prune(element, most: float, kept: list[str], in_link: bool = False, depth: int = 0) -> _Size:
    """Removes the boilerplate below `element`, children first, in one pass; returns what is left. most: so much text is the page itself."""
    if depth > _DEEPEST:
        raise ValueError(f"elements nested more than {_DEEPEST} deep")
    size = _Size(is_content=element.tag in _CONTENT_TAGS)
    # Without href it is a place to link to; written <a id="x"/>, it takes in all that follows.
    is_link = element.tag == "a" and bool(element.getattr("href"))
    in_link = in_link or is_link
    for child in element.child_nodes[:]:
        if child.type != ELEMENT:
            size.text += _length(_put_back(child.value or "", kept)) if child.type == TEXT else 0
            continue
        below = _prune(child, most, kept, in_link, depth + 1)
        if _is_boilerplate(child, below, most, in_link):
            child.remove()
        else:
            size.add(below)
    if is_link:
        size.links, size.link_text = 1, size.text
    return size


def _is_boilerplate(element, size: _Size, most: float, in_link: bool) -> bool:
    if element.tag == "img":
        return in_link  # logos and icons that lead somewhere
    if element.tag in _NEVER_CONTENT:
        return True
    if size.is_content or element.tag == "body":
        return False
    # Menus and tables of contents: nearly all of the text is links.
    if element.tag in _BLOCKS and size.links >= _MENU_LINKS and size.link_text >= _MENU_SHARE * size.text:
        return True
    if size.text > most:
        return False
    is_note = element.tag == "aside" and _NOTE_NAME.search(element.class_name or "")
    is_boilerplate = (element.tag in _BOILERPLATE_TAGS and not is_note) or (element.getattr("role") or "") in _BOILERPLATE_ROLES
    return is_boilerplate or _is_named_boilerplate(element, size)


def _is_named_boilerplate(element, size: _Size) -> bool:
    classes = element.class_name or ""
    # A section's id is made of its heading: `shared-memory` is no share button.
    names = classes if element.tag == "section" or "section" in classes.split() else f"{classes} {element.id or ''}"
    leads_away = size.link_text > _SOME_LINKS * size.text
    if _BANNER_NAME.search(names) or (_BESIDE_NAME.search(names) and (leads_away or size.text < _LABEL)):
        return True
    return bool(_OUTSIDE_NAME.search(names)) and (leads_away or size.text < _PROSE)


def _clean_lines(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        if len(line) <= _LONGEST_BOILERPLATE_LINE and _BOILERPLATE_LINE.search(line):
            continue
        if len(line) <= _SHORT and _SHORT_BOILERPLATE_LINE.search(line):
            continue
        lines.append(without_markdown(line).rstrip())
    return _EMPTY_LINES.sub("\n\n", "\n".join(lines))


_EMPHASIS = re.compile(r"(?<![\w*_])(\*\*\*|\*\*|\*|___|__|_)(?=\S)([^*_\n]+?)(?<=\S)\1(?![\w*_])")
_LINK = re.compile(r"!?\[([^\]\n]*)\]\((?:[^()\s]|\([^()]*\))*(?:\s+\"[^\"]*\")?\)")
_LINE_MARKER = re.compile(r"^\s{0,3}(?:#{1,6}\s+|(?:>\s?)+|[*+-]\s+(?=\S)|```\w*\s*$|~~~\w*\s*$|(?:[-*_]\s*){3,}$)")
_TRAILING_HASHES = re.compile(r"\s+#+\s*$")


def without_markdown(line: str) -> str:
    """A line without markdown's headings, emphasis, links, bullets, quotes, fences, rules and backticks; their content stays."""
    if not any(c in line for c in "#*_`>[-+~"):
        return line
    heading = line.lstrip().startswith("#")
    line = _LINE_MARKER.sub("", line)
    if heading:
        line = _TRAILING_HASHES.sub("", line)
    line = _LINK.sub(r"\1", line)
    for _ in range(2):  # bold inside italic
        line = _EMPHASIS.sub(lambda match: match[0] if match[1] == "__" and match[2].isidentifier() else match[2], line)
    return re.sub(r"(?<!`)(`{1,2})(?!`)([^`\n]+)\1(?!`)", r"\2", line)


def _put_back(text: str, kept: list[str]) -> str:
    """Marks become what they stand for; a mark inside a block of code is put back with it."""
    while _MARK.search(text):
        text = _MARK.sub(lambda match: kept[int(match[1])], text)
    return text
