"""The mix: plans by hand, sampling that meets the target and depends on nothing but ids and seed, labels, weights for --data-path."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.domains import DomainLabel
from megatron_llama3.curation.blocks.mixture import PAPER_MIX, Mixture, copies, met_epochs, plan_mixture
from megatron_llama3.curation.classifiers.linear import LinearClassifier
from megatron_llama3.curation.observe import Observed
from tests.curation import planted
from tests.curation.steps import both_passes, document
from tests.tokenizer.vocabularies import small_vocabulary

TOOL = Path(__file__).parents[3] / "tools" / "plan_mixture.py"
HAVE = {"general": 80_000, "reasoning": 4_000, "code": 9_000, "multilingual": 20_000}


def test_the_scarcest_domain_sets_the_length():
    """4,000 tokens of reasoning, four times, are a quarter of 64,000."""
    plans, shortages = plan_mixture(HAVE, PAPER_MIX)
    assert shortages == []
    assert {name: plan.given for name, plan in plans.items()} == {
        "general": 32_000,
        "reasoning": 16_000,
        "code": 10_880,
        "multilingual": 5_120,
    }
    assert (plans["general"].epochs, plans["reasoning"].epochs, plans["code"].epochs) == (0.4, 4.0, pytest.approx(1.2089, abs=1e-4))


def test_a_longer_mix_falls_short_and_says_so():
    plans, shortages = plan_mixture(HAVE, PAPER_MIX, total=100_000, max_epochs=2)
    assert shortages == ["reasoning: 4,000 tokens at 2 epochs give 8,000 of the 25,000 wanted"]
    assert (plans["reasoning"].epochs, plans["code"].epochs) == (2, pytest.approx(17 / 9))


@pytest.mark.parametrize(
    "have, target, message",
    [
        ({"a": 5, "b": 5}, {"a": 1}, "no share for domain 'b'"),
        ({"a": 5}, {"a": 1, "b": 1}, "asks for b, of which there is no document"),
        ({"a": 5}, {"a": 0}, "share of 0 or more"),
        ({"a": 5}, {"a": 2, "b": -1}, "share of 0 or more"),
        ({"a": 5}, {}, "share of 0 or more"),
    ],
)
def test_plans_that_cannot_be(have, target, message):
    with pytest.raises(UserError, match=message):
        plan_mixture(have, target)


def test_how_often_a_document_is_taken():
    counts = [copies(f"id {i}", 2.3, seed=1) for i in range(20_000)]
    assert set(counts) == {2, 3}
    assert abs(sum(counts) / 20_000 - 2.3) < 0.015
    assert {i for i in range(2000) if copies(f"id {i}", 0.2, 1)} < {i for i in range(2000) if copies(f"id {i}", 0.4, 1)}, (
        "more keeps what fewer kept"
    )
    assert [copies(f"id {i}", 0.5, 1) for i in range(99)] != [copies(f"id {i}", 0.5, 2) for i in range(99)]
    assert (copies("x", 0.0, 0), copies("x", 3.0, 0)) == (0, 3)


def test_tokens_are_met_and_not_documents():
    """A domain's tokens lie in a few long documents: what is nearest to 1.4 times 100 tokens is all once and the first two parts."""
    assert met_epochs([0, 45, 0, 55], 1.4) == (1.5, 145)
    assert met_epochs([0, 45, 0, 55], 0.2) == (0.0, 0)
    assert met_epochs([10] * 4, 2.0) == (2.0, 80)
    assert met_epochs([10] * 4, 0.99) == (1.0, 40)
    assert met_epochs([0], 0.0) == (0.0, 0)


def corpus() -> list:
    rng = Random(0)
    counts = {"general": 900, "reasoning": 60, "code": 150, "multilingual": 200, "spam": 20}
    return [
        document(planted.prose(rng, rng.randint(2, 8)), f"{name} {i}", domain=name) for name, count in counts.items() for i in range(count)
    ]


