"""Each private function of torch that the project calls does what its wrapper says, and none is called elsewhere."""

import ast
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import megatron_llama3
from megatron_llama3.parallel import torch_private
from megatron_llama3.parallel.torch_private import (
    assert_on_device,
    default_store,
    finish_backward,
    flatten,
    recorded_collectives,
    softmax_backward,
    unflatten,
)
from megatron_llama3.planning.local_ranks import run_ranks

PACKAGE = Path(megatron_llama3.__file__).parent
# What torch's optimizers run on; names in torch's own files; what its documentation of memory snapshots says to call; operators.
ADMITTED = ("_foreach_", "_utils", "_rebuild_", "_record_memory_history", "_dump_snapshot", "_c10d_functional")


def test_flatten_and_unflatten():
    tensors = [torch.arange(6.0).view(2, 3), torch.arange(4.0)]
    flat = flatten(tensors)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert all(map(torch.equal, unflatten(flat, tensors), tensors))


def test_assert_on_device():
    assert_on_device(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        assert_on_device(torch.tensor(False), "not fine")


def test_softmax_backward():
    scores, grad = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
    scores.requires_grad_()
    probabilities = scores.softmax(-1)
    probabilities.backward(grad)
    torch.testing.assert_close(softmax_backward(grad, probabilities.detach()), scores.grad)


def _meet_and_finish_a_backward() -> tuple[bytes, list[float]]:
    default_store().set("key", "value")
    linear = fully_shard(nn.Linear(2, 1, bias=False), mesh=init_device_mesh("cpu", (1,)))
    linear.set_requires_gradient_sync(False)
    linear(torch.tensor([[1.0, 2.0]])).sum().backward()
    assert linear.weight.grad is None, "not reduced yet"
    linear.set_requires_gradient_sync(True)
    finish_backward(linear)
    return default_store().get("key"), linear.weight.grad.to_local().flatten().tolist()


def test_default_store_and_finish_backward():
    assert run_ranks(1, _meet_and_finish_a_backward) == [(b"value", [1.0, 2.0])]


def _record_a_collective() -> tuple[list[str], dict[str, bytes]]:
    dist.all_reduce(torch.ones(3))
    nccl = {"entries": [{"profiling_name": "nccl:all_reduce"}]}
    torch._C._distributed_c10d._dump_nccl_trace = lambda: pickle.dumps(nccl)  # as a torch for GPUs has it
    with_nccl = recorded_collectives()
    torch._C._distributed_c10d._dump_nccl_trace = lambda: pickle.dumps({"entries": []})  # on a GPU, in a job on gloo alone
    return [trace["profiling_name"] for trace in pickle.loads(recorded_collectives()["gloo"])["entries"]], with_nccl


def test_recorded_collectives():
    (names, with_nccl), _ = run_ranks(2, _record_a_collective)
    assert names[0] == "gloo:all_reduce"
    assert list(with_nccl) == ["nccl", "gloo"]
    assert pickle.loads(with_nccl["nccl"])["entries"][0]["profiling_name"] == "nccl:all_reduce"


def test_no_private_name_of_torch_is_called_elsewhere():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "torch_private.py" or path.parent.name == "planning":  # which looks into fake tensors
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found += [f"{path.relative_to(PACKAGE)}: {name}" for name in _private_names(node) if not name.startswith(ADMITTED)]
    assert not found


def _private_names(node: ast.AST) -> list[str]:
    """Names with a leading underscore in an import from torch, or in an expression that begins with torch. or dist."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
        return [name for name in (*node.module.split("."), *(alias.name for alias in node.names)) if name.startswith("_")]
    if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in ("torch", "dist") and node.attr.startswith("_"):
        return [node.attr]
    return []


def test_the_wrappers_are_all_here():
    tested = {"flatten", "unflatten", "assert_on_device", "default_store", "finish_backward", "recorded_collectives", "softmax_backward"}
    functions = {node.name for node in ast.parse(Path(torch_private.__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert functions == tested
