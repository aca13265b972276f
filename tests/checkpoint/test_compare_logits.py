"""The check before "done": our model agrees with transformers, and each kind of wrong conversion is caught."""

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_llama3.checkpoint.compare_logits import compare_sides, our_logits, side_logits
from megatron_llama3.checkpoint.huggingface import open_hf
from megatron_llama3.checkpoint.lazy_tensor import from_tensor
from megatron_llama3.config.errors import UserError


@pytest.mark.parametrize("fields", [{}, {"tied": True}, {"scaled": True}, {"num_key_value_heads": 6}, {"head_dim": 16}])
def test_our_model_agrees_with_transformers(make_hf, fields):
    folder = make_hf(**fields)
    source = open_hf(folder)
    theirs, reader = side_logits("hf", folder, source, None)
    ours, other = side_logits("native", folder, source, None)
    assert (reader, other) == ("transformers", "our model")
    assert compare_sides(theirs, ours) < 1e-5


def test_weights_are_rounded_before_the_comparison(make_hf):
    folder = make_hf()
    source = open_hf(folder)
    theirs, _ = side_logits("hf", folder, source, torch.bfloat16)
    ours, _ = side_logits("native", folder, source, torch.bfloat16)
    exact, _ = side_logits("native", folder, source, None)
    assert compare_sides(theirs, ours) < 1e-5
    with pytest.raises(UserError, match="differ by"):
        compare_sides(exact, ours)


@pytest.mark.parametrize("fault", ["unpermuted rows", "swapped gate and up", "no rope scaling", "other norm epsilon", "not a number"])
def test_faults_are_caught(make_hf, fault):
    folder = make_hf(scaled={"original_max_position_embeddings": 16})
    source = open_hf(folder)
    weights, model = dict(source.weights), replace(source.model)
    if fault == "unpermuted rows":
        name = "layers.1.attention.wk.weight"
        weights[name] = from_tensor(weights[name].read().roll(1, 0))
    elif fault == "swapped gate and up":
        one, other = "layers.2.feed_forward.w1.weight", "layers.2.feed_forward.w3.weight"
        weights[one], weights[other] = weights[other], weights[one]
    elif fault == "no rope scaling":
        model.use_rope_scaling = False
    elif fault == "other norm epsilon":
        model.norm_epsilon = 1e-2
    else:
        weights["norm.weight"] = from_tensor(torch.full((48,), float("nan")))
    tokens = torch.randint(99, (64,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="the logits of the two sides differ"):
        compare_sides(our_logits(source, tokens), our_logits(replace(source, weights=weights, model=model), tokens))


@pytest.mark.parametrize("change", [{"eos_token_id": "x"}, {"eos_token_id": [[1]]}, {"use_cache": "x"}, {"rope_parameters": 0}])
def test_what_transformers_does_not_read_is_a_user_error(make_hf, tmp_path, change):
    """Our model has no use for these fields."""
    folder = shutil.copytree(make_hf(), tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with contextlib.suppress(UserError):  # or it is read
        side_logits("hf", folder, open_hf(folder), None)


@pytest.mark.parametrize("name", ["org/kernel", "kernels-community/flash-attn:forward", "/tmp/x", 3, ["sdpa"]])
def test_attention_from_elsewhere_is_refused(make_hf, tmp_path, name):
    folder = shutil.copytree(make_hf(), tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_attn_implementation": name}))
    with pytest.raises(UserError, match=r"config.json: _attn_implementation is .* asks for code from elsewhere"):
        open_hf(folder)
