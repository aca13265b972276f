"""Recall and precision of each curation block on what is planted into real text, and what each does to the text as it was.

    mkdir debs && cd debs
    apt-get download manpages manpages-dev manpages-de manpages-fr manpages-ja manpages-zh linux-doc-6.1 debian-handbook
    for deb in *.deb; do dpkg -x $deb ../debian; done && cd ..
    python benchmarks/curation.py debian [--evaluation gsm8k_test.jsonl] [--blocks extract language ...]

Rules and thresholds were adjusted on these packages. Three more corpora, each to be unpacked into a folder of its own, were set aside until
their first run; what that showed was then mended, so none is unseen now (benchmarks/RESULTS.md has the first runs too).

    git-man libssl-doc manpages-{es,it,pl,ru} python3.11-doc postgresql-doc-15 apache2-doc git-doc sqlite3-doc
    perl-doc tcl8.6-doc tk8.6-doc manpages-{nl,cs,da,uk} gimp-help-en nodejs-doc erlang-doc libboost1.74-doc exim4-doc-html
    freebsd-manpages libx11-doc manpages-{pt-br,sv,tr,hu,fi} bind9-doc cppreference-doc-en-html debian-reference-en installation-guide-amd64

Recall: of the planted items, how many were found. Precision: of what was found, how much had been planted. The last column is the share of
untouched documents that the block drops all the same.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from curation_text import NOT_CONTENT, html_pages, languages_in, manual_pages, pages_with

from tests.curation import planted
from tests.curation.steps import both_passes, document

DOCUMENTS = 300


def row(name: str, planted_items: int, found: int, false: int, untouched: int, seconds: float | None = None, documents: int = 0) -> None:
    precision = found / (found + false) if found + false else 1.0
    rate = f"{documents / seconds:,.0f}" if seconds else ""
    print(
        f"| {name} | {planted_items:,} | {found / max(1, planted_items):.3f} | {precision:.3f} "
        f"| {false / max(1, untouched):.4f} | {rate} |",
        flush=True,
    )


def judged(step, texts: list[str]) -> tuple[list[str | None], list[str], float]:
    """Reasons (None: kept), texts afterwards, seconds."""
    documents = [document(text, str(i)) for i, text in enumerate(texts)]
    started = time.process_time()
    results = [step.filter(doc) for doc in documents]
    seconds = time.process_time() - started
    return [None if r is True or r[0] else r[1] for r in results], [doc.text for doc in documents], seconds


def filter_row(name: str, step, bad: list[str], good: list[str]) -> list[str]:
    """A line for a filter; returns the good texts that it dropped."""
    reasons, _, first = judged(step, bad)
    wrongly, _, second = judged(step, good)
    dropped = [text for text, reason in zip(good, wrongly) if reason]
    row(name, len(bad), sum(map(bool, reasons)), len(dropped), len(good), first + second, len(bad) + len(good))
    return dropped


def words_of(text: str) -> Counter:
    return Counter(text.split())


def extraction(folder: Path, flags) -> None:
    """Real pages' main parts inside planted boilerplate; then formulas and code of pages that have them."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    from megatron_llama3.curation.blocks.extract import html_to_text

    def plain(html: str) -> str:
        return extract_plain_text(html, main_content=True, list_bullets=False)

    extractors = {"extract": html_to_text, "resiliparse's own main content": plain}
    try:
        from trafilatura import extract

        extractors["trafilatura"] = lambda html: extract(html, include_comments=False) or ""
    except ImportError:
        pass
    rng, pages, contents, originals, bare = Random(1), [], [], [], []
    for site, source in html_pages(folder, flags.documents):
        main = HTMLTree.parse(source).body.query_selector(site.content) if site.content else None
        if main is not None and len(main.text) > 500:
            for noise in main.query_selector_all(NOT_CONTENT)[:]:
                noise.remove()
            contents.append(words_of(extract_plain_text(main.html, main_content=False, list_bullets=False, alt_texts=True)))
            pages.append(planted.web_page(main.html, rng))
            originals.append((site, source))
        elif not site.content:
            bare.append((site, source))
    for name, extractor in extractors.items():
        started = time.process_time()
        texts = [extractor(page) for page in pages]
        seconds = time.process_time() - started
        pieces = len(planted.BOILERPLATE_MARKS) * len(texts)
        gone = sum(mark not in text for text in texts for mark in planted.BOILERPLATE_MARKS)
        print(
            f"| {name}: planted boilerplate removed | {pieces:,} | {gone / pieces:.3f} | {content_kept(texts, contents)} "
            f"| | {len(pages) / seconds:,.0f} |"
        )
        texts = [extractor(source) for _, source in [*originals, *bare]]
        own = [
            (mark.removesuffix("</a>"), text)
            for (site, source), text in zip([*originals, *bare], texts)
            for mark in site.boilerplate
            if mark in source
        ]
        print(
            f"| {name}: the pages' own boilerplate removed | {len(own):,} "
            f"| {sum(mark not in text for mark, text in own) / len(own):.3f} | {content_kept(texts, contents)} | | |"
        )
        formulas_and_code(folder, name, extractor)


