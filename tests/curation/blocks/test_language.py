"""Language identification on the same text in five languages."""

import pytest

from megatron_llama3.curation.blocks.language import LanguageFilter, identify
from tests.curation import planted
from tests.curation.steps import judge


@pytest.mark.parametrize("language", planted.RIGHTS)
def test_a_language_is_kept_by_its_own_filter_and_named_by_the_others(language):
    text = planted.RIGHTS[language]
    reason, doc = judge(LanguageFilter([language]), text)
    assert reason is None
    assert doc.metadata["language"] == language
    assert doc.metadata["language_score"] > 0.65
    other = "en" if language != "en" else "de"
    assert judge(LanguageFilter([other]), text)[0] == f"language_{language}"
    assert judge(LanguageFilter(), text)[0] is None


def test_thresholds_by_language():
    text = planted.RIGHTS["fr"]
    assert judge(LanguageFilter({"fr": 1.01, "en": 0.1}), text)[0] == "language_uncertain"
    assert judge(LanguageFilter({"fr": 0.5, "en": 1.01}), text)[0] is None
    assert judge(LanguageFilter(threshold=1.01), text)[0] == "language_uncertain"


def test_long_texts_are_judged_by_pieces_of_all_their_length():
    text = planted.RIGHTS["en"] * 10 + planted.RIGHTS["de"] * 60
    assert identify(text)[0] == "de"
    assert identify("")[0]
