"""The report says every number and escapes every text."""

from html.parser import HTMLParser

from megatron_llama3.curation.observe import Tally
from megatron_llama3.curation.report import report_html, report_text

VOID = {"meta"}


def rows() -> list[Tally]:
    first = Tally("input", 5, 50, 4, 40, reasons={"broken JSON": 1}, samples={"broken JSON": [[1, "a:0", "broken JSON: x", ""]]})
    samples = {"<b>low": [[1, "b", "<script>", ""]], "changed": [[2, "c", "<i>x", "<u>y"]], "kept": [[3, "d", "stays </pre>", ""]]}
    first.kinds = {"language": {"en": [3, 30], "<de>": [1, 10]}}
    block = Tally("quality", 4, 40, 3, 20, 2, 12, {"<b>low": 1}, samples, {"language": {"en": [3, 20]}})
    block.score, block.score_width, block.scores = "quality_score", 0.05, {"2": [0, 1], "19": [3, 0]}
    block.threshold = 0.3
    block.notes = ["1 < 2"]
    return [first, block]


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.titles = [], [], set(), set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.titles |= {value for name, value in attributes if name == "title"}
        assert not {"src", "href"} & {name for name, value in attributes if not (value or "").startswith("#")}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_stands_alone():
    page = Balanced()
    page.feed(report_html(rows(), "Curation: <web>.yaml", "a: <b>"))
    assert page.open == []
    assert "script" not in page.tags
    text = " ".join(page.text)
    for part in ("Curation: <web>.yaml", "a: <b>", "5 records in; 3 documents", "60.0% of the documents"):
        assert part in text
    # 50 characters came in: 10 went with a document in the input and 8 in the block, which took 12 out of others; 20 are left.
    assert "40.0% are left, 24.0% were removed inside documents (markup, lines) and 36.0% went with documents" in text
    assert "threshold 0.3" in page.titles
    for part in ("<i>x", "<u>y", "<script>", "stays </pre>", "dropped: <b>low", "broken JSON", "changed", "kept as it was", "1 < 2"):
        assert part in page.text, part
    assert {"0.1 to 0.15: 0 kept, 1 dropped", "0.95 to 1: 3 kept, 0 dropped"} <= page.titles
    assert "75.0%" in page.text, "of the characters after the input are English"
    assert "<de>" in page.text


def test_the_lines_have_the_numbers():
    first, second, note = report_text(rows()).splitlines()
    assert "4 of" in first
    assert "dropped: broken JSON 1" in first
    assert "( 75.0%)" in second
    assert "changed 2" in second
    assert note.strip() == "1 < 2"
