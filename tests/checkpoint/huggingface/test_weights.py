"""Hugging Face folders: exact round trips, parity with transformers, and refusals in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llama3.checkpoint.huggingface import export_hf, open_hf
from megatron_llama3.config.errors import UserError
from tests.tokenizer.vocabularies import small_vocabulary


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise_and_loads_in_transformers(make_hf, hf_logits, tmp_path, dtype, tied, monkeypatch):
    monkeypatch.setattr("megatron_llama3.checkpoint.huggingface.weights.SHARD_BYTES", 40_000)
    monkeypatch.setattr("megatron_llama3.checkpoint.files.safetensors_file.TASK_BYTES", 9_000)  # several writers a file
    folder = make_hf(dtype=dtype, tied=tied, scaled=True)
    export_hf(open_hf(folder), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_tensors(tensors_of(folder), tensors_of(tmp_path / "out"))
    assert torch.equal(hf_logits(folder), hf_logits(tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_rows_of_wq_are_permuted_and_blocks_agree_with_the_whole(make_hf, monkeypatch):
    source = open_hf(make_hf())
    name = "layers.1.attention.wq.weight"
    theirs = tensors_of(make_hf())["model.layers.1.self_attn.q_proj.weight"]
    ours = source.weights[name].read()
    assert torch.equal(ours, theirs.view(6, 2, 4, 48).transpose(1, 2).reshape(48, 48))
    monkeypatch.setattr("megatron_llama3.checkpoint.lazy_tensor.BLOCK_BYTES", 5 * 48 * 4)  # blocks that end within a head
    assert torch.equal(torch.cat(list(source.weights[name].blocks())), ours)


def test_sharded_folder_of_transformers(make_hf):
    one, many = make_hf(), make_hf(max_shard_size="50KB")
    assert (many / "model.safetensors.index.json").is_file()
    a, b = open_hf(one), open_hf(many)
    assert all(torch.equal(a.weights[name].read(), b.weights[name].read()) for name in a.weights)


def test_cast(make_hf, tmp_path):
    folder = make_hf()
    export_hf(open_hf(folder), tmp_path / "out", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    assert_same_tensors(expected, tensors_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_and_token_ids_travel(make_hf, tmp_path):
    folder = make_hf(eos_token_id=[7, 8], bos_token_id=3)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    export_hf(open_hf(folder), tmp_path / "out", chat_template="{{ messages }}")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == [7, 8]


def test_llama3_tokenizer_is_written_in_hugging_faces_form(make_hf, tmp_path):
    from transformers import AutoTokenizer

    from megatron_llama3.tokenizer.llama3 import Tokenizer

    tokenizer = Tokenizer({bytes([i]): i for i in range(256)} | {b"ab": 256})
    tokenizer.save(tmp_path / "tokenizer")
    export_hf(open_hf(make_hf(vocab_size=513)), tmp_path / "out", tokenizer=tmp_path / "tokenizer" / "tokenizer.model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("abc ab")["input_ids"] == tokenizer.encode("abc ab", bos=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == tokenizer.bos_id
    with pytest.raises(UserError, match="513 entries, the model's vocabulary 99"):
        export_hf(open_hf(make_hf()), tmp_path / "small", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "small").exists()


def damaged(folder, tmp_path, change):
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def test_truncated_file(make_hf, tmp_path):
    def cut(copy):
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
        open_hf(damaged(make_hf(), tmp_path, cut))


def test_missing_shard(make_hf, tmp_path):
    with pytest.raises(UserError, match=r"model-00002-of-\d+\.safetensors: the file is missing"):
        open_hf(damaged(make_hf(max_shard_size="50KB"), tmp_path, lambda copy: next(copy.glob("model-00002-of-*")).unlink()))


def test_index_may_not_leave_its_folder(make_hf, tmp_path):
    def escape(copy):
        file = copy / "model.safetensors.index.json"
        file.write_text(file.read_text().replace("model-00002", "../model-00002"))

    with pytest.raises(UserError, match="same folder"):
        open_hf(damaged(make_hf(max_shard_size="50KB"), tmp_path, escape))


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, (10**6).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"])
def test_damaged_header(make_hf, tmp_path, header):
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        open_hf(damaged(make_hf(), tmp_path, lambda copy: (copy / "model.safetensors").write_bytes(header)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": ["F32"]}, "model.norm.weight in the header is malformed"),
        ({"data_offsets": ["0", "192"]}, "malformed"),
        ({"data_offsets": [0.0, 192.0]}, "malformed"),
        ({"shape": "48"}, "malformed"),
        ({"data_offsets": [0, 192]}, "byte ranges of .* and .* overlap"),
    ],
)
def test_header_that_contradicts_itself(make_hf, tmp_path, change, message):
    def rewrite(copy):
        data = (copy / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header["model.norm.weight"] |= change
        text = json.dumps(header).encode()
        (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    with pytest.raises(UserError, match=message):
        open_hf(damaged(make_hf(), tmp_path, rewrite))


def test_config_that_does_not_fit_the_weights(make_hf, tmp_path):
    def widen(copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))

    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight has shape \[80, 48\], the config asks for \[96, 48\]"):
        open_hf(damaged(make_hf(), tmp_path, widen))


def test_left_over_and_missing_weights(make_hf, tmp_path):
    def rename(copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
        save_file(tensors, copy / "model.safetensors")

    with pytest.raises(UserError, match=r"no place for, model\.layers\.0\.self_attn\.q_norm\.weight"):
        open_hf(damaged(make_hf(), tmp_path, rename))

    def drop(copy):
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, copy / "model.safetensors")

    with pytest.raises(UserError, match=r"weight model\.norm\.weight .* is missing"):
        open_hf(damaged(make_hf(), tmp_path / "b", drop))


def test_tied_embedding_that_is_missing(make_hf, tmp_path):
    def rename(copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, copy / "model.safetensors")

    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight .* is missing"):
        open_hf(damaged(make_hf(tied=True), tmp_path, rename))


def test_tied_head_that_differs(make_hf, tmp_path):
    def add_head(copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, copy / "model.safetensors")

    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        open_hf(damaged(make_hf(tied=True), tmp_path, add_head))


def test_existing_folder_is_not_overwritten(make_hf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        export_hf(open_hf(make_hf()), tmp_path / "out")


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(make_hf, tmp_path, family):
    small_vocabulary().save_huggingface(tmp_path)
    if family == "gpt2":
        data = json.loads((tmp_path / "tokenizer.json").read_text())
        data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"the tokenizer \(tokenizer.json\) has 1024 entries, the model's vocabulary 99"):
        export_hf(open_hf(make_hf()), tmp_path / "out", tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()
