"""Native checkpoints of one process against torch.distributed.checkpoint, in both directions, and poisoned or damaged files."""

import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_llama3.checkpoint.files.publish import publish_folder
from megatron_llama3.checkpoint.huggingface import export_hf, open_hf
from megatron_llama3.checkpoint.native import open_native, open_native_tensors, write_native
from megatron_llama3.checkpoint.native.folder import read_train_state
from megatron_llama3.checkpoint.native.metadata import SafeFileSystemReader, read_metadata
from megatron_llama3.config.errors import UserError


@pytest.fixture
def native(make_hf, tmp_path):
    with publish_folder(tmp_path / "native") as aside:
        write_native(open_hf(make_hf(scaled=True)), aside)
    return tmp_path / "native"


def test_torch_loads_what_was_written(make_hf, native):
    expected = open_hf(make_hf(scaled=True))
    state = {"model." + name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in expected.weights.items()}
    dcp.load(state, storage_reader=SafeFileSystemReader(native / "iter_0000000"), no_dist=True)
    for name, tensor in expected.weights.items():
        assert torch.equal(state["model." + name], tensor.read())


def test_written_by_torch_and_read_here(make_hf, native, tmp_path):
    source = open_native(native)
    state = {"model." + name: tensor.read() + 1 for name, tensor in source.weights.items()}
    state |= {"optimizer.exp_avg." + name: torch.zeros(3) for name in source.weights} | {"step": 5}
    folder = tmp_path / "by_torch"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    shutil.copy(native / "iter_0000000" / "run_config.yaml", folder)
    again = open_native(folder)
    assert again.model == source.model
    for name, tensor in again.weights.items():
        assert torch.equal(tensor.read(), source.weights[name].read() + 1)


def whole_tensors():
    return {f"model.{i}": torch.randn(7 + i, 10 - i, generator=torch.Generator().manual_seed(i)) for i in range(4)}


def save_sharded(rank, folder, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Shard(1), Shard(0)], [Shard(1), Shard(1)]]
    dcp.save({key: distribute_tensor(t, mesh, p) for (key, t), p in zip(whole_tensors().items(), placements)}, checkpoint_id=folder)
    dist.destroy_process_group()


def test_chunks_of_uneven_two_dimensional_shards(tmp_path):
    mp.start_processes(save_sharded, (tmp_path / "d", tmp_path / "store"), nprocs=4, start_method="fork")
    read = open_native_tensors(tmp_path / "d")
    assert any(len(entry.chunks) == 4 for entry in read_metadata(tmp_path / "d").state_dict_metadata.values())
    for key, tensor in whole_tensors().items():
        assert torch.equal(read[key].read(), tensor)
        assert torch.equal(read[key].rows(2, 6), tensor[2:6])


def test_tokenizer_and_token_ids_are_kept(make_hf, tmp_path):
    folder = make_hf(eos_token_id=[7, 8])
    (folder / "tokenizer.json").write_text("{}")
    with publish_folder(tmp_path / "native") as aside:
        write_native(open_hf(folder), aside)
    export_hf(tmp_path / "native", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert open_hf(tmp_path / "out").generation["eos_token_id"] == [7, 8]


def test_tokenizer_of_a_training_run_is_found(native, tmp_path):
    """Training keeps no copy: its run config names the file, under any name."""
    (tmp_path / "vocabulary.tiktoken").write_text("x")
    shutil.rmtree(native / "iter_0000000" / "tokenizer")
    config = native / "iter_0000000" / "run_config.yaml"
    assert open_native(native).assets == {}
    config.write_text(config.read_text().replace("tokenizer_model: null", f"tokenizer_model: {tmp_path / 'vocabulary.tiktoken'}"))
    assert open_native(native).assets == {"tokenizer.model": b"x"}


class Poison:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_poisoned_metadata_is_refused(native, tmp_path):
    marker = tmp_path / "ran"
    (native / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(Poison(marker)))
    with pytest.raises(UserError, match=r"refused to unpickle: it asks for (io|_io)\.open"):
        open_native(native)
    with pytest.raises(CheckpointException, match="refused to unpickle"):
        dcp.load({}, storage_reader=SafeFileSystemReader(native / "iter_0000000"), no_dist=True)
    assert not marker.exists()


def test_poisoned_tensor_is_refused(native, tmp_path):
    """A pickle that runs code, in the place of a tensor in a .distcp file."""
    folder = native / "iter_0000000"
    metadata = read_metadata(folder)
    torch.save(Poison(tmp_path / "ran"), tmp_path / "poison")
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == "model.norm.weight")
    shutil.copy(tmp_path / "poison", folder / "__9_0.distcp")
    metadata.storage_data[index] = type(info)("__9_0.distcp", 0, (tmp_path / "poison").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"__9_0\.distcp: refused to unpickle"):
        open_native(native).weights["norm.weight"].read()
    assert not (tmp_path / "ran").exists()


