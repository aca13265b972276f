"""Mistakes in the YAML are one line with the file and the key."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.minhash import MinhashDedup
from megatron_llama3.curation.pipeline import load_pipeline
from tests.curation.runs import write_pipeline

GOOD = "input: {path: corpus}\nblocks:\n- url_dedup\n- minhash_dedup: {threshold: 0.8, within: language}\n- line_dedup:\n"


def test_blocks_in_order_with_their_arguments(tmp_path):
    pipeline = load_pipeline(write_pipeline(tmp_path, GOOD + "slurm: {partition: p}\n"))
    assert [name for name, _ in pipeline.blocks] == ["url_dedup", "minhash_dedup", "line_dedup"]
    block = pipeline.blocks[1][1]
    assert isinstance(block, MinhashDedup)
    assert (block.threshold, block.within) == (0.8, "language")
    assert pipeline.slurm == {"partition": "p"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("input: {path: x}\n", "'blocks' is missing"),
        ("blocks: [url_dedup]\n", "'input' is missing"),
        (GOOD + "outputs: {}\n", "unknown group 'outputs'; did you mean output?"),
        (GOOD + "output: {compresion: zstd}\n", "unknown key output.compresion; did you mean compression?"),
        (GOOD + "output: {compression: gzip}\n", "output.compression is 'gzip': choose from zstd, none"),
        (GOOD.replace("path", "paths"), "unknown key input.paths; did you mean path?"),
        (GOOD.replace("path: corpus", "path: 7"), "input.path is 7: expected text"),
        (GOOD.replace("url_dedup", "url_dedupe"), r"blocks\[1\]: unknown block 'url_dedupe'; did you mean url_dedup?"),
        (GOOD.replace("threshold", "treshold"), r"blocks\[2\].minhash_dedup: unknown argument 'treshold'; did you mean threshold?"),
        (GOOD.replace("0.8", "high"), r"blocks\[2\].minhash_dedup: threshold is 'high': expected float"),
        (GOOD.replace("0.8", "true"), r"blocks\[2\].minhash_dedup: threshold is True: expected float"),
        (GOOD.replace("language", "3"), r"blocks\[2\].minhash_dedup: within is 3: expected str"),
        (GOOD.replace("0.8", "8"), r"blocks\[2\].minhash_dedup: threshold 8 must be above 0"),
        (GOOD.replace("{threshold: 0.8, within: language}", "[0.8]"), r"blocks\[2\].minhash_dedup must hold 'key: value' lines"),
        (GOOD + "- {url_dedup: {}, line_dedup: {}}\n", r"blocks\[4\] is .* expected one 'name: \{arguments\}'"),
        ("input: [", "not valid YAML"),
        ("text", "must hold the groups"),
    ],
)
def test_mistakes(tmp_path, text, message):
    path = write_pipeline(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        load_pipeline(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "block, message",
    [
        ("language: {languages: {en: high}}", "languages is {'en': 'high'}: expected"),
        ("language: {languages: [no, de]}", "languages is .False, 'de'.: expected"),  # YAML's no
        ("language: {languages: [en, english]}", "languages: english is none the model knows"),
        ("personal_data: {phone_regions: [UK]}", "phone_regions: UK is no region"),
        ("mixture: {target: {general: x}}", "target is {'general': 'x'}: expected"),
        ("mixture: {max_epochs: .nan}", "max_epochs is nan: expected float"),
        ("mixture: {max_epochs: -1}", "max_epochs -1, .* must be above 0"),
        ("minhash_dedup: {seed: -1}", "seed -1 at least 0"),
        ("line_dedup: {spare: {domain: code}}", "spare is {'domain': 'code'}: expected"),
        ("line_dedup: {spare: {domain: [1]}}", "spare is {'domain': .1.}: expected"),
        ("decontaminate: {evaluation_sets: {}}", "there must be a set"),
        ("decontaminate: {evaluation_sets: {q: quiz.jsonl}, ngram: 0}", "ngram 0"),
        ("gopher_repetition: {top_n_grams: [2, 0.2]}", "top_n_grams is .2, 0.2.: expected"),
        ("duplicate_ngrams: {line_ngram: 0}", "line_ngram 0, .* must be at least 1"),
        ("duplicate_ngrams: {ngrams: [[5]]}", "ngrams is ..5..: expected"),
        ("dirty_words: {words: []}", "words: names no file"),
        ("blocked_domains: {lists: []}", "lists: names no file"),
    ],
)
def test_arguments_that_no_run_could_use(tmp_path, block, message):
    path = write_pipeline(tmp_path, f"input: {{path: corpus}}\nblocks:\n- {block}\n")
    with pytest.raises(UserError, match=rf"blocks\[1\]\.\w+: .*{message}") as error:
        load_pipeline(path)
    assert "\n" not in str(error.value)


def test_lists_of_pairs_fit(tmp_path):
    text = "input: {path: corpus}\nblocks:\n- duplicate_ngrams: {ngrams: [[5, 1]]}\n"
    text += "- gopher_repetition: {top_n_grams: [[2, 0.2], [3, 0.18]]}\n"
    text += "- language: {languages: {en: 1, ja: 0.5}}\n- line_dedup: {spare: {domain: [code]}}\n"
    assert len(load_pipeline(write_pipeline(tmp_path, text)).blocks) == 4


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_pipeline(str(tmp_path / "none.yaml"))
