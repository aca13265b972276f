"""GGUF files as input, dequantised block by block to float32 with the `gguf` package.

llama.cpp rotates adjacent pairs, as Meta does, so the rows of wq and wk are in our order already.
"""

from pathlib import Path

import numpy as np
import torch

from megatron_llama3.checkpoint.files.foreign_config import as_field
from megatron_llama3.checkpoint.gguf.header import check_header
from megatron_llama3.checkpoint.gguf.tokenizer import tokenizer_from_gguf
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource
from megatron_llama3.checkpoint.names import check_weights, to_gguf_name, weight_shapes
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.rope import rotary_frequencies

_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, stored as one divisor a frequency
_FIELDS = {  # the file's key, behind "llama." -> ours
    "block_count": "num_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "ffn_hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_query_groups",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "norm_epsilon",
}
_READ_ELSEWHERE = {"vocab_size", "rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length"}


def open_gguf(path: str | Path) -> WeightSource:
    """The model in a .gguf file (or in a folder with one): config, dequantised float32 weights under our names, tokenizer.

    Raises UserError for another architecture, an unknown field, a damaged file, or weights that do not fit the config.
    """
    path = gguf_file(Path(path))
    fields, stored = _contents(path)
    model = _config(fields, stored, path)
    shapes = weight_shapes(model, len(stored), path)
    found = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in stored.items() if name != _ROPE_FACTORS}
    check_weights(found, {to_gguf_name(name): shape for name, shape in shapes.items()}, path)
    weights = {name: _lazy(stored[to_gguf_name(name)], shape, path) for name, shape in shapes.items()}
    try:
        assets, generation = tokenizer_from_gguf(fields)
    except (IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the tokenizer in it is damaged ({type(error).__name__}: {error})") from None
    return WeightSource(model, weights, assets, generation, fields.get("tokenizer.chat_template"))


def gguf_file(path: Path) -> Path:
    """The file itself, or the one .gguf file in a folder. Raises UserError."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{path}: {len(files)} .gguf files in this folder; name one (split files: merge them with llama-gguf-split first)")
    return files[0]


def _contents(path: Path) -> tuple[dict, dict]:
    """(values by key, the gguf package's tensors by name)."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("reading GGUF needs the gguf package: pip install gguf") from None
    check_header(path)
    try:
        reader = GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f"{path}: truncated, or not a GGUF file ({error})") from None


def _config(fields: dict, stored: dict, path: Path) -> ModelConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r} is not 'llama'")
    ours = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    for key, value in ours.items():
        if key not in _FIELDS and key not in _READ_ELSEWHERE and value not in (0, 0.0, False, "none"):
            raise UserError(f"{path}: unknown field llama.{key} = {value!r}, which may change the numbers of the model")
    ours.setdefault("attention.head_count_kv", ours.get("attention.head_count"))
    missing = [key for key in _FIELDS if ours.get(key) is None]
    if missing or to_gguf_name("tok_embeddings.weight") not in stored:
        raise UserError(f"{path}: {'the field llama.' + missing[0] if missing else 'the embedding'} is missing")
    head_dim = ours.get("attention.key_length", ours.get("rope.dimension_count"))
    values = {name: as_field(name, ours[key], f"llama.{key}", path) for key, name in _FIELDS.items()}
    values["norm_epsilon"] = float(str(np.float32(values["norm_epsilon"])))  # 9.999999747378752e-06 was written as 1e-05
    model = ModelConfig(
        **values,
        vocab_size=int(stored[to_gguf_name("tok_embeddings.weight")].shape[1]),
        rotary_base=as_field("rotary_base", ours.get("rope.freq_base", 10_000), "llama.rope.freq_base", path),
        untie_embeddings_and_output_weights=to_gguf_name("output.weight") in stored,
    )
    if head_dim not in (None, model.head_dim):
        model.kv_channels = int(head_dim)
    for key in ("rope.dimension_count", "attention.value_length"):
        if ours.get(key, model.head_dim) != model.head_dim:
            raise UserError(f"{path}: llama.{key} is {ours[key]}, the width of a head {model.head_dim}")
    if ours.get("vocab_size", model.vocab_size) != model.vocab_size:
        raise UserError(f"{path}: llama.vocab_size is {ours['vocab_size']}, the embedding has {model.vocab_size} rows")
    return _with_rope_scaling(model, stored, path)


def _with_rope_scaling(model: ModelConfig, stored: dict, path: Path) -> ModelConfig:
    """The scaling whose divisors the file stores: Llama 3.1's constants with the factor that the longest wavelength shows."""
    if _ROPE_FACTORS not in stored:
        return model
    divisors = torch.from_numpy(np.array(stored[_ROPE_FACTORS].data, dtype=np.float32))
    plain = rotary_frequencies(model)
    model.use_rope_scaling, model.rope_scaling_factor = True, float(divisors.max())
    expected = plain / rotary_frequencies(model)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{path}: {_ROPE_FACTORS} is not Llama 3.1's scaling (low 1, high 4, original length 8192) by any factor")
    return model


def _lazy(tensor, shape: tuple[int, ...], path: Path) -> LazyTensor:
    """Rows are quantised one by one, so any block of rows can be dequantised alone."""
    from gguf.quants import dequantize

    def rows(start: int, stop: int) -> torch.Tensor:
        try:
            values = dequantize(tensor.data[start:stop], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {tensor.name} is of type {kind}, which the gguf package cannot dequantise") from None
        return torch.from_numpy(np.ascontiguousarray(values)).view(stop - start, *shape[1:])

    return LazyTensor(shape, torch.float32, rows)
