"""Decontamination: planted examples go, also retouched and in long documents; shared phrases and parts of examples stay."""

import json
from random import Random

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.decontaminate import DecontaminationFilter
from tests.curation import planted
from tests.curation.steps import judge

QUESTIONS = [
    "A baker makes 24 loaves each morning and sells two thirds of them before noon. How many loaves are left for the afternoon customers?",
    "Lena cycles 12 kilometres to work and back five days a week. How far does she cycle in four weeks if she stays at home three days?",
    "一个农夫有十二只羊和八头牛他卖掉了其中的一半还剩下多少只动物请写出计算过程",
]
SHORT = "What is 2 + 2?"


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "questions.jsonl"
    records = [{"question": question, "answer": "8", "number": i} for i, question in enumerate([*QUESTIONS, SHORT])]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("line, question", list(enumerate(QUESTIONS, start=1)))
def test_a_planted_question_drops_a_long_document(evaluation, line, question):
    rng = Random(line)
    step = DecontaminationFilter({"quiz": evaluation})
    text = planted.prose(rng, 200)
    assert judge(step, text)[0] is None
    reason, doc = judge(step, planted.inserted(text, question, rng))
    assert reason == "contaminated_quiz"
    assert doc.metadata["contaminated_by"] == {"set": "quiz", "line": line, "share": 1.0, "examples": 1}


def test_case_punctuation_and_a_changed_word_do_not_hide_it(evaluation):
    question = QUESTIONS[0].upper().replace(",", "").replace("CUSTOMERS", "guests").replace(" ", "\n")
    reason, doc = judge(DecontaminationFilter({"quiz": evaluation}), f"Solve: {question} Thanks.")
    assert reason == "contaminated_quiz"
    assert 0.9 < doc.metadata["contaminated_by"]["share"] < 1.0


def test_a_shared_phrase_stays_below_the_share_and_short_texts_are_not_looked_for(evaluation):
    step = DecontaminationFilter({"quiz": evaluation})
    phrase = "A baker makes 24 loaves each morning and sells bread."
    assert judge(step, phrase)[0] is None
    assert judge(DecontaminationFilter({"quiz": evaluation}, min_share=0.3), phrase)[0] == "contaminated_quiz"
    assert judge(step, SHORT)[0] is None
    assert step.index.too_short == 5  # four answers and the short question


def test_keys_and_shares_by_set(evaluation):
    assert DecontaminationFilter({"quiz": evaluation}, keys=["question"]).index.too_short == 1
    with pytest.raises(UserError, match="nothing can be found"):
        DecontaminationFilter({"quiz": evaluation}, keys=["answer"])
    by_set = DecontaminationFilter({"quiz": evaluation, "again": evaluation}, min_share={"quiz": 1.1, "again": 0.5})
    assert judge(by_set, QUESTIONS[1])[0] == "contaminated_again"
    with pytest.raises(UserError, match="no value for again"):
        DecontaminationFilter({"quiz": evaluation, "again": evaluation}, min_share={"quiz": 0.5})


@pytest.mark.parametrize(
    "content, message", [("{broken", "line 1: no JSON object"), ("[1]", "line 1: no JSON object"), (None, "cannot be read")]
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=f"bad.jsonl.*{message}"):
        DecontaminationFilter({"quiz": str(path)})