def size(doc) -> int:
    return -(-len(doc.text.encode()) // 4)


def test_the_mix_meets_the_target(tmp_path):
    kept, reasons = both_passes(Mixture({**PAPER_MIX, "spam": 0}, max_epochs=3), corpus(), str(tmp_path))
    tokens: Counter = Counter()
    for doc in kept:
        tokens[doc.metadata["domain"]] += size(doc)
    for name, share in PAPER_MIX.items():
        assert tokens[name] / tokens.total() == pytest.approx(share, rel=0.01), name
    assert tokens["spam"] == 0
    assert {reason: {i.split()[0] for i, r in reasons.items() if r == reason} for reason in set(reasons.values())} == {
        "no_share": {"spam"},
        "over_represented": {"general", "code", "multilingual"},
    }
    assert Counter(doc.id.split("#")[0] for doc in kept if doc.id.startswith("reasoning")) == {f"reasoning {i}": 3 for i in range(60)}
    assert len({doc.id for doc in kept}) == len(kept)
    assert [doc.id for doc in kept if doc.id.startswith("reasoning 7#")] == ["reasoning 7#2", "reasoning 7#3"]


def test_order_and_tasks_do_not_change_the_choice(tmp_path):
    target = {**PAPER_MIX, "spam": 0}
    whole = both_passes(Mixture(target, seed=5), corpus(), str(tmp_path / "1"), tasks=1)[0]
    parts = both_passes(Mixture(target, seed=5), corpus()[::-1], str(tmp_path / "3"), tasks=3)[0]
    other = both_passes(Mixture(target, seed=6), corpus(), str(tmp_path / "6"), tasks=1)[0]
    assert sorted(doc.id for doc in whole) == sorted(doc.id for doc in parts) != sorted(doc.id for doc in other)


def test_the_plan_and_a_shortage_are_noted_for_the_report(tmp_path):
    block = Mixture({"a": 1, "b": 1}, tokens=100, max_epochs=2)
    list(block.collect(str(tmp_path), 1).run(iter([document("word " * 40, domain="a"), document("word", domain="b")])))
    for search in block.search(str(tmp_path), 1):
        search.step.run()
    observed = Observed("mixture", block.apply(str(tmp_path)))
    list(observed.run(iter([])))
    assert observed.tally.notes == [
        "a: 50 tokens, 96.2% of the mix (wanted: 50.0%), from 50: each document taken 1 times",
        "b: 2 tokens, 3.8% of the mix (wanted: 50.0%), from 1: each document taken 2 times",
        "falls short: b: 1 tokens at 2 epochs give 2 of the 50 wanted",
    ]


def test_documents_too_long_for_their_share_are_noted(tmp_path):
    documents = [document("x" * 4000, f"general {i}", domain="general") for i in range(200)]
    documents += [document("y" * 4_000_000, f"code {i}", domain="code") for i in range(3)]
    block = Mixture({"general": 0.8, "code": 0.2}, tokens=200_000)
    _, reasons = both_passes(block, documents, str(tmp_path))
    assert {reasons[f"code {i}"] for i in range(3)} == {"over_represented"}
    observed = Observed("mixture", block.apply(str(tmp_path)))
    list(observed.run(iter([])))
    assert observed.tally.notes[-1] == "code: planned were 40,000 tokens; its documents are too long to come closer than 0"


def test_documents_of_one_id_do_not_share_their_fate(tmp_path):
    documents = [document(f"{i} word" * 500, "same", domain="a") for i in range(400)]
    kept, _ = both_passes(Mixture({"a": 1.0}, tokens=sum(map(size, documents)) // 4), documents, str(tmp_path))
    assert len(kept) == pytest.approx(100, abs=2)


def test_a_tokenizer_counts_the_tokens(tmp_path):
    tokenizer = small_vocabulary()
    tokenizer.save(tmp_path)
    texts = {"a": "the law " * 100, "b": "of the sea 12345678 " * 100}
    counts = {name: len(tokenizer.encode(text)) for name, text in texts.items()}
    assert all(counts[name] != size(document(text)) for name, text in texts.items())
    block = Mixture({"a": 1, "b": 1}, tokenizer=str(tmp_path / "tokenizer.model"), max_epochs=9)
    both_passes(block, [document(text, name, domain=name) for name, text in texts.items()], str(tmp_path / "work"))
    observed = Observed("mixture", block.apply(str(tmp_path / "work")))
    list(observed.run(iter([])))
    assert [int(re.search(r"from ([\d,]+)", note)[1].replace(",", "")) for note in observed.tally.notes[:2]] == list(counts.values())


@pytest.mark.parametrize("arguments", [{"max_epochs": 0}, {"max_epochs": float("nan")}, {"tokens": 0}, {"seed": -1}])
def test_numbers_that_mean_nothing_are_refused(arguments):
    with pytest.raises(UserError, match="must be above 0"):
        Mixture(**arguments)


def test_labels_come_from_the_classifier_and_other_languages_from_theirs(tmp_path):
    rng = Random(0)
    code = "def f(x):\n    return x + {}\n\nfor i in range({}):\n    print(f(i))"
    texts = [planted.prose(rng, 3) for _ in range(20)] + [code.format(i, i + 3) for i in range(20)]
    LinearClassifier.train_on(texts, ["general"] * 20 + ["code"] * 20, buckets=1 << 12).save(tmp_path / "model.npz")
    documents = [
        document(planted.prose(rng, 3)),
        document(code.format("y", 77)),
        document(planted.RIGHTS["de"], language="de"),
        document(code, language="en"),
    ]
    labelled = list(DomainLabel(str(tmp_path / "model.npz")).run(iter(documents)))
    assert [doc.metadata["domain"] for doc in labelled] == ["general", "code", "multilingual", "code"]
    assert all(0.5 < doc.metadata["domain_score"] <= 1 for doc in labelled)


@pytest.mark.slow
def test_weights_for_data_path(tmp_path):
    from megatron_llama3.data.sources import parse_data_path
    from tests.data.datasets import write_dataset

    sizes = {"general": 900, "maths": 100, "stem": 300, "code": 250, "de": 80}
    for name, tokens in sizes.items():
        write_dataset(tmp_path / name, [list(range(1, 1 + tokens))])
    domains = {"general": ["general"], "reasoning": ["maths", "stem"], "code": ["code"], "multilingual": ["de"]}
    flags = [
        part
        for name, sets in domains.items()
        for part in ("--domain", f"{name}={tmp_path / sets[0]}", *(str(tmp_path / s) for s in sets[1:]))
    ]
    command = [sys.executable, TOOL, *flags, "--train-tokens", "2000", "--max-epochs", "1", "--output", tmp_path / "blend.txt"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    prefixes, weights = parse_data_path(result.stdout.split())
    assert dict(zip([Path(p).name for p in prefixes], map(float, weights))) == pytest.approx(
        {"general": 0.5, "maths": 0.0625, "stem": 0.1875, "code": 0.17, "de": 0.08}
    )
    assert (tmp_path / "blend.txt").read_text().split() == result.stdout.split()
    assert "short: reasoning: 400 tokens at 1 epochs give 400 of the 500 wanted" in result.stderr
    assert "short: general: 900 tokens" in result.stderr
