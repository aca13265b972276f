"""The newest version of a URL stays; lines seen too often in their bucket go, all of them."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.deduplicate import LineDedup, UrlDedup, normalised_url, timestamp
from tests.curation.runs import documents, prose, through


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_newest_version_of_a_url_stays(tmp_path, tasks):
    rows = [
        ("http://a.org/x", "2024-01-02"),
        ("https://A.org:443/x#top", "2024-01-02T00:00:01Z"),  # newer by a second
        ("http://a.org/x?page=2", "2020-01-01"),
        ("http://a.org/x", 0),
        ("http://b.org", None),
        ("http://b.org/", None),  # as old: the first stays
        (None, "2024-01-01"),
        ("", "2024-01-01"),
    ]
    urls, dates = zip(*rows)
    given = documents([prose(seed) for seed in range(len(rows))], url=urls, date=dates)
    assert [document.id for document in through(UrlDedup(), given, tmp_path, tasks)] == ["1", "2", "4", "6", "7"]


def test_what_is_no_url_is_compared_as_it_is():
    assert normalised_url(" urn:isbn:1 ") == "urn:isbn:1"
    assert normalised_url("http://[broken/x") == "http://[broken/x"
    assert normalised_url("http://a.org:99999/x") == "http://a.org:99999/x"
    assert timestamp("yesterday") < timestamp("1900-01-01") < timestamp(0) < timestamp("2024-05-01T12:00:00+02:00")


def test_frequent_lines_go_and_others_stay(tmp_path):
    banner, rare = "Accept all 12 cookies!", "Accept no cookies."
    texts = [f"{prose(seed)}\n\n{'ACCEPT all 7 cookies' if seed % 2 else banner}\n}}" for seed in range(7)]
    texts[0] += f"\n{rare}"
    kept = through(LineDedup(), documents(texts), tmp_path, 3)
    assert [document.text for document in kept] == [f"{prose(seed)}\n\n}}" + (f"\n{rare}" if seed == 0 else "") for seed in range(7)]


def test_no_heap_of_empty_lines_is_left(tmp_path):
    texts = [f"sign in\n\nregister\n\n{prose(seed)}\n\nsign in\n\n\nEnd {'abc'[seed]}\nregister\n" for seed in range(3)]
    kept = through(LineDedup(times=2), documents(texts), tmp_path)
    assert [document.text for document in kept] == [f"{prose(seed)}\n\nEnd {'abc'[seed]}" for seed in range(3)]


def test_six_times_is_not_more_than_six(tmp_path):
    texts = [f"{prose(seed)}\nall rights reserved" for seed in range(6)]
    assert [document.text for document in through(LineDedup(), documents(texts), tmp_path)] == texts


def test_buckets_count_for_themselves(tmp_path):
    texts = [f"{prose(seed)}\nall rights reserved" for seed in range(10)]
    kept = through(LineDedup(times=4, bucket=6), documents(texts), tmp_path, 3)
    assert ["reserved" in document.text for document in kept] == [False] * 6 + [True] * 4


def test_a_document_without_a_line_left_goes_with_a_reason(tmp_path):
    given = documents(["sign in\nregister"] * 3 + [prose(1)])
    assert [document.id for document in through(LineDedup(times=2), given, tmp_path)] == ["3"]
    step = LineDedup(times=2).apply(str(tmp_path))
    reasons = []
    step.exclusion_writer = _Collects(reasons)
    given = documents(["sign in\nregister"] * 2)
    assert list(step.run(iter(given), 0, 2)) == []
    assert reasons == ["no_line_left"] * 2


class _Collects:
    def __init__(self, reasons: list[str]):
        self.reasons = reasons

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def write(self, document, rank):
        self.reasons.append(document.metadata["filter_reason"])


def test_lines_within_a_language_only(tmp_path):
    texts = [f"{prose(seed)}\nOK" for seed in range(4)]
    given = documents(texts, language=["de", "de", "fr", "de"])
    kept = through(LineDedup(times=2, within="language"), given, tmp_path)
    assert ["OK" in document.text for document in kept] == [False, False, True, False]


def test_programs_are_spared_and_do_not_count(tmp_path):
    texts = [f"{prose(seed)}\n#include <stdio.h>" for seed in range(10)]
    given = documents(texts, domain=["code"] * 6 + ["general"] * 4)
    kept = through(LineDedup(times=3, spare={"domain": ["code", "reasoning"]}), given, tmp_path / "a")
    assert ["stdio" in document.text for document in kept] == [True] * 6 + [False] * 4
    given = documents(texts, domain=["code"] * 6 + ["general"] * 4)
    kept = through(LineDedup(times=4, spare={"domain": ["code"]}), given, tmp_path / "b")
    assert all("stdio" in document.text for document in kept)


def test_bad_arguments():
    with pytest.raises(UserError, match="times 0"):
        LineDedup(times=0)
