"""Small files that claim much: each is refused in one line, within a few hundred megabytes and seconds, before anything is built."""

import copy
import json
import os
import pickle
import resource
import shutil
import struct

import pytest
import torch

from megatron_llama3.checkpoint.gguf import open_gguf
from megatron_llama3.checkpoint.huggingface import open_hf, write_hf
from megatron_llama3.checkpoint.lazy_tensor import WeightSource, from_tensor
from megatron_llama3.checkpoint.meta import open_meta, write_meta
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.checkpoint.native.manifest import damage
from megatron_llama3.checkpoint.native.metadata import stored_tensors, whole_tensors
from megatron_llama3.config.errors import UserError
from megatron_llama3.config.model import ModelConfig
from megatron_llama3.model.initial_weights import initial_weight
from megatron_llama3.model.sharding import weight_table
from tests.checkpoint.gguf.test_weights import write_gguf

MEMORY, SECONDS = 512 << 20, 20
MODEL = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=48)
DEEP = "[" * 200_000
STEP = "iter_0000000"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of each format."""
    folder = tmp_path_factory.mktemp("good")
    source = WeightSource(MODEL, {name: from_tensor(initial_weight(name, spec, 0)) for name, spec in weight_table(MODEL).items()})
    for kind, write in {"hf": write_hf, "native": write_native, "meta": write_meta}.items():
        (folder / kind).mkdir()
        write(source, folder / kind)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf", MODEL)
    return folder


OPEN = {"hf": open_hf, "native": open_native, "meta": open_meta, "gguf": open_gguf}


def refusal(read, path) -> str:
    """The one line with which `read(path)` refuses, in a process of its own that may take MEMORY more and SECONDS of a CPU."""
    results, sends = os.pipe()
    child = os.fork()
    if not child:
        os.close(results)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
        try:
            read(path)
            line = "FAIL: it was read"
        except UserError as error:
            line = str(error)
        except BaseException as error:
            line = f"FAIL: {type(error).__name__}: {str(error)[:200]}"
        os.write(sends, line.encode()[:4000])
        os._exit(0)
    os.close(sends)
    with os.fdopen(results) as file:
        line = file.read()
    os.waitpid(child, 0)
    assert line, "it took too long, or was killed"
    assert not line.startswith("FAIL"), line
    assert "\n" not in line
    assert len(line) < 1000
    return line


def data_bytes() -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))


def edited(folder, tmp_path, file, change):
    """A copy of `folder` in which `change` (a function of its JSON, or new content) has been at one file."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / file
    if callable(change):
        content = json.loads(path.read_text())
        change(content)
        change = json.dumps(content)
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    return tmp_path / "copy"


def yaml_with(text: str, key: str, value: str) -> str:
    return "".join(f"  {key}: {value}\n" if line.strip().startswith(key + ":") else line for line in text.splitlines(keepends=True))


@pytest.mark.parametrize("kind, file, key", [("hf", "config.json", "num_hidden_layers"), ("meta", "params.json", "n_layers")])
@pytest.mark.parametrize("layers", [10_000_000, 2**62])
def test_ten_million_layers(good, tmp_path, kind, file, key, layers):
    copy = edited(good / kind, tmp_path, file, lambda config: config.update({key: layers}))
    assert f"the config asks for {layers} layers, 1" in refusal(OPEN[kind], copy)


def test_ten_million_layers_of_a_run(good, tmp_path):
    text = (good / "native" / STEP / "run_config.yaml").read_text()
    copy = edited(good / "native", tmp_path, f"{STEP}/run_config.yaml", yaml_with(text, "num_layers", "10000000"))
    assert "the config asks for 10000000 layers" in refusal(open_native, copy)


def test_ten_million_layers_of_a_gguf(tmp_path):
    data = bytearray(gguf_bytes(tmp_path))
    place = data.index(b"llama.block_count") + len("llama.block_count") + 4
    data[place : place + 4] = struct.pack("<I", 10_000_000)
    (tmp_path / "m.gguf").write_bytes(data)
    assert "the config asks for 10000000 layers" in refusal(open_gguf, tmp_path / "m.gguf")


def gguf_bytes(folder) -> bytes:
    write_gguf(folder / "small.gguf", MODEL)
    return (folder / "small.gguf").read_bytes()


def gguf_header(*keys: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys)


def gguf_key(kind: int, value: bytes, name: bytes = b"k") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


