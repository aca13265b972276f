"""Damage that sizes do not show is found while a checkpoint is read, by whoever reads it: pretraining, generation, conversion."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_llama3.checkpoint.native.manifest import parts, read_manifest, summarize
from megatron_llama3.checkpoint.native.metadata import read_metadata
from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.planning.local_ranks import RankFailedError, run_ranks
from megatron_llama3.recipes import generate
from megatron_llama3.recipes.pretrain import pretrain
from megatron_llama3.tokenizer.llama3 import Tokenizer
from tests.tools.test_convert_checkpoint import convert

FLAGS = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --vocab-size 512 --seq-length 16 "
    "--global-batch-size 4 --lr 1e-3 --lr-decay-iters 8 --eval-iters 0"
)
WEIGHT = "model.layers.1.attention.wo.weight"


def run(flags: str, world_size: int = 1) -> None:
    run_ranks(world_size, lambda: pretrain(parse_run_config(f"{FLAGS} {flags}".split())))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data, a tokenizer, and a run of two ranks saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for length in rng.integers(5, 60, 80):
            writer.add_document(rng.integers(0, 512, length))
        writer.finalize()
    Tokenizer({bytes([i]): i for i in range(256)}).save(folder / "tokenizer")
    layout = "--tensor-model-parallel-size 2"
    data = f"--data-path {folder / 'corpus'} --tokenizer-model {folder / 'tokenizer'}"
    run(f"{data} --save {folder / 'run'} --train-iters 4 --save-interval 2 {layout}", 2)
    return folder


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    """A copy of the run's folder, to be damaged."""
    return shutil.copytree(trained / "run", tmp_path / "run")


def place_of_weight(folder: Path):
    """The file and the bytes that hold the second rank's half of one weight."""
    storage = read_metadata(folder).storage_data
    return next(info for index, info in storage.items() if index.fqn == WEIGHT and any(index.offset))


def change(path: Path, start: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    assert data[start : start + len(new)] != new
    data[start : start + len(new)] = new
    path.write_bytes(data)


def flip_a_bit(folder: Path) -> None:
    place = place_of_weight(folder)
    path, middle = folder / place.relative_path, place.offset + place.length // 2
    change(path, middle, bytes([path.read_bytes()[middle] ^ 1]))


def zero_2000_bytes(folder: Path) -> None:
    place = place_of_weight(folder)
    change(folder / place.relative_path, place.offset + 100, bytes(min(2000, place.length - 200)))


def truncate(folder: Path) -> None:
    path = folder / place_of_weight(folder).relative_path
    path.write_bytes(path.read_bytes()[:-1])


def leave_a_hole(folder: Path) -> None:
    """As a writer with a fault would: the table of contents has its right checksum."""
    content = read_metadata(folder)
    del content.state_dict_metadata[WEIGHT].chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    note(folder, ".metadata", summarize(folder / ".metadata"))


def note(folder: Path, name: str, entry: dict | None) -> None:
    files = read_manifest(folder) | {name: entry}
    (folder / "manifest.json").write_text(json.dumps({"files": {name: entry for name, entry in files.items() if entry}}))


def add_a_file(folder: Path) -> None:
    shutil.copy(folder / "__1_0.distcp", folder / "__2_0.distcp")


def read_from_a_file_outside_the_manifest(folder: Path) -> None:
    note(folder, "__1_0.distcp", None)


def take_a_file_of_another_step(folder: Path) -> None:
    """Of the same size, and whole in itself."""
    assert (folder.parent / "iter_0000002" / "__1_0.distcp").stat().st_size == (folder / "__1_0.distcp").stat().st_size
    shutil.copy(folder.parent / "iter_0000002" / "__1_0.distcp", folder / "__1_0.distcp")


CHANGED = r"__1_0\.distcp: .*are not those that were saved"
DAMAGE = [
    (flip_a_bit, CHANGED),
    (zero_2000_bytes, CHANGED),
    (take_a_file_of_another_step, CHANGED),
    (truncate, r"__1_0\.distcp: has [0-9,]+ bytes, [0-9,]+ were saved"),
    (leave_a_hole, f"chunks of {WEIGHT} do not cover"),
    (add_a_file, r"__2_0\.distcp: manifest\.json does not have this file"),
    (read_from_a_file_outside_the_manifest, r"__1_0\.distcp: manifest\.json does not have this file"),
]
each_damage = pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])


@pytest.mark.slow
@each_damage
def test_a_run_does_not_start_from_it_and_auto_resume_goes_further_back(trained, saved, tmp_path, capfd, damage, message):
    damage(saved / "iter_0000004")
    data = f"--data-path {trained / 'corpus'} --tokenizer-model {trained / 'tokenizer'} --train-iters 5 --global-batch-size 4"
    with pytest.raises(RankFailedError, match=f"Error: .*{message}"):
        run(f"{data} --load {saved}", 2)  # DP 2: another layout than it was saved from
    run(f"{data} --save {saved} --auto-resume", 2)
    said, errors = capfd.readouterr()
    assert "Traceback" not in errors, "no library prints its own"
    assert said.count("is passed over") == 1
    assert f"loaded {saved / 'iter_0000002'} at iteration 2" in said
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "5"


@each_damage
def test_generation_and_conversion_refuse_it(saved, tmp_path, monkeypatch, capsys, damage, message):
    damage(saved / "iter_0000004")
    with pytest.raises(RankFailedError, match=f"Error: .*{message}"):
        run_ranks(1, generate.main, ["--load", str(saved), "--prompt", "x", "--max-new-tokens", "1"])
    with pytest.raises(SystemExit):
        convert(monkeypatch, "--from", "native", "--to", "hf", "--load", saved, "--save", tmp_path / "hf")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "hf").exists()


def test_a_rank_checks_what_it_reads_and_only_that(trained, saved):
    """The moments of the optimizer are not read where weights alone are wanted; a flag leaves the weights unchecked too."""
    folder = saved / "iter_0000004"
    storage = read_metadata(folder).storage_data
    place = next(info for index, info in storage.items() if index.fqn == WEIGHT.replace("model.", "optimizer.exp_avg."))
    change(folder / place.relative_path, place.offset + place.length // 2, b"\x55\x55")
    data = f"--data-path {trained / 'corpus'} --train-iters 1 --load {saved}"
    run(f"{data} --finetune")
    with pytest.raises(RankFailedError, match="are not those that were saved"):
        run(data.replace("--train-iters 1", "--train-iters 5"))
    flip_a_bit(folder)
    with pytest.raises(RankFailedError, match="are not those that were saved"):
        run(f"{data} --finetune")
    run(f"{data} --finetune --no-load-checksums")


def test_manifests_of_older_versions_have_whole_files_checked_or_nothing(trained, saved):
    folder = saved / "iter_0000004"
    data = f"--data-path {trained / 'corpus'} --train-iters 5 --load {saved}"
    for name, entry in read_manifest(folder).items():
        note(folder, name, {key: value for key, value in entry.items() if key != "parts"})
    run(data)
    flip_a_bit(folder)
    with pytest.raises(RankFailedError, match=CHANGED):
        run(data)
    (folder / "manifest.json").unlink()
    run(data)


def test_parts_are_those_that_torch_wrote(trained):
    folder = trained / "run" / "iter_0000004"
    entries = read_manifest(folder)
    places = [(info.relative_path, info.offset) for info in read_metadata(folder).storage_data.values()]
    assert {(name, start) for name in ("__0_0.distcp", "__1_0.distcp") for start in parts(entries[name])} == set(places)
