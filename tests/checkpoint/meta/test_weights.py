"""Meta's format: round trips through every number of shards, duplicated KV heads, torch and Meta's own code as oracles, refusals."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.meta import open_meta, write_meta
from megatron_llama3.checkpoint.meta.params import config_from_meta, config_to_meta, ffn_size
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.presets import PRESETS, preset
from megatron_llama3.model.sharding import weight_table

MODEL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=16, num_query_groups=4, vocab_size=96, use_rope_scaling=True,
    max_position_embeddings=131_072,
)  # fmt: skip


def random_source(model=MODEL, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(spec.shape, generator=generator).to(dtype) for name, spec in weight_table(model).items()}
    return WeightSource(model, {name: from_tensor(tensor) for name, tensor in weights.items()})


def assert_same(a, b):
    assert a.model == b.model
    assert a.weights.keys() == b.weights.keys()
    for name, tensor in a.weights.items():
        assert tensor.dtype == b.weights[name].dtype
        assert torch.equal(tensor.read(), b.weights[name].read()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, shards, dtype, tied):
    """With 8 and 16 shards the four KV heads are duplicated."""
    source = random_source(dataclasses.replace(MODEL, untie_embeddings_and_output_weights=not tied), dtype)
    write_meta(source, tmp_path, shards)
    assert len(list(tmp_path.glob("consolidated.*.pth"))) == shards
    assert_same(open_meta(tmp_path), source)


def test_blocks_of_shards_agree_with_the_whole(tmp_path, monkeypatch):
    write_meta(random_source(), tmp_path, 8)
    monkeypatch.setattr("megatron_llama3.checkpoint.lazy_tensor.BLOCK_BYTES", 300)
    for tensor in open_meta(tmp_path).weights.values():
        assert torch.equal(torch.cat(list(tensor.blocks())), tensor.read())


def test_heads_counted_once_but_stored_for_every_shard(tmp_path):
    write_meta(random_source(), tmp_path, 16)
    params = json.loads((tmp_path / "params.json").read_text())
    assert params["n_kv_heads"] == 16
    (tmp_path / "params.json").write_text(json.dumps(params | {"n_kv_heads": 4}))
    assert_same(open_meta(tmp_path), random_source())


def test_duplicated_heads_that_differ_are_refused(tmp_path):
    write_meta(random_source(), tmp_path, 16)
    path = tmp_path / "consolidated.05.pth"
    shard = torch.load(path, weights_only=True)
    shard["layers.1.attention.wv.weight"][0, 0] += 1
    torch.save(shard, path)
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wv\.weight: copies that should be equal differ"):
        [tensor.read() for tensor in open_meta(tmp_path).weights.values()]


def test_norms_that_differ_are_refused(tmp_path):
    write_meta(random_source(), tmp_path, 2)
    shard = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    shard["norm.weight"][3] += 1
    torch.save(shard, tmp_path / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"norm\.weight: copies"):
        open_meta(tmp_path).weights["norm.weight"].read()


def test_metas_own_code_gives_the_same_logits(tmp_path, make_hf, hf_logits):
    """Hugging Face's model -> Meta's files -> the reference model of llama-models (fairscale, one process)."""
    reference = pytest.importorskip("llama_models.llama3.model")
    from llama_models.llama3.args import ModelArgs

    original_length = {"original_max_position_embeddings": 8192}  # a constant in the reference
    folder = make_hf(hidden_size=64, num_attention_heads=8, intermediate_size=192, scaled=original_length, max_position_embeddings=16384)
    write_meta(open_hf(folder), tmp_path)
    args = ModelArgs(max_seq_len=128, max_batch_size=2, **json.loads((tmp_path / "params.json").read_text()))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    from fairscale.nn.model_parallel import initialize

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    initialize.initialize_model_parallel(1)
    try:
        model = reference.Transformer(args)
        model.load_state_dict(torch.load(tmp_path / "consolidated.00.pth", weights_only=True), strict=True)
        tokens = torch.randint(99, (2, 100), generator=torch.Generator().manual_seed(1))
        logits = model(tokens, 0)
    finally:
        initialize.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    expected = hf_logits(folder)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "consolidated.01.pth").unlink(), r"consolidated\.01\.pth is missing, consolidated\.03\.pth is there"),
        (lambda f: (f / "consolidated.03.pth").unlink(), "with 3 shards: vocab_size is 96, the embedding has 72 rows"),
        (lambda f: (f / "params.json").unlink(), r"params\.json: the file is missing"),
        (lambda f: (f / "consolidated.02.pth").write_bytes((f / "consolidated.02.pth").read_bytes()[:-9]), r"02\.pth: truncated"),
        (lambda f: torch.save({"a": os.system}, f / "consolidated.02.pth"), r"02\.pth: refused to unpickle: it asks for posix\.system"),
        (lambda f: torch.save({"a": torch.ones(2)}, f / "consolidated.02.pth"), "is not in both"),
        (lambda f: torch.save({3: torch.ones(2)}, f / "consolidated.02.pth"), "not a dict of tensors by name"),
        (lambda f: (f / "params.json").write_text("[]"), r"params\.json: a JSON object is expected"),
        (lambda f: torch.save([torch.ones(2)], f / "consolidated.02.pth"), "not a dict of tensors"),
        (lambda f: [file.unlink() for file in f.glob("*.pth")], r"no consolidated\.NN\.pth"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    write_meta(random_source(), tmp_path, 4)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_meta(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"vocab_size": 97}, "vocab_size is 97, the embedding has 96 rows"),
        ({"n_heads": 2**31}, "n_heads 2147483648 does not divide dim"),
        ({"multiple_of": 4096}, "make the feed-forward 4096 wide, the weights have 160"),
        ({"vision_num_cross_attention_layers": 8}, "unknown field vision_num_cross_attention_layers = 8"),
        ({"n_layers": 3}, r"layers\.2\.attention_norm\.weight \[64\] is missing"),
        ({"n_heads": 12}, "n_heads 12 does not divide dim 64"),
        ({"n_heads": 8}, "has shape"),
        ({"rope_theta": 10.5}, "no whole number"),
        ({"dim": "64"}, "dim is '64', no whole number above 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3'"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, no true or false"),
    ],
)
def test_params_that_do_not_fit(tmp_path, change, message):
    write_meta(random_source(), tmp_path, 1)
    params = json.loads((tmp_path / "params.json").read_text()) | change
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(UserError, match=message):
        open_meta(tmp_path)


@pytest.mark.parametrize(("shards", "message"), [(3, "does not divide the 16 query heads"), (64, "64 does not"), (0, "at least 1")])
def test_shards_that_do_not_divide(tmp_path, shards, message):
    with pytest.raises(UserError, match=message):
        write_meta(random_source(), tmp_path, shards)


def test_every_field_of_model_config_survives():
    from tests.checkpoint.huggingface.test_config import UNUSUAL

    model = dataclasses.replace(UNUSUAL, kv_channels=None, qk_layernorm=False)
    read = config_from_meta(config_to_meta(model, 1), model.vocab_size, model.ffn_hidden_size, True, "params.json")
    assert read == model
    with pytest.raises(UserError, match="no head width of its own"):
        config_to_meta(UNUSUAL, 1)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("llama3")])
def test_presets_have_the_released_numbers(name):
    """The feed-forward rule gives Meta's own pair back for the released sizes."""
    model = preset(name)
    params = config_to_meta(model, 1)
    released = {"8b": (1.3, 1024), "70b": (1.3, 4096), "405b": (1.2, 4096), "1b": (1.5, 256), "3b": (1.0, 256)}
    assert (params["ffn_dim_multiplier"], params["multiple_of"]) == released[name.split("-")[-1]]
    assert ffn_size(model.hidden_size, params["ffn_dim_multiplier"], params["multiple_of"]) == model.ffn_hidden_size


@pytest.mark.parametrize(("hidden", "width"), [(64, 160), (576, 1536), (96, 161), (100, 1), (256, 768), (64, 4096 * 3)])
def test_any_feed_forward_width_can_be_said(hidden, width):
    params = config_to_meta(ModelConfig(hidden_size=hidden, ffn_hidden_size=width, num_attention_heads=4), 1)
    assert ffn_size(hidden, params["ffn_dim_multiplier"], params["multiple_of"]) == width


def test_copy_of_a_folder_is_independent(tmp_path):
    """Nothing in the folder names a path."""
    (tmp_path / "a").mkdir()
    write_meta(random_source(), tmp_path / "a", 2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert_same(open_meta(tmp_path / "b"), random_source())