GGUF = {
    "an array of 2^60 bytes": gguf_header(gguf_key(9, struct.pack("<IQ", 0, 1 << 60))) + bytes(4096),
    "an array of 2^60 strings": gguf_header(gguf_key(9, struct.pack("<IQ", 8, 1 << 60))) + bytes(4096),
    "an array of 4 million bytes": gguf_header(gguf_key(9, struct.pack("<IQ", 0, 1 << 22))) + bytes(1 << 23),
    "many arrays": gguf_header(*[gguf_key(9, struct.pack("<IQ", 0, 1 << 16) + bytes(1 << 16), b"%d" % i) for i in range(64)]),
    "arrays in arrays": gguf_header(gguf_key(9, struct.pack("<IQ", 9, 1) * 10_000)),
    "2^60 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(4096),
    "2^60 tensors": gguf_header(tensors=1 << 60) + bytes(4096),
    "a string of 2^63 bytes": gguf_header(gguf_key(8, struct.pack("<Q", 1 << 63))),
    "a name of 2^40 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40),
    "2^31 dimensions": gguf_header(tensors=1) + struct.pack("<QcI", 1, b"x", 1 << 31) + bytes(64),
    "an unknown type": gguf_header(gguf_key(99, bytes(64))),
    "only the magic": b"GGUF",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
}


@pytest.mark.parametrize("content", GGUF.values(), ids=GGUF)
def test_gguf_headers(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    assert "truncated, or not a GGUF file" in refusal(open_gguf, tmp_path / "m.gguf")


def copies_of(callable_: bytes, argument: bytes, count: int) -> bytes:
    """A pickle that calls a global again and again on one argument that it has made once."""
    return b"\x80\x02" + callable_ + b"q\x00" + argument + b"\x85q\x01" + b"]q\x02(" + b"h\x00h\x01R" * count + b"e."


NUMBERS = b"(" + b"".join(b"J" + struct.pack("<i", i) for i in range(20_000)) + b"t"
PICKLES = {
    "a memo of 2^27 entries": b"\x80\x02Nr\xff\xff\xff\x07.",
    "a memo of 2^32 entries": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a memo in decimal": b"Np99999999999\n.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "copies of a size": copies_of(b"ctorch\nSize\n", NUMBERS, 100_000),
    "copies of a dict": copies_of(b"ccollections\nOrderedDict\n", b"]q\x03(" + b"".join(
        b"J" + struct.pack("<i", i) + b"K\x01\x86" for i in range(20_000)) + b"e", 100_000),
    "copies of a path": copies_of(b"cpathlib\nPosixPath\n", NUMBERS, 100_000),
    "a function": b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    "nothing": b"",
    "half": b"\x80\x02]q\x00(",
}  # fmt: skip


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_pickles(good, tmp_path, content):
    copy = edited(good / "native", tmp_path, f"{STEP}/.metadata", content)
    assert ".metadata: refused to unpickle" in refusal(open_native, copy)
    archive = tmp_path / "archive.pth"
    torch.save({"a": torch.zeros(1)}, archive)
    with_pickle(archive, content)
    shutil.copy(archive, good / "meta" / "consolidated.01.pth")
    try:
        assert "consolidated.01.pth: " in refusal(open_meta, good / "meta")
    finally:
        (good / "meta" / "consolidated.01.pth").unlink()


def with_pickle(path, content: bytes) -> None:
    """The archive with another data.pkl."""
    import zipfile

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)


def test_a_safetensors_header_of_empty_entries(good, tmp_path):
    header = b"{" + b",".join(b'"%x":{}' % i for i in range(1_700_000)) + b"}"
    copy = edited(good / "hf", tmp_path, "model.safetensors", struct.pack("<Q", len(header)) + header)
    assert "not a safetensors file" in refusal(open_hf, copy)


def test_overlaps_are_looked_for_in_n_log_n_steps(tmp_path):
    """10,000 chunks of one element in one row; with two of them on one place they are refused."""
    count = 10_000
    content = whole_tensors({"model.w": (torch.float32, (1, count), "__0_0.distcp", 0, 4)})
    chunk, (index, place) = content.state_dict_metadata["model.w"].chunks[0], next(iter(content.storage_data.items()))
    chunks, places = [], {}
    for column in range(count):
        offset = torch.Size([0, column])
        chunks.append(type(chunk)(offset, torch.Size([1, 1])))
        places[type(index)("model.w", offset, column)] = copy.copy(place)
    chunks[7] = type(chunk)(torch.Size([0, 8]), torch.Size([1, 1]))
    content.state_dict_metadata["model.w"].chunks, content.storage_data = chunks, places
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    assert "overlap" in refusal(stored_tensors, tmp_path)


JSON_FILES = [("hf", "config.json"), ("hf", "generation_config.json"), ("meta", "params.json"), ("native", f"{STEP}/run_config.yaml")]
STATE_FILES = [f"{STEP}/train_state.json", f"{STEP}/manifest.json", f"{STEP}/run_config.yaml"]


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 200_000, "1" * 5000, '{"vocab_size": ' + "9" * 5000 + "}", "[]", "\x00"])
@pytest.mark.parametrize("kind, file", JSON_FILES)
def test_deep_and_long_json(good, tmp_path, kind, file, text):
    copy = edited(good / kind, tmp_path, file, text)
    assert file.split("/")[-1] in refusal(OPEN[kind], copy)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 200_000, "1" * 5000, "[]"])
