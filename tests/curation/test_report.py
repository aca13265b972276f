"""The report says every number and escapes every text."""

from html.parser import HTMLParser

from megatron_llama3.curation.observe import Tally
from megatron_llama3.curation.report import report_html, report_text

VOID = {"meta"}


def rows() -> list[Tally]:
    first = Tally("input", 5, 50, 4, 40, reasons={"broken JSON": 1}, samples={"broken JSON": [[1, "a:0", "broken JSON: x", ""]]})
    samples = {"no line left": [[1, "b", "<script>", ""]], "changed": [[2, "c", "x", "y"]]}
    block = Tally("line_dedup", 4, 40, 3, 20, 2, {"no line left": 1}, samples)
    return [first, block]


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not {"src", "href"} & {name for name, value in attributes if not (value or "").startswith("#")}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_stands_alone():
    page = Balanced()
    page.feed(report_html(rows(), "Curation: <web>.yaml"))
    assert page.open == []
    assert "script" not in page.tags
    text = " ".join(page.text)
    for part in ("Curation: <web>.yaml", "<script>", "broken JSON: 1", "no line left: 1", "changed: 2", "5 records in, 3 documents"):
        assert part in text


def test_the_lines_have_the_numbers():
    first, second = report_text(rows()).splitlines()
    assert "4 of" in first
    assert "dropped: broken JSON 1" in first
    assert "( 75.0%)" in second
    assert "changed 2" in second
