"""config.json against ModelConfig: nothing dropped in either direction, unknown models refused."""

import dataclasses

import pytest

from megatron_llama3.checkpoint.huggingface.config import config_from_hf, config_to_hf
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig

# No value is a default, so a field that is not carried shows.
UNUSUAL = ModelConfig(
    num_layers=3, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6, num_query_groups=2, kv_channels=32, vocab_size=777,
    max_position_embeddings=4096, norm_epsilon=3e-6, rotary_base=123_456, use_rope_scaling=True, rope_scaling_factor=32.0,
    rope_scaling_low_freq_factor=2.0, rope_scaling_high_freq_factor=5.0, rope_scaling_original_max_position_embeddings=1024,
    untie_embeddings_and_output_weights=False, qk_layernorm=True, init_method_std=0.01,
)  # fmt: skip


def test_every_field_of_model_config_survives():
    for field in dataclasses.fields(ModelConfig):
        assert getattr(UNUSUAL, field.name) != field.default, f"give {field.name} an unusual value here, and a place in config_to_hf"
    assert config_from_hf(config_to_hf(UNUSUAL)) == UNUSUAL


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_reads_every_field(kind):
    from transformers import CONFIG_MAPPING

    model = dataclasses.replace(UNUSUAL, qk_layernorm=kind == "qwen3")
    written = config_to_hf(model, "float32", {"bos_token_id": 5, "eos_token_id": [6, 7]})
    assert (written["model_type"], config_from_hf(written)) == (kind, model)
    read = CONFIG_MAPPING[kind].from_dict(dict(written))
    for key, value in written.items():
        if key not in ("rope_theta", "rope_scaling", "torch_dtype", "dtype"):
            assert getattr(read, key) == value, key
    assert str(read.dtype) == "torch.float32"


@pytest.mark.parametrize("scaled", [True, False])
def test_either_form_of_rope_is_read(scaled):
    model = dataclasses.replace(UNUSUAL, use_rope_scaling=True) if scaled else ModelConfig(rotary_base=77)
    both = config_to_hf(model)
    newer = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling")}
    older = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert config_from_hf(newer) == config_from_hf(older) == config_from_hf(both) == model


def test_numbers_of_any_json_form_are_exact():
    config = config_to_hf(UNUSUAL) | {"hidden_size": 96.0, "initializer_range": 1}
    assert config_from_hf(config) == dataclasses.replace(UNUSUAL, init_method_std=1.0)
    assert isinstance(config_from_hf(config).hidden_size, int)


def test_defaults_of_older_configs():
    config = config_to_hf(ModelConfig(num_query_groups=8))
    for key in ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings"):
        del config[key]
    model = config_from_hf(config)
    assert model.num_query_groups == 8
    assert model.rotary_base == 10_000
    assert model.untie_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "is not LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification .* is not LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_qk_norm": True}, "unknown field use_qk_norm = True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "of type 'linear'"),
        ({"rope_theta": 1.5, "rope_parameters": None}, "no whole number"),
        ({"rope_theta": 1.0}, "rope_parameters says"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "needs .*low_freq_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "96"}, "hidden_size is '96', no whole number above 0"),
        ({"hidden_size": 96.5}, "hidden_size is 96.5, no whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', no number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', no true or false"),
        ({"architectures": "MistralForCausalLM"}, "MistralForCausalLM .* is not LlamaForCausalLM"),
        ({"rope_parameters": "llama3"}, "rope_parameters is 'llama3', no JSON object"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10, "partial_rotary_factor": 0.5}}, "has .*partial_rotary_factor"),
        ({"rope_parameters": None, "rope_scaling": {"factor": 8.0}}, "rope_scaling of type 'default' has .*factor"),
        ({"model_type": "qwen3"}, "LlamaForCausalLM .model_type 'qwen3'. is not"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
        ({"model_type": "qwen3", "architectures": None, "head_dim": None}, "head_dim is missing"),
        ({"model_type": "qwen3", "architectures": None, "rms_norm_eps": None}, "rms_norm_eps is missing"),
    ],
)
def test_refusals(change, message):
    config = config_to_hf(ModelConfig(rotary_base=10)) | change
    with pytest.raises(UserError, match=message):
        config_from_hf(config)