@pytest.mark.parametrize("file", STATE_FILES)
def test_deep_and_long_state_is_damage(good, tmp_path, file, text):
    folder = edited(good / "native" / STEP, tmp_path, file.split("/")[-1], text)
    if not file.endswith("manifest.json"):
        (folder / "manifest.json").unlink()  # else its checksum tells

    def read(folder):
        reason = damage(folder)
        assert reason is not None
        raise UserError(reason)

    assert file.split("/")[-1] in refusal(read, folder)


def test_a_deep_safetensors_header(good, tmp_path):
    header = DEEP.encode()
    copy = edited(good / "hf", tmp_path, "model.safetensors", struct.pack("<Q", len(header)) + header)
    assert "not a safetensors file" in refusal(open_hf, copy)


NUMBERS_OF_CONFIGS = [
    *[("hf", "config.json", key) for key in ("rms_norm_eps", "hidden_size", "rope_theta", "num_attention_heads", "head_dim", "vocab_size")],
    *[("meta", "params.json", key) for key in ("norm_eps", "ffn_dim_multiplier", "dim", "n_heads", "multiple_of", "rope_theta")],
]


@pytest.mark.slow
@pytest.mark.parametrize("value", [10**400, 2**63, -1, 0, 1e308, "x", [1], {}, True, float("nan")], ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("kind, file, key", NUMBERS_OF_CONFIGS)
def test_numbers_that_no_model_has(good, tmp_path, kind, file, key, value):
    if (key, value) in [("rms_norm_eps", 1e308), ("norm_eps", 1e308)]:
        pytest.skip("a float like any other")
    copy = edited(good / kind, tmp_path, file, lambda config: config.update({key: value}))
    refusal(OPEN[kind], copy)


def test_a_norm_epsilon_of_400_digits_in_a_run_config(good, tmp_path):
    text = yaml_with((good / "native" / STEP / "run_config.yaml").read_text(), "norm_epsilon", "1" + "0" * 400)
    copy = edited(good / "native", tmp_path, f"{STEP}/run_config.yaml", text)
    assert "model.norm_epsilon is 1000" in refusal(open_native, copy)


@pytest.mark.parametrize("text", ["1" * 5000, "9" * 20, "²", "-1", "", "x"])
def test_the_latest_iteration(good, tmp_path, text):
    copy = edited(good / "native", tmp_path, "latest_checkpointed_iteration.txt", text)
    assert "is not an iteration number" in refusal(open_native, copy)


@pytest.mark.parametrize("key, value", [("iteration", -5), ("iteration", 10**30), ("consumed_samples", -1), ("consumed_tokens", True)])
def test_counts_of_a_train_state(good, tmp_path, key, value):
    folder = edited(good / "native" / STEP, tmp_path, "train_state.json", lambda state: state.update({key: value}))
    (folder / "manifest.json").unlink()
    assert f"damaged: no whole number {key}" in damage(folder)


@pytest.mark.parametrize("change", ["hole", "tail"])
def test_bytes_of_a_safetensors_file_that_no_tensor_has(good, tmp_path, change):
    """The format forbids them: something could hide there, and other readers refuse the file."""
    data = (good / "hf" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if change == "hole":
        del header["model.norm.weight"]
    text = json.dumps(header).encode()
    rest = data[8 + length :] + (bytes(16) if change == "tail" else b"")
    copy = edited(good / "hf", tmp_path, "model.safetensors", struct.pack("<Q", len(text)) + text + rest)
    assert "belong to no tensor" in refusal(open_hf, copy)


@pytest.mark.parametrize("case", ["stale copy", "not in the index", "a whole model beside the index"])
def test_the_index_says_which_copy_counts(good, tmp_path, case):
    from safetensors.torch import load_file, save_file

    shutil.copytree(good / "hf", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    names = sorted(weights)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {name: files[i % 2] for i, name in enumerate(names)}
    if case == "stale copy":
        index_of_parts = {file: [n for n in names if index[n] == file] for file in files}
        index_of_parts[files[1]].append(names[0])
    else:
        index_of_parts = {file: [n for n in names if index[n] == file] for file in files}
    if case == "not in the index":
        del index[names[0]]
    for file, part in index_of_parts.items():
        save_file({name: weights[name] for name in part}, tmp_path / "hf" / file)
    if case != "a whole model beside the index":
        (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=r"which copy counts\?|remove one of the two"):
        open_hf(tmp_path / "hf")
