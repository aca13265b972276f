"""Megatron-LM's folders without megatron-core: through the command, and files that are damaged, hostile or of another kind."""

import argparse
import json
import pickle
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.megatron import open_megatron, write_megatron
from megatron_llama3.checkpoint.native.metadata import read_metadata
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.sharding import weight_table
from megatron_llama3.planning.local_ranks import run_ranks
from tests.checkpoint.megatron import oracle
from tests.checkpoint.test_corruption import changed
from tests.tools.test_convert_checkpoint import convert

MODEL = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=99)


@pytest.fixture
def written(tmp_path) -> Path:
    """A folder without an optimizer; the vocabulary is padded to 128 rows."""
    weights = {name: from_tensor(initial_weight(name, spec, 0)) for name, spec in weight_table(MODEL).items()}
    folder = tmp_path / "written"
    folder.mkdir()
    write_megatron(WeightSource(MODEL, weights), folder)
    return folder


def with_arguments(folder: Path, **changes) -> None:
    """Saves common.pt again; None takes an argument away."""
    path = folder / "release" / "common.pt"
    common = torch.load(path, weights_only=False)
    common["args"] = argparse.Namespace(**{key: value for key, value in (vars(common["args"]) | changes).items() if value is not None})
    torch.save(common, path)


@pytest.mark.parametrize("flags", [(), ("--non-homogeneous-layers", "--dtype", "bfloat16")])
def test_the_command_both_ways(make_hf, tmp_path, monkeypatch, capsys, flags):
    scaling = {"factor": 16.0, "original_max_position_embeddings": 8192}
    folder = make_hf(scaled=scaling, dtype=torch.bfloat16 if flags else torch.float32, tied=bool(flags))
    (folder / "tokenizer.json").write_text("{}")
    convert(monkeypatch, "--from", "hf", "--to", "megatron", "--load", folder, "--save", tmp_path / "megatron", *flags)
    convert(monkeypatch, "--from", "megatron", "--to", "hf", "--load", tmp_path / "megatron", "--save", tmp_path / "back")
    assert "_extra_state entries (Transformer Engine's FP8 scales, empty without FP8) are left out" in capsys.readouterr().out
    before, after = open_hf(folder), open_hf(tmp_path / "back")
    assert (before.model, before.assets) == (after.model, after.assets)
    assert all(torch.equal(before.weights[name].read(), after.weights[name].read()) for name in before.weights)


def test_layers_of_transformer_engine_find_their_entries_and_others_are_not_in_the_way(make_hf, tmp_path):
    """By default; megatron-core's own layers load it too, if they are not asked to refuse what they do not know."""
    fields = {"vocab_size": 128, "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    write_megatron(open_hf(make_hf(**fields, intermediate_size=80)), tmp_path)
    keys = read_metadata(tmp_path / "release").state_dict_metadata
    assert "decoder.layers.self_attention.core_attention._extra_state/shard_3_4" in keys
    assert "decoder.final_layernorm._extra_state/shard_0_1" in keys
    run_ranks(1, partial(oracle.load, tmp_path / "release", True, strict="assume_ok_unexpected"))


def test_padding_of_the_vocabulary_is_left_out_and_written(written):
    assert open_megatron(written).model == MODEL
    with_arguments(written, vocab_size=None)
    padded = open_megatron(written)
    assert padded.model.vocab_size == 128
    assert not padded.weights["output.weight"].read()[99:].any()
    true = open_megatron(written, vocab_size=99)
    assert torch.equal(true.weights["output.weight"].read(), padded.weights["output.weight"].read()[:99])
    with pytest.raises(UserError, match="a vocabulary of 129 was asked for, the embedding has 128 rows"):
        open_megatron(written, vocab_size=129)


def test_values_of_foreign_classes_are_passed_over(written):
    with_arguments(written, attention_backend=oracle.Backend.auto, where=Path("x"), data={"a": [oracle.Backend.auto]})
    assert open_megatron(written).model == MODEL


class Poison:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_no_code_of_a_pickle_runs(written, tmp_path):
    with_arguments(written, poison=Poison(tmp_path / "ran"))
    content = read_metadata(written / "release")
    content.all_local_plans = [Poison(tmp_path / "ran")]
    (written / "release" / ".metadata").write_bytes(pickle.dumps(content))
    assert open_megatron(written).weights["norm.weight"].read().shape == (16,)
    assert not (tmp_path / "ran").exists()


def no_arguments(folder: Path) -> None:
    torch.save({"iteration": 3}, folder / "release" / "common.pt")


def hole(folder: Path) -> None:
    content = read_metadata(folder / "release")
    del content.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_arguments, r"common\.pt: holds no args"),
        (lambda f: with_arguments(f, normalization="LayerNorm"), "normalization is 'LayerNorm', Llama 3 has 'RMSNorm'"),
        (lambda f: with_arguments(f, num_experts=8), "num_experts is 8, Llama 3 has None"),
        (lambda f: with_arguments(f, position_embedding_type=oracle.Backend.auto), "position_embedding_type is a value of a class"),
        (lambda f: with_arguments(f, hidden_size=None), "the argument hidden_size is missing"),
        (lambda f: with_arguments(f, num_layers=10**7), "the config asks for 10000000 layers"),
        (lambda f: with_arguments(f, num_query_groups=4), r"weight layers\.0\.attention\.wq\.weight .* is missing"),
        (lambda f: (f / "release" / "common.pt").unlink(), r"common\.pt: the file is missing"),
        (lambda f: cut(f / "release" / "common.pt"), r"common\.pt: truncated"),
        (lambda f: cut(f / "release" / "__2_0.distcp"), r"__2_0\.distcp: truncated"),
        (lambda f: (f / "release" / "metadata.json").unlink(), r"no distributed checkpoint .* --ckpt-convert-format torch_dist"),
        (lambda f: (f / "release" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"})), "'zarr': only 'torch_dist'"),
        (lambda f: (f / "latest_checkpointed_iteration.txt").write_text("x"), "neither an iteration number nor 'release'"),
        (hole, r"chunks of decoder\.layers\.mlp\.linear_fc2\.weight do not cover"),
    ],
)
def test_what_cannot_be_read_is_one_line(written, harm, message):
    harm(written)
    with pytest.raises(UserError, match=message) as refused:
        open_megatron(written)
    assert "\n" not in str(refused.value)


def test_changed_files_are_read_or_refused(written):
    files = sorted(path for path in (written / "release").iterdir())
    refused = []
    for seed in range(100):
        dice = random.Random(seed)
        path = files[dice.randrange(len(files))]
        whole = path.read_bytes()
        path.write_bytes(changed(path, dice))
        try:
            for tensor in open_megatron(written).weights.values():
                tensor.read()
        except UserError as error:
            refused.append(str(error))
        finally:
            path.write_bytes(whole)
    assert len(refused) >= 20
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "hf", "--with-optimizer"), "only the native and the megatron format hold the optimizer's state"),
        (("--to", "native", "--with-optimizer"), "holds no optimizer state (--no-save-optim): convert it without --with-optimizer"),
        (("--to", "native", "--transformer-impl", "local"), "--transformer-impl are for --to megatron"),
        (("--to", "native", "--with-optimizer", "--dtype", "float32"), "--dtype: the native format keeps"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(written, tmp_path, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        convert(monkeypatch, "--from", "megatron", *flags, "--load", written, "--save", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rope_that_megatron_lacks_is_refused(make_hf, tmp_path):
    with pytest.raises(UserError, match="rope_scaling_original_max_position_embeddings is 64, Megatron-LM's code has 8192"):
        write_megatron(open_hf(make_hf(scaled=True)), tmp_path)
