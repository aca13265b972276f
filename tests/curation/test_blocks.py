"""Every block by its name in the YAML: made with its arguments, run over planted documents, observed and reported by its reasons."""

import json
from random import Random

import yaml
from datatrove.data import Document

from megatron_llama3.curation.classifiers.linear import LinearClassifier
from megatron_llama3.curation.global_block import GlobalBlock
from megatron_llama3.curation.observe import Observed
from megatron_llama3.curation.pipeline import BLOCKS, load_pipeline
from tests.curation import planted

QUESTION = "A baker makes 24 loaves each morning and sells two thirds of them before noon. How many loaves are left?"
DEDUPLICATION = {"url_dedup", "minhash_dedup", "line_dedup"}  # tested by themselves


def blocks(tmp_path) -> list[dict]:
    rng = Random(0)
    (tmp_path / "domains.txt").write_text("blocked.example\n")
    (tmp_path / "words.txt").write_text("snorfle\n")
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    texts = [planted.prose(rng, 4) for _ in range(20)]
    LinearClassifier.train_on(texts + [planted.symbols(rng, 300) for _ in texts], ["good"] * 20 + ["bad"] * 20, buckets=1 << 12).save(
        tmp_path / "q.npz"
    )
    LinearClassifier.train_on(texts + ["x = 1"] * 20, ["general"] * 20 + ["code"] * 20, buckets=1 << 12).save(tmp_path / "d.npz")
    return [
        {"blocked_domains": {"lists": str(tmp_path / "domains.txt")}},
        {"extract": {"min_characters": 10}},
        {"language": {"languages": {"en": 0.1}}},
        {"dirty_words": {"words": [str(tmp_path / "words.txt")], "max_words": 2}},
        {"personal_data": {"phone_regions": ["DE"]}},
        {"personal_domains": {"min_documents": 3}},
        {"duplicate_ngrams": {"ngrams": [[5, 0.3]]}},
        {"gopher_quality": {"min_doc_words": 20}},
        {"gopher_repetition": {"top_n_grams": []}},
        {"fineweb_quality": {"line_punct_thr": 0.1}},
        {"c4_quality": {"min_num_sentences": 2}},
        {"divergence": {"max_excess": 3.0}},
        {"quality": {"model": str(tmp_path / "q.npz"), "min_score": 0.2}},
        {"decontaminate": {"evaluation_sets": {"quiz": str(tmp_path / "quiz.jsonl")}}},
        {"domain": {"model": str(tmp_path / "d.npz")}},
        {"mixture": {"target": {"general": 1.0}, "max_epochs": 2.0}},
    ]


def pages(rng: Random) -> list[Document]:
    def page(identity: str, text: str, url: str = "http://good.org/") -> Document:
        return Document(planted.web_page(planted.paragraphs(text), rng), identity, metadata={"url": url})

    prose = planted.prose(rng, 30)
    return [
        *[page(f"good {i}", planted.prose(rng, 30)) for i in range(12)],
        page("blocked", prose, "http://www.blocked.example/"),
        page("German", planted.RIGHTS["de"] * 3),
        page("dirty", prose + " snorfle" * 30),
        page("people", "\n\n".join(f"Please write to {item}." for _ in range(9) for _, item in planted.personal_data(rng))),
        page("repeated", planted.repeated(rng)),
        page("leaked", f"{prose}\n\n{QUESTION}"),
        Document("<nav><a href='/'>Home</a></nav>", "empty", metadata={"url": "http://good.org/e"}),
    ]


def test_all_blocks_in_one_pipeline(tmp_path):
    entries = blocks(tmp_path)
    assert {name for entry in entries for name in entry} == set(BLOCKS) - DEDUPLICATION
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"input": {"path": str(tmp_path / "in.jsonl")}, "blocks": entries}))
    documents, reasons = pages(Random(1)), {}
    for number, (name, block) in enumerate(load_pipeline(str(tmp_path / "p.yaml")).blocks):
        if isinstance(block, GlobalBlock):
            list(block.collect(str(tmp_path / str(number)), 1).run(iter(documents)))
            for search in block.search(str(tmp_path / str(number)), 1):
                search.step.run(None, 0, 1)
            block = block.apply(str(tmp_path / str(number)))
        observed = Observed(name, block)
        documents = list(observed.run(iter(documents)))
        reasons |= {
            identity: reason
            for reason, samples in observed.tally.samples.items()
            for _, identity, *_ in samples
            if reason not in ("changed", "kept")
        }
    assert reasons == {
        "blocked": "blocked_domain",
        "empty": "no_content",
        "German": "language_de",
        "dirty": "dirty_words",
        "people": "much_personal_data",
        "repeated": "repeated_lines",
        "leaked": "contaminated_quiz",
    }
    assert sorted(doc.id for doc in documents) == sorted([f"good {i}" for i in range(12)] + [f"good {i}#2" for i in range(12)])
