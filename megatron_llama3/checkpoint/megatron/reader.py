"""Megatron-LM's distributed checkpoints read tensor by tensor, without megatron-core and without running code of their pickles.

SAVE/latest_checkpointed_iteration.txt      "500", or "release"
SAVE/iter_0000500/common.pt                 iteration, arguments, what of the optimizer is no tensor
SAVE/iter_0000500/.metadata, *.distcp       torch.distributed.checkpoint's files
"""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_llama3.checkpoint.files.foreign_config import read_json
from megatron_llama3.checkpoint.files.torch_archive import read_archive
from megatron_llama3.checkpoint.lazy_tensor import LazyTensor, OptimizerState, WeightSource, map_file, narrow
from megatron_llama3.checkpoint.megatron.config import config_from_megatron, run_from_megatron
from megatron_llama3.checkpoint.megatron.names import LAYER_KEY, OUTER, split_layer
from megatron_llama3.checkpoint.names import check_weights, weight_shapes
from megatron_llama3.checkpoint.native.folder import LATEST_FILE
from megatron_llama3.checkpoint.native.metadata import StoredTensor, check_cover, read_metadata, tensors_in
from megatron_llama3.checkpoint.native.weights import open_chunks
from megatron_llama3.checkpoint.tokenizer_files import tokenizer_assets
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig

COMMON_FILE, FORMAT_FILE, GENERATION_FILE = "common.pt", "metadata.json", "generation_config.json"
OPTIMIZER, STATE = ("optimizer.", "chained_"), "optimizer.state."
RESHARDABLE = "save it in Megatron-LM with --dist-ckpt-optim-fully-reshardable"


class Arguments:
    """argparse.Namespace as a pickle fills it."""


def open_megatron(path: str | Path, vocab_size: int | None = None, with_optimizer: bool = False) -> WeightSource:
    """The model in a Megatron-LM folder, and Adam's state `with_optimizer`; the weights are then its main ones.

    `vocab_size` is the true one where the arguments do not say it: rows behind it are padding and are left out. Raises UserError for
    another format, another architecture, a missing or truncated file, and a form of the optimizer that only its own layout can read.
    """
    folder = resolve_megatron(path)
    common = read_common(folder)
    arguments = vars(common["args"]) if isinstance(common.get("args"), Arguments) else None
    if arguments is None:
        raise UserError(
            f"{folder / COMMON_FILE}: holds no args, which say what model it is: save it with Megatron-LM's own training script"
        )
    stored = stored_by_layer(folder)
    embedding = stored.get(OUTER["tok_embeddings.weight"])
    if embedding is None:
        raise UserError(f"{folder}: {OUTER['tok_embeddings.weight']} is missing: not a language model of Megatron-LM")
    rows = vocab_size or arguments.get("vocab_size") or embedding.shape[0]
    if type(rows) is not int or not 0 < rows <= embedding.shape[0]:
        raise UserError(f"{folder}: a vocabulary of {rows!r} was asked for, the embedding has {embedding.shape[0]} rows")
    where = folder / COMMON_FILE
    model = config_from_megatron(arguments, rows, where)
    model_tensors = {key: tensor for key, tensor in stored.items() if not key.startswith(OPTIMIZER)}
    shapes = weight_shapes(model, len(model_tensors), where)
    generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).is_file() else {}
    source = WeightSource(model, _weights(model_tensors, model, shapes, folder), tokenizer_assets(folder), generation)
    return replace(source, **_with_optimizer(common, arguments, stored, model, shapes, folder)) if with_optimizer else source


def resolve_megatron(path: str | Path) -> Path:
    """The folder of one checkpoint: `path` itself, or the one that latest_checkpointed_iteration.txt names. Raises UserError for another
    format than torch_dist."""
    folder = Path(path)
    latest = folder / LATEST_FILE
    if latest.is_file():
        text = latest.read_text(errors="replace").strip()
        if text != "release" and not re.fullmatch(r"\d{1,15}", text):
            raise UserError(f"{latest}: {text[:40]!r} is neither an iteration number nor 'release'")
        folder = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not (folder / FORMAT_FILE).is_file():
        hint = "; a --ckpt-format torch checkpoint is loaded and saved by Megatron-LM with --ckpt-convert-format torch_dist"
        raise UserError(f"{folder}: {FORMAT_FILE} is missing, so it is no distributed checkpoint of Megatron-LM{hint}")
    backend = read_json(folder / FORMAT_FILE).get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(f"{folder / FORMAT_FILE}: sharded_backend is {backend!r}: only 'torch_dist' can be read (--ckpt-format)")
    return folder


def read_common(folder: Path) -> dict:
    """common.pt: what it holds of plain values, lists and dicts, `args` as Arguments, tensors as LazyTensor, and Opaque for the rest."""
    path = folder / COMMON_FILE
    if not path.is_file():
        raise UserError(f"{path}: the file is missing")
    content = read_archive(map_file(path), path, others={("argparse", "Namespace"): Arguments})
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the dict that Megatron-LM saves")
    return content


