"""The files that travel with the weights: tokenizer, chat template, generation config."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_llama3.checkpoint.files.foreign_config import read_json
from megatron_llama3.checkpoint.lazy_tensor import WeightSource
from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.llama3 import Tokenizer, TooManyEntriesError, check_vocabulary_size, load_tokenizer
from megatron_llama3.tokenizer.vocabulary_files import write_tiktoken

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # they travel in generation_config.json
_HF_FORM, _META_FORM = "tokenizer.json", "tokenizer.model"


def tokenizer_assets(path: Path) -> dict[str, bytes]:
    """Name and content of the tokenizer files in a folder, or of the one file given. Raises UserError if it is not there."""
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file or folder")
    name = _HF_FORM if path.suffix == ".json" else _META_FORM  # as load_tokenizer tells them apart
    return {name: path.read_bytes()}


def with_tokenizer(source: WeightSource, path: str | Path | None, chat_template: str | None = None) -> WeightSource:
    """The same model with the tokenizer at `path` and the token ids that belong to it; None keeps what the source has."""
    if path is not None:
        config = Path(path) / "generation_config.json"
        kept = {key: value for key, value in source.generation.items() if key not in TOKEN_IDS}
        generation = kept | (read_json(config) if config.is_file() else {})
        source = replace(source, assets=tokenizer_assets(Path(path)), generation=generation)
    return replace(source, chat_template=chat_template or source.chat_template)


def write_tokenizer(source: WeightSource, folder: Path, form: Literal["huggingface", "meta", "any"]) -> dict:
    """Writes the tokenizer files into `folder` and adds the form asked for where Llama 3's tokenizer is there only in the other.

    Returns the generation config: the source's own, else the token ids of the tokenizer.
    """
    files = set(source.assets)
    for name, content in source.assets.items():
        (folder / name).write_bytes(content)
    if source.chat_template:
        (folder / "chat_template.jinja").write_text(source.chat_template)
    _check_size(folder, files, source.model.vocab_size)
    generation = dict(source.generation)
    tokenizer = _llama3_tokenizer(folder, files, required=form == "huggingface" and _HF_FORM not in files)
    if tokenizer is None:
        return generation
    if form == "huggingface" and not {_HF_FORM, "tokenizer_config.json"} <= files:
        tokenizer.save_huggingface(folder)
    if form == "meta" and _META_FORM not in files:
        write_tiktoken(folder / _META_FORM, tokenizer.ranks)
    generation.setdefault("bos_token_id", tokenizer.bos_id)
    generation.setdefault("eos_token_id", list(tokenizer.stop_ids) if source.chat_template else tokenizer.eos_id)
    return generation


def _check_size(folder: Path, files: set[str], vocab_size: int) -> None:
    """Raises UserError where a tokenizer, of whatever family, has ids that the embedding has no row for."""
    for name in {_HF_FORM, _META_FORM} & files:
        try:
            check_vocabulary_size(folder / name, vocab_size)
        except TooManyEntriesError as error:
            raise UserError(f"the tokenizer ({name}) has {error.entries} entries, the model's vocabulary {vocab_size}") from None
        except UserError:  # of a form that is not known here: it travels as it is
            continue


def _llama3_tokenizer(folder: Path, files: set[str], required: bool) -> Tokenizer | None:
    """The tokenizer among the files, None if there is none or it is of another kind and not `required` in another form."""
    found = [folder / name for name in (_META_FORM, _HF_FORM) if name in files]
    if not found:
        return None
    try:
        return load_tokenizer(found[0])
    except UserError:
        if required:
            raise
        return None