def content_kept(texts: list[str], contents: list[Counter]) -> str:
    """Of the content's words those that were extracted; of the extracted those that are content."""
    shared = [sum((words_of(text) & content).values()) for text, content in zip(texts, contents)]
    recall = sum(share / content.total() for share, content in zip(shared, contents)) / len(contents)
    precision = sum(share / max(1, words_of(text).total()) for share, text in zip(shared, texts)) / len(contents)
    return f"content recall {recall:.3f}, precision {precision:.3f}"


def formulas_and_code(folder: Path, name: str, extractor) -> None:
    from resiliparse.parse.html import HTMLTree

    found, total = Counter(), Counter()
    for page in [*pages_with(folder, r'class="math', 40), *pages_with(folder, r"<pre", 60)]:
        text, tree = extractor(page), HTMLTree.parse(page)
        for image in tree.body.query_selector_all("img.math, div.math img")[:]:
            total["formulas"] += 1
            found["formulas"] += " ".join(image.getattr("alt").split()) in text
        for pre in tree.body.query_selector_all(
            "div[role=main] pre, div.document pre, #page-content pre, #content pre, pre.programlisting, pre.screen"
        )[:]:
            code = "\n".join(line.rstrip() for line in pre.text.strip("\n").split("\n"))
            total["blocks of code"] += 1
            found["blocks of code"] += code in text
    for kind, count in total.items():
        print(f"| {name}: {kind} verbatim | {count:,} | {found[kind] / count:.3f} | | | |", flush=True)


