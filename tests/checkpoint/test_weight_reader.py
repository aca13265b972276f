"""Hugging Face's weights straight into training: bitwise what conversion and --load --finetune give, under every layout and engine."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.native import write_native
from megatron_llama3.checkpoint.start import find_start, load_start
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.parallel import ParallelConfig
from megatron_llama3.config.run import RunConfig
from megatron_llama3.parallel.groups import initialize_groups
from megatron_llama3.planning.local_ranks import RankFailedError, run_ranks
from megatron_llama3.training.build import build_engine
from megatron_llama3.training.state import TrainState

LAYOUTS = {
    "one": {},
    "tp2_pp2_dp2": {"world_size": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp6": {"world_size": 6, "tensor_model_parallel_size": 6},  # two KV heads, and 99 rows do not divide
    "dp3_cp2": {"world_size": 6, "context_parallel_size": 2},
    "zero1": {"world_size": 4, "pipeline_model_parallel_size": 2, "engine": "deepspeed", "zero_stage": 1},
    "zero3": {"world_size": 4, "tensor_model_parallel_size": 2, "engine": "deepspeed", "zero_stage": 3},
}


def config_for(layout: dict, tied: bool, **checkpoint) -> RunConfig:
    config = RunConfig(parallel=ParallelConfig(**layout))
    config.model = ModelConfig(
        num_layers=4, hidden_size=48, ffn_hidden_size=84, num_attention_heads=6, num_query_groups=2, vocab_size=99,
        max_position_embeddings=512, untie_embeddings_and_output_weights=not tied,
    )  # fmt: skip
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, str(value) if isinstance(value, Path) else value)
    return config


def loaded(config: RunConfig) -> dict[str, torch.Tensor]:
    groups = initialize_groups(config.parallel)
    start = find_start(config, groups)
    engine = build_engine(config, groups)
    assert load_start(start, config, engine, stream=None) == (start, TrainState())
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in engine.state_tensors().items()}


def tensors_under(config: RunConfig) -> dict[str, torch.Tensor]:
    return {key: tensor for held in run_ranks(config.parallel.world_size, loaded, config) for key, tensor in held.items()}


@pytest.mark.parametrize(("layout", "dtype"), [*zip(LAYOUTS, [torch.float32, torch.bfloat16] * 3)])
def test_equals_conversion(make_hf, tmp_path, layout, dtype, monkeypatch):
    monkeypatch.setattr("megatron_llama3.checkpoint.weight_reader.BLOCK_BYTES", 1000)  # several blocks a weight, ending within heads
    tied = layout != "tp6"
    folder = make_hf(dtype=dtype, tied=tied, num_hidden_layers=4, intermediate_size=84, max_shard_size="50KB")
    straight = tensors_under(config_for(LAYOUTS[layout], tied, load_hf=folder))
    write_native(open_hf(folder), tmp_path)
    converted = tensors_under(config_for(LAYOUTS[layout], tied, load=tmp_path, finetune=True))
    source = open_hf(folder)
    assert straight.keys() == converted.keys()
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert straight.keys() == {f"{kind}.{name}" for name in source.weights for kind in kinds}
    for key, tensor in straight.items():
        assert torch.equal(tensor, converted[key]), key
        assert not key.startswith("model.") or torch.equal(tensor, source.weights[key.removeprefix("model.")].read().float()), key
        assert key.startswith("model.") or not tensor.any(), key


def test_each_mismatch_is_a_line_on_every_rank(make_hf):
    config = config_for({"world_size": 2}, tied=False, load_hf=make_hf(scaled=True, intermediate_size=84))
    config.model.num_layers, config.model.norm_epsilon, config.model.kv_channels = 4, 1e-6, 10
    with pytest.raises(RankFailedError) as failed:
        run_ranks(2, loaded, config)
    lines = str(failed.value).partition("UserError: ")[2].splitlines()
    assert [line.split(" in ")[0] for line in lines if line] == [
        "--num-layers is 4 here and 3",
        "--norm-epsilon is 1e-06 here and 1e-05",
        "--use-rope-scaling is False here and True",
        "--rope-scaling-original-max-position-embeddings is 8192 here and 64",
        "--kv-channels is 10 here and 8",
    ]


def test_another_architecture_is_refused(make_hf):
    folder = make_hf()
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("LlamaForCausalLM", "QwenForCausalLM"))
    with pytest.raises(RankFailedError, match="is not LlamaForCausalLM"):
        run_ranks(1, loaded, config_for({}, False, load_hf=folder))
