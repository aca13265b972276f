"""Personal data: every kind in every form goes, look-alikes stay; lists of people, blocked and chatty domains are dropped."""

import re
from random import Random

import idna
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.privacy import (
    DomainBlockFilter,
    PersonalDomains,
    RemovePersonalData,
    host_of,
    is_iban,
    passes_luhn,
    remove_personal_data,
)
from tests.curation import planted
from tests.curation.steps import both_passes, document, judge

REGIONS = ["US", "DE"]


@pytest.mark.parametrize("seed", range(20))
def test_each_kind_is_replaced_in_running_text(seed):
    rng = Random(seed)
    for kind, item in planted.personal_data(rng):
        text = planted.inserted(planted.prose(rng, 6), item, rng)
        cleaned, found = remove_personal_data(text, REGIONS)
        assert cleaned == text.replace(item, f"[{kind}]"), item
        assert found == {kind: 1}
        assert remove_personal_data(f"({item}).", REGIONS)[0] == f"([{kind}])."


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("Tel:+49 30 2345678, Fax:01 42 68 53 00", "Tel:[phone], Fax:[phone]"),
        ("tel:+1-212-555-1212 or Phone:212-555-1212", "tel:[phone] or Phone:[phone]"),
        ("<joe@web.de>; mailto:jane@web.de?subject=x", "<[email]>; mailto:[email]?subject=x"),
        ("ünal@web.de, joe@bücher.de, иван@почта.рф and joe@mail.xn--p1ai", "[email], [email], [email] and [email]"),
        ("请联系joe@web.de谢谢、電話は03-3212-2345まで", "请联系[email]谢谢、電話は[phone]まで"),
        ("cards 5500 0000 0000 0004, 6011-0000-0000-0004, 3056 930902 5904", "cards [card], [card], [card]"),
    ],
)
def test_without_spaces_and_beyond_ascii(text, cleaned):
    assert remove_personal_data(text, [*REGIONS, "FR", "JP"])[0] == cleaned


@pytest.mark.parametrize("item", planted.NO_PERSONAL_DATA)
def test_look_alikes_stay(item):
    for text in (f"before {item} after", item, f"{item}\n"):
        assert remove_personal_data(text, [*REGIONS, "FR", "GB"]) == (text, {})


def test_ipv6_and_american_express():
    for address in ("2a00:1450:4001:81b::200e", "2001:4860:4860:0:0:0:0:8888", "2606:4700::1111"):
        assert remove_personal_data(f"at {address} now")[0] == "at [ip] now"
    assert remove_personal_data("3782 822463 10005")[0] == "[card]"


def test_regions_are_checked():
    with pytest.raises(UserError, match="phone_regions: UK, XX is no region"):
        RemovePersonalData(phone_regions=["UK", "XX", "DE"])


def test_checksums():
    assert passes_luhn("4111 1111 1111 1111")
    assert not passes_luhn("4111 1111 1111 1112")
    assert not passes_luhn("0000 0000 0000 0000")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB82 WEST 1234 5698 7654 33")
    assert is_iban("BE68 5390 0754 7034")
    assert not is_iban("ZZ33 WEST 1234 5698 7654 32")  # right check digits, no such country
    assert not is_iban("GB91 1234 5698 7654 32")  # nor such a form


def test_counts_are_left_and_lists_of_people_go():
    rng = Random(0)
    text = planted.prose(rng, 40)
    reason, doc = judge(RemovePersonalData(), f"{text} Write to anna.berg@mail.de or call +49 30 2345678.")
    assert reason is None
    assert doc.metadata["personal_data"] == {"email": 1, "phone": 1}
    assert "anna" not in doc.text
    people = "\n".join(f"{item}" for _ in range(20) for _, item in planted.personal_data(rng))
    assert judge(RemovePersonalData(), people)[0] == "much_personal_data"
    reason, doc = judge(RemovePersonalData(), text)
    assert (reason, doc.text, doc.metadata["personal_data"]) == (None, text, {})


def test_blocked_domains(tmp_path):
    (tmp_path / "list.txt").write_text("# unsafe\nbad.example\nwww.worse.example.org\n")
    step = DomainBlockFilter(str(tmp_path / "list.txt"))
    for url in [
        "http://bad.example/a",
        "https://www.bad.example:8080",
        "https://cdn.BAD.example/x?y",
        "worse.example.org/z",
        "http://ｂａｄ.example/",
    ]:
        assert judge(step, "text", url=url)[0] == "blocked_domain", url
    for url in [
        "http://notbad.example/",
        "http://bad.example.com/",
        "http://example.org/bad.example",
        "",
        None,
        7,
        ["http://bad.example"],
        "http://[broken",
    ]:
        assert judge(step, "text", url=url)[0] is None, url
    assert judge(step, "text")[0] is None
    for entry in ("0.0.0.0 bad.example", "...", "*.bad.example", "http://bad.example/"):
        (tmp_path / "hosts").write_text(f"{entry}\n")
        with pytest.raises(UserError, match=re.escape(f"'{entry}' is no domain")):
            DomainBlockFilter(str(tmp_path / "hosts"))
    (tmp_path / "hosts").write_text("www.com\n")
    assert judge(DomainBlockFilter(str(tmp_path / "hosts")), "text", url="http://good.com/")[0] is None
    assert judge(DomainBlockFilter(str(tmp_path / "hosts")), "text")[0] is None
    assert judge(step, "text", url=" http://bad.example/a ")[0] == "blocked_domain"
    with pytest.raises(UserError, match="cannot be read"):
        DomainBlockFilter([str(tmp_path / "list.txt"), str(tmp_path / "none.txt")])
    assert host_of("https://user@www.A.org:8/x") == "a.org"


@pytest.mark.parametrize("seed", range(30))
def test_blocked_domains_in_every_spelling(tmp_path, seed):
    """Upper case, ports, users, a final dot, names with letters beyond ASCII as themselves or as DNS has them; and what only looks so."""
    rng = Random(seed)
    domain = rng.choice(["bad.example", "übung.example", "xn--bcher-kva.example"])
    (tmp_path / "list.txt").write_text(domain, encoding="utf-8")
    step = DomainBlockFilter(str(tmp_path / "list.txt"))
    for name in (domain, idna.decode(domain)):
        url, other = planted.spelling(name, rng), planted.look_alike(name, rng)
        assert judge(step, "text", url=url)[0] == "blocked_domain", url
        assert judge(step, "text", url=other)[0] is None, other


def test_domains_with_much_personal_data_go_as_a_whole(tmp_path):
    rng = Random(0)
    documents = [document(planted.prose(rng, 10), f"clean {i}", url="http://clean.org/", personal_data={}) for i in range(8)]
    documents += [
        document(planted.prose(rng, 10), f"people {i}", url=f"http://people.org/{i}", personal_data={"email": 9 * (i % 2)})
        for i in range(8)
    ]
    documents += [document("text", f"small {i}", url="http://small.org/", personal_data={"email": 9}) for i in range(2)]
    documents += [document("text", f"none {i}", personal_data={"email": 9}) for i in range(8)]
    long = planted.prose(rng, 40)  # some 500 words: one address is little
    documents += [document(long, f"busy {i}", url="http://busy.org/", personal_data={"email": 2}) for i in range(8)]
    documents += [document("text", "odd", url=7, personal_data=["x"])]  # an input may have entries of these names
    _, reasons = both_passes(PersonalDomains(), documents, str(tmp_path))
    assert reasons == {f"people {i}": "personal_domain" for i in range(8)}