def test_pickle_announced_in_the_place_of_a_tensor_is_refused(native, tmp_path):
    """torch would load what `.metadata` calls bytes, not a tensor, by a pickle that may run code."""
    folder = native / "iter_0000000"
    content = read_metadata(folder)
    torch.save(Poison(tmp_path / "ran"), folder / "__9_0.distcp")
    index, info = next((i, s) for i, s in content.storage_data.items() if i.fqn == "model.norm.weight")
    content.storage_data[type(index)(index.fqn)] = type(info)("__9_0.distcp", 0, (folder / "__9_0.distcp").stat().st_size)
    content.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointException, match=r"model\.norm\.weight is stored as a pickle, not as a tensor"):
        dcp.load({"model.norm.weight": torch.zeros(48)}, storage_reader=SafeFileSystemReader(folder), no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_chunks_that_overlap_are_refused(native):
    """As many elements as the tensor has, but half of them twice: the rest would be whatever memory held."""
    folder = native / "iter_0000000"
    content = read_metadata(folder)
    half = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([99, 24]))
    content.state_dict_metadata["model.tok_embeddings.weight"].chunks = [half, half]
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"chunks of model\.tok_embeddings\.weight overlap"):
        open_native(native)


@pytest.mark.parametrize("content", ["[]", "{", '{"iteration": 3}', '{"iteration": "3", "consumed_samples": 0, "consumed_tokens": 0}'])
def test_damaged_train_state_is_one_line(tmp_path, content):
    (tmp_path / "train_state.json").write_text(content)
    with pytest.raises(UserError, match=r"train_state\.json: (not valid JSON|damaged: no whole number (iteration|consumed_samples))"):
        read_train_state(tmp_path)


def test_file_outside_the_folder_is_refused(native):
    folder = native / "iter_0000000"
    metadata = read_metadata(folder)
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = type(info)("../" + info.relative_path, info.offset, info.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="has no place in this folder for"):
        open_native(native)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "__1_0.distcp").unlink(), r"__1_0\.distcp: the file is missing"),
        (lambda f: (f / "__1_0.distcp").write_bytes((f / "__1_0.distcp").read_bytes()[:-50]), r"__1_0\.distcp: truncated"),
        (lambda f: (f / ".metadata").unlink(), r"\.metadata: the file is missing"),
        (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:100]), r"\.metadata: refused to unpickle"),
        (lambda f: (f.parent / "latest_checkpointed_iteration.txt").write_text("x"), "'x' is not an iteration number"),
        (lambda f: (f.parent / "latest_checkpointed_iteration.txt").write_text("7"), "names iteration 7, but"),
        (lambda f: (f / "run_config.yaml").unlink(), "run_config.yaml"),
    ],
)
def test_damaged_checkpoints(native, damage, message):
    damage(native / "iter_0000000")
    with pytest.raises(UserError, match=message):
        open_native(native)


def test_config_that_does_not_fit(native):
    config = native / "iter_0000000" / "run_config.yaml"
    config.write_text(config.read_text().replace("ffn_hidden_size: 80", "ffn_hidden_size: 96"))
    with pytest.raises(UserError, match=r"w1\.weight has shape \[80, 48\], the config asks for \[96, 48\]"):
        open_native(native)


def test_overwritten_bytes_in_a_chunk_are_refused(native):
    """Without checksums too, zeroes over a chunk's end are one clear line, not a crash."""
    (native / "iter_0000000" / "manifest.json").unlink()
    file = native / "iter_0000000" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[-60:] = bytes(60)
    file.write_bytes(data)
    places = {i.fqn: info.offset for i, info in read_metadata(file.parent).storage_data.items() if info.relative_path == file.name}
    damaged = max(places, key=places.get).removeprefix("model.")
    with pytest.raises(UserError, match="truncated, or not a file that torch"):
        open_native(native).weights[damaged].read()
