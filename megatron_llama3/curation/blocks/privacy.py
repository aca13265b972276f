"""Personal data and unsafe domains (paper 3.1.1: domains with much PII, harmful ones and adult ones are dropped).

What is found counts only where it stands a check: Luhn's for cards, a country's form and check digits for IBANs, libphonenumber's plans for
telephone numbers, public ranges for IP addresses. Addresses set aside for examples (example.org, 192.0.2.0/24) are nobody's.
"""

import contextlib
import ipaddress
import json
import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import idna
import phonenumbers
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from stdnum import iban, luhn

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.global_block import GlobalBlock, Search
from megatron_llama3.curation.storage.files import whole_file
from megatron_llama3.curation.storage.list_file import read_lists
from megatron_llama3.curation.storage.task_counts import read_task_counts, write_task_counts
from megatron_llama3.curation.text.words import split_words

# Letters that names and hosts are written with; not Chinese and Japanese, in which an address stands without spaces around it.
_LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u04ff"


def _pattern(text: str) -> re.Pattern:
    r"""In the text, `\l` in a class is any of those letters, and `\w` that, a digit or the underscore."""
    return re.compile(text.replace(r"\w", rf"{_LETTERS}0-9_").replace(r"\l", _LETTERS))


_EMAIL = _pattern(
    r"(?<![\w.+-])[\l0-9][\w.+-]{0,63}@(?:[\l0-9](?:[\l0-9-]{0,61}[\l0-9])?\.)+(?:xn--[A-Za-z0-9-]{2,59}|[\l]{2,24})(?![\w-])"
)
# Set aside for examples, used in them all the same, or the endings of systemd's units, which are written name@instance.service.
_NO_HOST = re.compile(
    r"(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local|localdomain|domain|host|tld"
    r"|service|timer|socket|mount|automount|slice|scope|device|swap|conf)$",
    re.IGNORECASE,
)
_IPV4 = _pattern(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.[\w])")
_IPV6 = _pattern(r"(?<![\w:.-])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_IPV6_ADDRESSES = ipaddress.ip_network("2000::/3")  # all that is given out; `DB::DB` and `::a` are names in programs
_HIGHEST_SECTION = 64  # numbers of versions and sections are smaller throughout; addresses are that hardly ever
# 16 digits, or as American Express and Diners write them; one kind of separator throughout.
_CARD = _pattern(
    r"(?<![\w./=-])(?:(?:2[2-7]|[45]\d|6\d)\d{2}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -]?)\d{6}\2\d{5}|3[068]\d{2}([ -]?)\d{6}\3\d{4})"
    r"(?![\w-]|\.\d|[ -]\d{4})"
)
_IBAN = _pattern(r"(?<![\w])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![\w])")
_SOCIAL_SECURITY = _pattern(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
_PHONE = _pattern(r"(?<![\w./+-])(?<!\d:)(?:\+\d{1,3}|\(?0\d|\(\d{3}\)|\d{3}(?=[ .-]\d{3}[ .-]\d{4}))[\d ()/.-]{5,20}\d(?![\w-]|\.\d|:\d)")
# Punctuation that telephone numbers are written with; a bare run of digits is one only behind a +.
_ARITHMETIC = re.compile(r" - |(\d)\1{5}")
_SEPARATOR = re.compile(r"\d[ ()/.-]+\d")
_DATE = re.compile(r"\(?\d\d?([-/.])\d\d?\1\d{4}(?:\D.*)?|\d\d-\d\d \d\d")
_PAIRS = re.compile(r"\d\d(?:[ -]+\d\d)+")
_PAIRS_OF_A_NUMBER = 5  # French ones; more or fewer are a dump of bytes
_ZIP_CODE, _STATE = re.compile(r"\d{5}-\d{4}"), re.compile(r"\b[A-Z]{2}\s+$")  # the Free Software Foundation's is in every licence text


class RemovePersonalData(BaseFilter):
    """Replaces e-mail addresses, telephone numbers, public IP addresses, cards, IBANs and US social security numbers by `[email]`, ...

    max_per_thousand_words: a document with more is a list of people, and dropped (`much_personal_data`).
    phone_regions: whose national form (without +) is recognised too. Counts by kind are left in `personal_data`.
    """

    name = "Personal data"

    def __init__(
        self,
        max_per_thousand_words: float = 50.0,
        phone_regions: list[str] = ("US", "GB", "DE", "FR"),
        exclusion_writer: DiskWriter | None = None,
    ):
        super().__init__(exclusion_writer)
        if unknown := set(phone_regions) - phonenumbers.SUPPORTED_REGIONS:
            raise UserError(f"phone_regions: {', '.join(sorted(unknown))} is no region of libphonenumber's; give ISO 3166 codes such as GB")
        self.max_per_thousand_words = max_per_thousand_words
        self.phone_regions = list(phone_regions)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        words = max(1, len(split_words(doc.text)))
        doc.text, found = remove_personal_data(doc.text, self.phone_regions)
        for kind, count in found.items():
            self.stat_update(f"removed_{kind}", value=count, unit="doc")
        doc.metadata["personal_data"] = dict(found)
        if found.total() > 1 and found.total() * 1000 > self.max_per_thousand_words * words:
            return False, "much_personal_data"
        return True


def remove_personal_data(text: str, phone_regions: list[str] = ()) -> tuple[str, Counter[str]]:
    """The text with placeholders, and how many of each kind there were."""
    checks = [
        ("email", _EMAIL, _is_persons_address),
        ("iban", _IBAN, lambda match: is_iban(match[0])),
        ("card", _CARD, lambda match: passes_luhn(match[0])),
        ("ssn", _SOCIAL_SECURITY, lambda match: True),
        ("ip", _IPV4, _is_public_address),
        ("ip", _IPV6, _is_public_address),
        ("phone", _PHONE, lambda match: not _is_zip_code(match) and is_phone_number(match[0], phone_regions)),
    ]
    found: Counter[str] = Counter()
    for kind, pattern, is_real in checks:

        def replace(match: re.Match, kind: str = kind, is_real=is_real) -> str:
            if not is_real(match):
                return match[0]
            found[kind] += 1
            return f"[{kind}]"

        text = pattern.sub(replace, text)
    return text, found


def passes_luhn(number: str) -> bool:
    """Whether the digits have a valid Luhn check digit; all alike (0000 ...) do not count."""
    digits = re.sub(r"\D", "", number)
    return len(set(digits)) > 1 and luhn.is_valid(digits)


def is_iban(number: str) -> bool:
    """Whether the check digits are right and the country has numbers of that form. Banks' codes are not looked up: no list has them all."""
    return iban.is_valid(number, check_country=False)


def is_phone_number(candidate: str, regions: list[str] = ()) -> bool:
    """Whether libphonenumber knows such a number: international ones with +, else written with separators as in one of the regions."""
    if not candidate.startswith("+") and (not _SEPARATOR.search(candidate) or _ARITHMETIC.search(candidate)):
        return False
    if _DATE.fullmatch(candidate) or (_PAIRS.fullmatch(candidate) and len(re.findall(r"\d\d", candidate)) != _PAIRS_OF_A_NUMBER):
        return False
    for region in [None] if candidate.startswith("+") else regions:
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(candidate, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


def _is_persons_address(match: re.Match) -> bool:
    name, _, host = match[0].rpartition("@")
    return name != "git" and not _NO_HOST.search(host)


def _is_public_address(match: re.Match) -> bool:
    if match.re is _IPV4 and (all(int(part) < _HIGHEST_SECTION for part in match[0].split(".")) or _is_heading(match)):
        return False
    if match.re is _IPV6 and len(re.findall(r"\w+", match[0])) < 2:
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 4 and address.packed[-1] == 0:
        return False  # a network
    return address.is_global and not address.is_multicast and (address.version == 4 or address in _IPV6_ADDRESSES)


def _is_heading(match: re.Match) -> bool:
    """`43.7.2.1. Rules`, at the beginning of a line."""
    return match.string[: match.start()].rpartition("\n")[2].strip() == "" and match.string[match.end() : match.end() + 1] == "."


def _is_zip_code(match: re.Match) -> bool:
    return bool(_ZIP_CODE.fullmatch(match[0]) and _STATE.search(match.string[max(0, match.start() - 20) : match.start()]))


def host_of(url: object) -> str:
    """The host in lower case and as DNS has it (bücher.org is xn--bcher-kva.org), without port or `www.`; empty where there is none."""
    if not isinstance(url, str):
        return ""
    try:
        host = urlsplit(url.strip() if "//" in url else f"//{url.strip()}").hostname or ""
    except ValueError:
        return ""
    if not host.isascii():
        with contextlib.suppress(idna.IDNAError):  # no name that DNS could have: compared as it is
            host = ".".join(label if label.isascii() else idna.encode(label, uts46=True).decode() for label in host.split("."))
    host = host.lower().rstrip(".")
    shorter = host.removeprefix("www.")
    return shorter if "." in shorter else host  # `www.com` is a host of that name


class DomainBlockFilter(BaseFilter):
    """Drops documents (`blocked_domain`) whose host, or a domain above it, is on a list.

    lists: files, one domain a line (the UT1 lists have this form). key: the metadata entry with the URL; a document without one is kept.
    """

    name = "Blocked domains"

    def __init__(self, lists: list[str] | str, key: str = "url", exclusion_writer: DiskWriter | None = None):
        super().__init__(exclusion_writer)
        self.key = key
        self.domains = set()
        for entry in read_lists(lists, "lists"):
            if re.search(r"[\s/*]", entry) or not host_of(entry):
                raise UserError(
                    f"lists: '{entry}' is no domain; give one a line, such as example.org, which stands for all hosts below it too"
                )
            self.domains.add(host_of(entry))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        labels = host_of(doc.metadata.get(self.key)).split(".")
        if any(".".join(labels[start:]) in self.domains for start in range(len(labels))):
            return False, "blocked_domain"
        return True


class PersonalDomains(GlobalBlock):
    """Behind `personal_data`: drops all documents (`personal_domain`) of hosts on which much personal data was found.

    Of hosts with at least `min_documents` documents, those with more than `max_per_thousand_words`. key: the metadata entry with the URL.
    """

    def __init__(self, max_per_thousand_words: float = 10.0, min_documents: int = 5, key: str = "url"):
        self.max_per_thousand_words, self.min_documents, self.key = max_per_thousand_words, min_documents, key

    def collect(self, folder: str, partitions: int) -> PipelineStep:
        return CountPersonalData(folder, self.key)

    def search(self, folder: str, tasks: int) -> list[Search]:
        return [Search("hosts", 1, FindPersonalDomains(folder, self._listed(folder), self.max_per_thousand_words, self.min_documents))]

    def apply(self, folder: str) -> PipelineStep:
        return DropPersonalDomains(self._listed(folder), self.key)

    def _listed(self, folder: str) -> str:
        return os.path.join(folder, "hosts", "personal.json")


class CountPersonalData(PipelineStep):
    """First pass: host -> its documents, words and items of personal data."""

    type = "STATS"
    name = "personal data by domain"

    def __init__(self, folder: str, key: str):
        super().__init__()
        self.folder, self.key = folder, key

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        hosts: dict[str, list[int]] = {}
        for doc in data:
            found = doc.metadata.get("personal_data")
            items = sum(found.values()) if isinstance(found, dict) else 0
            _add(hosts, host_of(doc.metadata.get(self.key)), (1, len(split_words(doc.text)), items))
            yield doc
        hosts.pop("", None)
        write_task_counts(self.folder, rank, world_size, hosts)


class FindPersonalDomains(PipelineStep):
    """The hosts to drop, from the counts of all tasks."""

    type = "STATS"
    name = "domains with much personal data"

    def __init__(self, folder: str, output: str, max_per_thousand_words: float, min_documents: int):
        super().__init__()
        self.folder, self.output = folder, output
        self.max_per_thousand_words, self.min_documents = max_per_thousand_words, min_documents

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        totals: dict[str, list[int]] = {}
        for task in read_task_counts(self.folder):
            for host, counts in task.items():
                _add(totals, host, counts)
        enough = {host: counts for host, counts in totals.items() if counts[0] >= self.min_documents}
        listed = [host for host, (_, words, found) in enough.items() if found * 1000 > self.max_per_thousand_words * words]
        with whole_file(self.output) as file:
            file.write(json.dumps(sorted(listed)).encode())


class DropPersonalDomains(BaseFilter):
    """Second pass."""

    name = "domains with much personal data"

    def __init__(self, listed: str, key: str):
        super().__init__()
        self.listed, self.key = listed, key
        self._hosts: set[str] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._hosts is None:  # here, since the step is made before the first pass has run
            self._hosts = set(json.loads(Path(self.listed).read_bytes()))
        return (False, "personal_domain") if host_of(doc.metadata.get(self.key)) in self._hosts else True


def _add(totals: dict[str, list[int]], host: str, counts: tuple[int, ...] | list[int]) -> None:
    totals[host] = [a + b for a, b in zip(totals.get(host, [0] * len(counts)), counts)]
