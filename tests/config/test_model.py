"""Named sizes."""

import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.config.presets import PRESETS, preset, preset_name


def test_rope_scaling_of_the_presets():
    for name in PRESETS:
        model = preset(name)
        assert model.use_rope_scaling == name.startswith(("llama3.1", "llama3.2")), name
        assert model.max_position_embeddings == (131_072 if model.use_rope_scaling else 8192), name
        assert model.rope_scaling_factor == (32.0 if name.startswith("llama3.2") else 8.0), name


def test_presets_are_fresh_objects():
    preset("tiny").num_layers = 99
    assert preset("tiny").num_layers != 99


def test_unknown_preset():
    with pytest.raises(UserError, match=r"gpt-4.*llama3-8b"):
        preset("gpt-4")
    assert preset_name(ModelConfig(num_layers=77)) is None
