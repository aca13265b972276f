"""Mistakes in the YAML are one line with the file and the key."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.minhash import MinhashDedup
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


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_pipeline(str(tmp_path / "none.yaml"))
