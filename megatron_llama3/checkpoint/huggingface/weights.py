"""Hugging Face folders in and out: `config.json`, sharded safetensors, tokenizer files.

source = open_hf("Llama-3.1-8B")                    # weights under our names, still on disk
export_hf("checkpoints/run", "exported", tokenizer="tokenizer.model")
"""

import json
from pathlib import Path

import torch

from megatron_llama3.checkpoint.files.foreign_config import read_json
from megatron_llama3.checkpoint.files.publish import publish_folder, write_in_parallel
from megatron_llama3.checkpoint.files.safetensors_file import read_safetensors, writing_tasks
from megatron_llama3.checkpoint.huggingface.config import config_from_hf, config_to_hf
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, WeightSource, cast, equal
from megatron_llama3.checkpoint.names import check_weights, to_halves, to_hf_name, to_pairs, weight_shapes
from megatron_llama3.checkpoint.native import open_native
from megatron_llama3.checkpoint.tokenizer_files import TOKEN_IDS, tokenizer_assets, with_tokenizer, write_tokenizer
from megatron_llama3.config.errors import UserError

SHARD_BYTES = 5_000_000_000


def open_hf(folder: str | Path) -> WeightSource:
    """The model in a Hugging Face folder: config, weights under our names in our row order, tokenizer files.

    Raises UserError for another architecture, a missing or truncated file, or weights that do not fit the config.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    model = config_from_hf(config, folder / "config.json")
    tensors = _tensors(folder)
    head = None if model.untie_embeddings_and_output_weights else tensors.pop("lm_head.weight", None)
    embedding = tensors.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not equal(head, embedding):
        raise UserError(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight")
    shapes = weight_shapes(model, len(tensors), folder)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_weights(found, {to_hf_name(name): shape for name, shape in shapes.items()}, folder)
    weights = {name: to_pairs(name, tensors[to_hf_name(name)], model) for name in shapes}
    generation = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    if (folder / "generation_config.json").is_file():
        generation |= read_json(folder / "generation_config.json")
    return WeightSource(model, weights, tokenizer_assets(folder), generation)


def write_hf(source: WeightSource, folder: Path, dtype: torch.dtype | None = None, workers: int | None = None) -> None:
    """Writes the whole folder in place: config.json, generation_config.json, safetensors with their index, tokenizer files."""
    generation = write_tokenizer(source, folder, "huggingface")
    weights = {to_hf_name(name): cast(to_halves(name, tensor, source.model), dtype) for name, tensor in source.weights.items()}
    config = config_to_hf(source.model, str(dtype or source.dtype).removeprefix("torch."), generation)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    shards = _shards(weights)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {name: file for file, shard in zip(files, shards) for name in shard}
        size = sum(tensor.nbytes for tensor in weights.values())
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    write_in_parallel([task for file, shard in zip(files, shards) for task in writing_tasks(folder / file, shard)], workers)


def export_hf(
    checkpoint: str | Path | WeightSource,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes a native checkpoint (or any source) as a Hugging Face folder, aside and then renamed; `dtype` None keeps the stored one.

    `tokenizer` is a tokenizer.model, a tokenizer.json or a folder with one; without it the files kept in the checkpoint are used, if any.
    """
    source = checkpoint if isinstance(checkpoint, WeightSource) else open_native(checkpoint)
    source = with_tokenizer(source, tokenizer, chat_template)
    with publish_folder(Path(folder), source.nbytes(dtype)) as aside:
        write_hf(source, aside, dtype)


def _tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of the folder, from its single file or by its index."""
    index_file = folder / "model.safetensors.index.json"
    if not index_file.is_file():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "model.safetensors").is_file() and "model.safetensors" not in (read_json(index_file).get("weight_map") or {}).values():
        raise UserError(f"{folder}: model.safetensors lies beside {index_file.name}, which does not name it: remove one of the two")
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
        raise UserError(f"{index_file}: no weight_map from weight names to files of the same folder")
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(set(weight_map.values())):
        found = read_safetensors(folder / file)
        astray = sorted(name for name in found if weight_map.get(name) != file)
        if astray:
            place = f"places it in {weight_map[astray[0]]}" if astray[0] in weight_map else "does not name it"
            raise UserError(f"{folder / file}: {astray[0]} lies in it, but {index_file.name} {place}: which copy counts?")
        tensors |= found
    missing = sorted(name for name in weight_map if name not in tensors and not name.endswith("rotary_emb.inv_freq"))
    if missing:
        raise UserError(f"{folder / weight_map[missing[0]]}: {missing[0]} is not in the file that the index names")
    return tensors


def _shards(weights: dict[str, LazyTensor]) -> list[dict[str, LazyTensor]]:
    """Consecutive weights in files of at most SHARD_BYTES (one weight a file where it is larger)."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
