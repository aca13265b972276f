"""Heuristic filters: repetition, dirty words, and datatrove's filters with this project's words."""

from random import Random

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.filters import (
    NGRAM_LIMITS,
    C4Quality,
    DirtyWordFilter,
    DuplicateNgramFilter,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    covered_words,
    duplicate_coverage,
)
from megatron_llama3.curation.text.words import RegexWordTokenizer, split_words, word_hashes
from tests.curation import planted
from tests.curation.steps import judge

PROSE = planted.prose(Random(0), 40)


def test_words_of_every_script():
    assert split_words("Don’t stop: 3 Größen, naïve!") == ["don’t", "stop", "3", "größen", "naïve"]
    assert split_words("自由と平等 free") == ["自", "由", "と", "平", "等", "free"]
    assert RegexWordTokenizer().word_tokenize("A #tag, b # (c)") == ["A", "tag", "b", "#", "c"]
    assert RegexWordTokenizer().sent_tokenize("One. Two! 三。四") == ["One.", "Two!", "三。", "四"]
    assert RegexWordTokenizer().span_tokenize("One. Two!") == [(0, 4), (5, 9)]


def test_coverage_counts_repetitions_once():
    """b c is repeated: of 8 words of one letter the second b c and nothing else."""
    words = list("abcdbcef")
    assert duplicate_coverage(words, [2, 3]) == {2: 2 / 8, 3: 0.0}
    assert duplicate_coverage(list("aaaaaa"), [2]) == {2: 5 / 6}
    assert covered_words(word_hashes(words), 2, 2).tolist() == [c in "bc" for c in words]
    assert covered_words(word_hashes(["a"]), 2, 2).tolist() == [False]


def test_repetitive_documents_go_and_prose_stays():
    step = DuplicateNgramFilter()
    assert judge(step, planted.repeated(Random(1)))[0] == "repeated_lines"
    assert judge(DuplicateNgramFilter(min_line_words=10_000), planted.repeated(Random(1)))[0] == "duplicate_ngrams"
    assert judge(step, planted.log(Random(1)))[0] == "repeated_lines"
    for text in [PROSE, "", "Short.", *planted.RIGHTS.values()]:
        reason, doc = judge(step, text)
        assert (reason, doc.text) == (None, text)


def test_words_of_several_characters_are_no_repetition_but_sentences_are():
    """ネットワーク is six words to a counter of characters; it may come back as often as network does."""
    nouns = ["ネットワーク", "インターフェース", "サーバ", "パケット", "ゲートウェイ", "ルータ", "アドレス", "ファイアウォール"]
    rng = Random(0)
    text = "。".join(rng.choice(nouns) + "".join(chr(0x4E00 + rng.randint(0, 9000)) for _ in range(4)) for _ in range(60))
    assert duplicate_coverage(split_words(text), [5])[5] > dict(NGRAM_LIMITS)[5]
    assert judge(DuplicateNgramFilter(), text)[0] is None
    assert judge(DuplicateNgramFilter(), text[:200] * 3)[0] == "duplicate_ngrams"


def test_lines_of_a_log_go_from_a_document_that_is_mostly_prose():
    lines = PROSE.split("\n")
    mixed = "\n".join([*lines[:10], planted.log(Random(2), 8), *lines[10:]])
    reason, doc = judge(DuplicateNgramFilter(), mixed)
    assert reason is None
    assert doc.text == PROSE


def test_dirty_words_are_counted_and_few_are_let_pass(tmp_path):
    (tmp_path / "words.txt").write_text("# made up\nsnorfle\nblargish deals\n粗口\n", encoding="utf-8")
    step = DirtyWordFilter(str(tmp_path / "words.txt"), max_words=2, max_share=0.01)
    assert judge(step, "Snorfle! blargish DEALS, snorfle and more")[0] == "dirty_words"
    assert judge(step, "这是粗口和粗口还有粗口")[0] == "dirty_words"
    reason, doc = judge(step, "Snorfle twice: snorfle. But snorfles, deals, blargish are others.")
    assert (reason, doc.metadata["dirty_words"]) == (None, 2)
    assert judge(step, PROSE + PROSE + " snorfle" * 3)[0] is None, "three in a thousand words are below the share"
    assert judge(step, PROSE)[0] is None


@pytest.mark.parametrize("content", [None, "", "# only a comment\n"])
def test_a_word_list_must_be_given(tmp_path, content):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"words.txt: (cannot be read|holds no entries)"):
        DirtyWordFilter(str(path))


def test_datatroves_filters_run_on_these_words():
    assert judge(GopherQuality(), planted.symbols(Random(0)))[0].startswith("gopher_")
    assert judge(GopherQuality(), PROSE[:100])[0] == "gopher_short_doc"
    assert judge(GopherQuality(), "")[0] == "gopher_short_doc"
    assert judge(GopherRepetition(), planted.repeated(Random(0)))[0].startswith(("top_", "dup"))
    assert judge(FineWebQuality(), planted.symbols(Random(0)))[0] == "line_punct_ratio"
    assert judge(FineWebQuality(), " \n ")[0] == "empty"
    assert judge(C4Quality(), "Lorem ipsum dolor sit amet and more of it.")[0] == "lorem_ipsum"
    lines = "\n".join(paragraph.replace("\n", " ") for paragraph in PROSE.split("\n\n"))
    for step in (GopherQuality(), C4Quality(), FineWebQuality()):
        assert judge(step, lines)[0] is None
    assert judge(GopherRepetition(top_n_grams=[]), lines)[0] is None