def stored_by_layer(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by its key, those that hold all layers as one for each; chunks are checked to cover them."""
    found = {}
    for key, tensor in tensors_in(read_metadata(folder, others_opaque=True), folder).items():
        state, name = re.fullmatch(rf"({re.escape(STATE)}[a-z0-9_]+\.)?(.*)", key, re.DOTALL).groups(default="")
        layer = LAYER_KEY.fullmatch(name)
        if layer is None or layer[1] is not None:
            found[key] = tensor
            continue
        for number, part in enumerate(_unstacked(key, tensor, folder)):
            found[f"{state}decoder.layers.{number}.{layer[2]}"] = part
    for key, tensor in found.items():
        check_cover(key, tensor, folder)
    return found


def extra_states(folder: Path) -> int:
    """How many entries of Transformer Engine (FP8 scales) it holds, which are no part of a model here."""
    entries = read_metadata(folder, others_opaque=True).state_dict_metadata
    return sum(isinstance(entry, BytesStorageMetadata) and "._extra_state" in key for key, entry in entries.items())


def _unstacked(key: str, tensor: StoredTensor, folder: Path) -> list[StoredTensor]:
    layers: dict[int, list] = defaultdict(list)
    for chunk in tensor.chunks:
        if chunk.sizes[:1] != (1,):
            raise UserError(f"{folder}: a chunk of {key} holds {chunk.sizes[:1]} layers; Megatron-LM writes each layer as its own")
        layers[chunk.offsets[0]].append(replace(chunk, offsets=chunk.offsets[1:], sizes=chunk.sizes[1:], stored_sizes=chunk.sizes))
    if sorted(layers) != list(range(tensor.shape[0])):
        raise UserError(f"{folder}: the chunks of {key} do not cover its shape {list(tensor.shape)}")
    return [StoredTensor(tensor.dtype, tensor.shape[1:], layers[number]) for number in range(tensor.shape[0])]


def _weights(
    stored: dict[str, StoredTensor], model: ModelConfig, shapes: dict[str, tuple[int, ...]], folder: Path
) -> dict[str, LazyTensor]:
    """By our names, in our row order, without padding of the vocabulary. Raises UserError unless they are those of `shapes`."""
    layers: dict[int, dict[str, LazyTensor]] = defaultdict(dict)
    ours = {}
    names = {key: name for name, key in OUTER.items()}
    for key, tensor in open_chunks(stored).items():
        layer = LAYER_KEY.fullmatch(key)
        if layer is not None:
            layers[int(layer[1])][layer[2]] = tensor
        else:
            ours[names.get(key, key)] = tensor
    for name in ("tok_embeddings.weight", "output.weight"):
        if name in ours and len(ours[name].shape) == 2 and ours[name].shape[0] > model.vocab_size:
            ours[name] = narrow(ours[name], 0, 0, model.vocab_size)
    for number, layer in layers.items():
        ours |= {f"layers.{number}.{name}": tensor for name, tensor in split_layer(layer, model).items()}
    check_weights({name: tensor.shape for name, tensor in ours.items()}, shapes, folder)
    return {name: ours[name] for name in shapes}


@dataclass(frozen=True)
class _Progress:
    """Whole numbers of common.pt."""

    step: int
    iteration: int
    consumed_samples: int


def _with_optimizer(common: dict, arguments: dict, stored: dict[str, StoredTensor], model: ModelConfig, shapes: dict, folder: Path) -> dict:
    """What of a WeightSource comes from Adam's state: `optimizer`, and the main weights where it holds them."""
    kinds: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for key, tensor in stored.items():
        if key.startswith(STATE):
            kind, _, name = key.removeprefix(STATE).partition(".")
            kinds[kind][name] = tensor
    if not kinds:
        if any(key.startswith(OPTIMIZER) for key in stored):
            raise UserError(f"{folder}: its optimizer state is cut as one layout needs it: {RESHARDABLE}")
        raise UserError(f"{folder}: holds no optimizer state (--no-save-optim): convert it without --with-optimizer")
    moments = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        if kind not in kinds:
            raise UserError(f"{folder}: {STATE}{kind} is missing: not Adam's state")
        moments[kind] = _weights(kinds[kind], model, shapes, folder)
    progress = _progress(common, arguments, folder / COMMON_FILE)
    length = arguments.get("seq_length") if type(arguments.get("seq_length")) is int else 0
    run = run_from_megatron(arguments, model)
    state = OptimizerState(**moments, **vars(progress), consumed_tokens=progress.consumed_samples * length, run=run)
    main = kinds.get("param") or kinds.get("fp32_param")  # none where the model itself is fp32
    return {"optimizer": state} | ({"weights": _weights(main, model, shapes, folder)} if main else {})


def _progress(common: dict, arguments: dict, where: Path) -> _Progress:
    optimizer = common.get("optimizer")
    groups = _inside(optimizer, "optimizer", "param_groups") or _inside(optimizer, "param_groups") or []
    steps = [group.get("step") for group in groups if isinstance(group, dict)]
    steps += [_inside(optimizer, "optimizer", "state", "common_step"), _inside(optimizer, "state", "common_step")]
    values = [_whole(step) for step in steps if step is not None]
    iteration = _whole(common.get("iteration"))
    samples = _whole(arguments.get("consumed_train_samples", 0))
    if not values or None in values or iteration is None or samples is None:
        raise UserError(f"{where}: it does not say the optimizer's step, the iteration and the samples consumed as whole numbers")
    return _Progress(max(values), iteration, samples)


def _inside(value: object, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _whole(value: object) -> int | None:
    if isinstance(value, LazyTensor) and value.shape == ():
        value = value.rows(0, 1).reshape(()).item()
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 and value == int(value) else None