def heuristics(folder: Path, flags) -> None:
    from megatron_llama3.curation.blocks.filters import (
        DirtyWordFilter,
        DuplicateNgramFilter,
        FineWebQuality,
        GopherQuality,
        GopherRepetition,
    )

    rng, good = Random(2), manual_pages(folder, "en", flags.documents)
    few = good[: flags.documents // 3]
    logs = [planted.log(rng, rng.randint(15, 80)) for _ in few]
    spam = [planted.repeated(rng, rng.randint(10, 40)) for _ in few]
    filter_row("duplicate n-grams: logs", DuplicateNgramFilter(), logs, good)
    filter_row("duplicate n-grams: spam", DuplicateNgramFilter(), spam, good)
    for language in languages_in(folder)[1:]:
        pages = manual_pages(folder, language, flags.documents // 2)
        bad = [f"{text[:400]}\n" * 5 for text in pages[::5]]
        filter_row(f"duplicate n-grams: {language}, one piece five times", DuplicateNgramFilter(), bad, pages)
    inside = [f"{text}\n{planted.log(rng, 30)}" for text in few if len(text) > 6000]
    reasons, texts, _ = judged(DuplicateNgramFilter(), inside)
    lines = sum(30 for reason in reasons if not reason)
    left = sum(text.count("ERROR worker") for text, reason in zip(texts, reasons) if not reason)
    lost = sum(
        len(a) - 30 - len([line for line in b.split("\n") if "ERROR worker" not in line])
        for a, b, r in zip([text.split("\n") for text in inside], texts, reasons)
        if not r
    )
    row("duplicate n-grams: lines of logs in documents", lines, lines - left, lost, sum(len(t.split("\n")) for t in inside))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as words:
        words.write("# made up\nsnorfle\nblargish deals\n")
        words.flush()
        dirty = []
        for text in few:
            for _ in range(8 + 3 * len(text) // 6000):
                text = planted.inserted(text, rng.choice(["snorfle", "Snorfle,", "BLARGISH deals"]), rng)
            dirty.append(text)
        filter_row("dirty words", DirtyWordFilter(words.name), dirty, good)
    junk = [planted.symbols(rng) for _ in few]
    for step in (GopherQuality(), GopherRepetition(), FineWebQuality()):
        filter_row(f"{type(step).__name__} (datatrove): symbols and spam", step, junk + spam, good)
    notices(rng, good)


def notices(rng: Random, good: list[str]) -> None:
    """C4's rules: documents that are no prose, and lines about a site in documents that are."""
    from megatron_llama3.curation.blocks.filters import C4Quality

    few = good[: len(good) // 3]
    bad = [planted.inserted(text, "Lorem ipsum dolor sit amet.", rng) for text in few] + [planted.log(rng) for _ in few]
    filter_row("C4Quality (datatrove): lorem ipsum and logs", C4Quality(), bad, good)
    with_notices = [f"{planted.notice(rng)}\n{text}\n{planted.notice(rng)}" for text in good]
    for name, step in (
        ("C4Quality (datatrove)", C4Quality()),
        ("C4Quality (datatrove), any line end, braces kept", C4Quality(filter_no_terminal_punct=False, filter_curly_bracket=False)),
    ):
        reasons, texts, seconds = judged(step, with_notices)
        kept = [(before.split("\n"), after.split("\n")) for before, after, reason in zip(with_notices, texts, reasons) if not reason]
        left = sum(any(end in line for end in planted.NOTICE_ENDS) for _, lines in kept for line in lines)
        lost = sum(len(before) - len(after) for before, after in kept) - (2 * len(kept) - left)
        lines = sum(len(before) - 2 for before, _ in kept)
        row(f"{name}: notices in {len(kept)} kept documents", 2 * len(kept), 2 * len(kept) - left, lost, lines, seconds, len(good))


def divergence(folder: Path, flags) -> None:
    from megatron_llama3.curation.blocks.divergence import DivergenceFilter

    rng, good = Random(3), manual_pages(folder, "en", 3 * flags.documents)
    kinds = {
        "gibberish": [planted.gibberish(rng, rng.randint(40, 400)) for _ in range(30)],
        "another language": manual_pages(folder, languages_in(folder)[1], 30),
        "half gibberish": [f"{text[:800]}\n{planted.gibberish(rng, 150)}" for text in good[:30]],
    }
    documents = [document(text, f"good {i}") for i, text in enumerate(good)]
    documents += [document(text, f"{kind} {i}") for kind, texts in kinds.items() for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        _, reasons = both_passes(DivergenceFilter(), documents, work)
        seconds = time.process_time() - started
    false = sum(identity.startswith("good") for identity in reasons)
    for kind, texts in kinds.items():
        row(
            f"divergence: {kind}",
            len(texts),
            sum(identity.startswith(kind) for identity in reasons),
            false,
            len(good),
            seconds,
            len(documents),
        )
    values = sorted(doc.metadata.get("word_divergence", 0.0) for doc in documents if doc.id.startswith("good"))
    print(
        f"|   excess of untouched pages, nats: median {values[len(values) // 2]:.2f}, 99% {values[int(len(values) * 0.99)]:.2f} | | | | | |"
    )


def language(folder: Path, flags) -> None:
    from megatron_llama3.curation.blocks.language import LanguageFilter

    pages = {name: manual_pages(folder, name, flags.documents // 2) for name in languages_in(folder)}
    for size in (None, 400, 100):
        texts = {name: [cut(text, size) for text in texts] for name, texts in pages.items()}
        for name in pages:
            others = [text for other, texts_of in texts.items() if other != name for text in texts_of]
            filter_row(
                f"language: others beside {name}, {f'{size} characters' if size else 'whole pages'}",
                LanguageFilter([name]),
                others,
                texts[name],
            )


def cut(text: str, size: int | None) -> str:
    """A piece from the middle, where a manual page has prose."""
    return text if size is None else text[len(text) // 3 : len(text) // 3 + size]


def quality(folder: Path, flags) -> None:
    from megatron_llama3.curation.blocks.quality import ranking_quality
    from megatron_llama3.curation.classifiers.linear import LinearClassifier

    rng = Random(4)
    good = [cut(text, 1500) for text in manual_pages(folder, "en", 6 * flags.documents)]
    kinds = {
        "junk": lambda text: rng.choice([planted.repeated, planted.log, planted.gibberish])(rng),
        "shuffled words": lambda text: shuffled(text, rng),
    }
    half = len(good) // 2
    for kind, spoil in kinds.items():
        bad = [spoil(text) for text in good]
        # Trained on the first halves of both, tested on the second: no page is in both.
        texts, labels = good[:half] + bad[:half], ["good"] * half + ["bad"] * half
        started = time.process_time()
        model = LinearClassifier.train_on(texts, labels)
        trained, tested = time.process_time() - started, good[half:] + bad[half:]
        started = time.process_time()
        scores = model.probabilities(tested)[:, model.config.labels.index("good")]
        seconds = time.process_time() - started
        is_good = [True] * (len(good) - half) + [False] * (len(bad) - half)
        found = sum(score < 0.5 and not good_ for score, good_ in zip(scores, is_good))
        false = sum(score < 0.5 and good_ for score, good_ in zip(scores, is_good))
        row(f"quality, linear: {kind}", len(bad) - half, found, false, len(good) - half, seconds, len(tested))
        print(
            f"|   area under the curve {ranking_quality(scores, is_good):.4f}, trained on {len(texts):,} in {trained:.0f} CPU s | | | | | |"
        )


def shuffled(text: str, rng: Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def privacy(folder: Path, flags) -> None:
    from megatron_llama3.curation.blocks.extract import html_to_text
    from megatron_llama3.curation.blocks.privacy import remove_personal_data

    rng, pages = Random(5), manual_pages(folder, "en", flags.documents)
    regions = ["US", "GB", "DE", "FR"]
    found, total = Counter(), Counter()
    for text in pages:
        for kind, item in planted.personal_data(rng):
            total[kind] += 1
            cleaned, _ = remove_personal_data(planted.inserted(text[:3000], rng.choice(_AROUND).format(item), rng), regions)
            found[kind] += item not in cleaned
    untouched: Counter[str] = Counter()
    texts = pages + [html_to_text(source) for _, source in html_pages(folder, flags.documents)]
    started = time.process_time()
    for text in texts:
        untouched += remove_personal_data(text, regions)[1]
    seconds = time.process_time() - started
    for kind in total:
        row(f"personal data: {kind}", total[kind], found[kind], untouched[kind], len(texts), seconds, len(texts))
    print("|   what it finds in untouched pages counts as false here; their e-mail addresses are real | | | | | |")


_AROUND = ("{}", "({})", "{},", "<{}>", "at:{}", '"{}"', "{}.")


def blocked(folder: Path, flags) -> None:
    """Addresses on listed domains in every spelling, and addresses that only look like them."""
    from megatron_llama3.curation.blocks.privacy import DomainBlockFilter

    rng, good = Random(8), manual_pages(folder, "en", flags.documents)
    listed = [f"{name}{number}.{end}" for number, name in enumerate(("snorfle", "blargish", "bücher")) for end in ("org", "co.uk", "xyz")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as domains:
        domains.write("\n".join(listed))
        domains.flush()
        step = DomainBlockFilter(domains.name)
    documents = [document(text, "planted", url=planted.spelling(rng.choice(listed), rng)) for text in good]
    documents += [document(text, "good", url=planted.look_alike(rng.choice(listed), rng)) for text in good]
    started = time.process_time()
    dropped = Counter(doc.id for doc in documents if step.filter(doc) is not True)
    seconds = time.process_time() - started
    row("blocked domains: addresses on listed ones", len(good), dropped["planted"], dropped["good"], len(good), seconds, len(documents))


def personal_hosts(folder: Path, flags) -> None:
    """Hosts of which most pages have some addresses, among hosts of which one page is a list of them."""
    from megatron_llama3.curation.blocks.privacy import PersonalDomains, RemovePersonalData
    from megatron_llama3.curation.text.words import split_words

    rng, good, documents = Random(9), manual_pages(folder, "en", 2 * flags.documents), []
    for number in range(0, len(good), 10):
        chatty, of_host = number % 20 == 0, sorted(good[number : number + 10], key=len)
        for i, text in enumerate(of_host):
            items = len(split_words(text)) // 50 if chatty and i >= 3 else len(split_words(text)) // 25 if i == 3 else 0
            for _ in range(items):
                text = planted.inserted(text, rng.choice(planted.personal_data(rng))[1], rng)
            documents.append(document(text, f"{'planted' if chatty else 'good'} {number + i}", url=f"https://www.site{number}.org/{i}"))
    started = time.process_time()
    documents = list(RemovePersonalData().run(iter(documents)))
    cleaned = time.process_time() - started
    bad = sum(doc.id.startswith("planted") for doc in documents)
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        _, reasons = both_passes(PersonalDomains(), documents, work)
        seconds = time.process_time() - started
    found = sum(identity.startswith("planted") for identity in reasons)
    name = "personal domains: pages of hosts with much personal data"
    row(name, bad, found, len(reasons) - found, len(documents) - bad, seconds, len(documents))
    print(f"|   `personal_data` before it: {len(documents) / cleaned:,.0f} documents/CPU s | | | | | |")


def contamination(folder: Path, flags) -> None:
    from megatron_llama3.curation.blocks.decontaminate import DecontaminationFilter

    if not flags.evaluation:
        print("| decontamination: give --evaluation | | | | | |")
        return
    rng, good = Random(6), manual_pages(folder, "en", 2 * flags.documents)
    with open(flags.evaluation, encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    step = DecontaminationFilter({"evaluation": flags.evaluation})
    hosts = good[: flags.documents]
    exact = [planted.inserted(text, rng.choice(questions), rng) for text in hosts]
    close = [planted.inserted(text, planted.retouched(rng.choice(questions), rng, 0.03), rng) for text in hosts]
    filter_row("decontamination: verbatim questions", step, exact, good)
    filter_row("decontamination: 3% of words exchanged, case and punctuation changed", step, close, good)


def deduplication(folder: Path, flags) -> None:
    """Older versions of URLs, near copies of documents, and a site's own lines in its pages."""
    from megatron_llama3.curation.blocks.deduplicate import LineDedup, UrlDedup
    from megatron_llama3.curation.blocks.minhash import MinhashDedup

    rng = Random(7)
    good = manual_pages(folder, "en", 3 * flags.documents)
    pages = [document(text, f"good {i}", url=f"https://pages.org/{i}", date="2024-05-01") for i, text in enumerate(good)]
    older = [document(text, f"planted {i}", url=f"http://Pages.org:80/{i}#x", date="2023-05-01T10:00") for i, text in enumerate(good[::3])]
    global_row("URLs: older versions", UrlDedup(), pages, older, rng)
    near = [document(planted.retouched(text, rng, 0.02), f"planted {i}") for i, text in enumerate(good[::3])]
    global_row("MinHash: copies, 2% of words exchanged", MinhashDedup(), pages, near, rng)
    banners = [f"{planted.prose(rng, 1)} Number {i}." for i in range(20)]
    lined = [document(f"{rng.choice(banners)}\n{text}\n{rng.choice(banners)}", str(i)) for i, text in enumerate(good)]
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        kept, _ = both_passes(LineDedup(), lined, work)
        seconds = time.process_time() - started
    left = sum(doc.text.count(banner) for doc in kept for banner in banners)
    gone = 2 * len(good) - left
    lost = sum(len(text.split("\n")) for text in good) - sum(len(doc.text.split("\n")) for doc in kept) + left
    row("lines: a site's own in each page", 2 * len(good), gone, lost, sum(len(t.split("\n")) for t in good), seconds, len(good))
    print(f"|   what counts as false here are headings and options that {len(good):,} manual pages have in common | | | | | |")


def global_row(name: str, block, good: list, bad: list, rng: Random) -> None:
    """A line for a block that sees the whole corpus. The planted stand behind all others: of near copies the first stays."""
    documents = [*good, *rng.sample(bad, len(bad))]
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        _, reasons = both_passes(block, documents, work, tasks=1)
        seconds = time.process_time() - started
    found = sum(identity.startswith("planted") for identity in reasons)
    row(name, len(bad), found, len(reasons) - found, len(good), seconds, len(documents))


def domains(folder: Path, flags) -> None:
    """Programs among manual pages; trained on one half, tested on the other."""
    import sysconfig

    from megatron_llama3.curation.blocks.domains import DomainLabel
    from megatron_llama3.curation.classifiers.linear import LinearClassifier

    prose = [cut(text, 1500) for text in manual_pages(folder, "en", flags.documents)]
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    programs = [text for text in (cut(path.read_text(errors="replace"), 1500) for path in sources) if len(text) == 1500]
    texts, labels = [*prose[::2], *programs[::2]], ["general"] * len(prose[::2]) + ["code"] * len(programs[::2])
    with tempfile.TemporaryDirectory() as work:
        LinearClassifier.train_on(texts, labels).save(f"{work}/domains.npz")
        documents = [document(text, kind) for kind, texts in (("general", prose[1::2]), ("code", programs[1::2])) for text in texts]
        started = time.process_time()
        labelled = list(DomainLabel(f"{work}/domains.npz").run(iter(documents)))
        seconds = time.process_time() - started
    found = sum(doc.id == doc.metadata["domain"] == "code" for doc in labelled)
    false = sum(doc.id == "general" and doc.metadata["domain"] == "code" for doc in labelled)
    row("domain: programs among manual pages", len(programs[1::2]), found, false, len(prose[1::2]), seconds, len(documents))


def mixture(folder: Path, flags) -> None:
    """Real text of the paper's four domains in quite other proportions, and a domain without a share."""
    import sysconfig

    from megatron_llama3.curation.blocks.mixture import PAPER_MIX, Mixture

    if not flags.evaluation:
        print("| mixture: give --evaluation, its reasoning | | | | | |")
        return
    rng = Random(10)
    with open(flags.evaluation, encoding="utf-8") as file:
        reasoning = [f"{record['question']}\n{record['answer']}" for record in map(json.loads, file)]
    corpus = {
        "general": manual_pages(folder, "en", 3 * flags.documents),
        "reasoning": reasoning,
        "code": [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))],
        "multilingual": [text for language in languages_in(folder)[1:] for text in manual_pages(folder, language, flags.documents)],
        "spam": [planted.repeated(rng) for _ in range(flags.documents)],
    }
    documents = [document(text, f"{name} {i}", domain=name) for name, texts in corpus.items() for i, text in enumerate(texts)]
    have = tokens_by_domain(documents)
    total = int(2 * have["reasoning"] / PAPER_MIX["reasoning"])
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        kept, _ = both_passes(Mixture({**PAPER_MIX, "spam": 0}, tokens=total), documents, work)
        seconds = time.process_time() - started
    mixed = tokens_by_domain(kept)
    wanted = {name: total * PAPER_MIX.get(name, 0) for name in have}
    above = {name: have[name] - wanted[name] for name in have if have[name] > wanted[name]}
    removed = {name: have[name] - mixed[name] for name in above}
    found = sum(min(removed[name], above[name]) for name in above)
    false = sum(max(0, removed[name] - above[name]) for name in above)
    row("mixture: tokens above their domain's share", int(sum(above.values())), found, false, sum(wanted.values()), seconds, len(documents))
    missing = {name: wanted[name] - have[name] for name in have if have[name] < wanted[name]}
    added = {name: mixed[name] - have[name] for name in missing}
    found = sum(min(added[name], missing[name]) for name in missing)
    false = sum(max(0, added[name] - missing[name]) for name in missing)
    row("mixture: tokens short of it, by repetition", int(sum(missing.values())), found, false, sum(wanted.values()))
    shares = [f"{name} {have[name] / have.total():.1%}, {mixed[name] / mixed.total():.1%} of {wanted[name] / total:.0%}" for name in have]
    print(f"|   before, after, wanted: {'; '.join(shares)} | | | | | |")


def tokens_by_domain(documents: list) -> Counter:
    """A token is four bytes, as for the block itself."""
    tokens: Counter[str] = Counter()
    for doc in documents:
        tokens[doc.metadata["domain"]] += -(-len(doc.text.encode()) // 4)
    return tokens


BLOCKS = {
    "extract": extraction,
    "deduplication": deduplication,
    "domains": domains,
    "mixture": mixture,
    "heuristics": heuristics,
    "divergence": divergence,
    "language": language,
    "quality": quality,
    "privacy": privacy,
    "personal_domains": personal_hosts,
    "blocked_domains": blocked,
    "decontamination": contamination,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages were unpacked")
    parser.add_argument("--evaluation", metavar="JSONL", help="an evaluation set with questions, such as GSM8K's")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="untouched documents a block sees, about")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    flags = parser.parse_args()
    print("| block: planted | items | recall | precision | untouched dropped | documents/CPU s |\n|---|---|---|---|---|---|")
    for name in flags.blocks:
        BLOCKS[name](flags.folder, flags)


if __name__ == "__main__":
    main()
