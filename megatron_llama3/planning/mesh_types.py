"""Types every tensor by mesh axis through one forward and backward pass, which proves that each gradient is summed where it must be and
nowhere else: for any values, on one process, by torch's fake backend and the library spmd-types.

| type on an axis | values on its ranks | gradient on its ranks | for instance                                                  |
|-----------------|---------------------|-----------------------|---------------------------------------------------------------|
| I, invariant    | equal               | equal                 | without sequence parallelism: what passes between the layers  |
| R, replicated   | equal               | parts of a sum        | what column layers take; with sequence parallelism: the norms |
| V, varying      | each rank's own     | each rank's own       | a weight that TP cuts; a sequence that CP cuts                |
| P, partial      | parts of a sum      | equal                 | the loss of a part of the sequence                            |

A weight has the type that the weight table gives it. The library types torch's operations. Of autograd functions it wants to be told; ours
are typed by running their bodies under the same rules (below), and what a backward pass returns is held to the type that the gradient of
its input must have. So is what the weights' half of zero bubble makes. Whole layers recomputed (--recompute-granularity full, or the module
mlp) repeat a forward pass, and are not typed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd_types import I, MeshAxis, P, R, SpmdTypeError, V, _state, assert_type, get_local_type, no_typecheck, set_current_mesh
from spmd_types.checker import typecheck
from spmd_types.runtime import _set_local_type, register_autograd_function
from torch import Tensor
from torch.autograd import Function
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from megatron_llama3.config.parallel import layers_of_chunks
from megatron_llama3.config.run import RunConfig
from megatron_llama3.model.llama import BuildOptions, Llama
from megatron_llama3.model.loss import _ChunkedLogProbs
from megatron_llama3.model.rope import rotary_table
from megatron_llama3.parallel import collectives
from megatron_llama3.parallel.groups import ParallelGroups, initialize_groups
from megatron_llama3.parallel.linear import KeptInput, Linear
from megatron_llama3.parallel.pipeline_parallel import DeferredWeightGradients
from megatron_llama3.parallel.tensor_parallel import TensorParallel
from megatron_llama3.planning.local_ranks import run_ranks
from megatron_llama3.planning.synthetic_batch import synthetic_batch
from megatron_llama3.training.engine import Trainable
from megatron_llama3.training.microbatch import Microbatch, make_microbatches
from megatron_llama3.training.objectives import NextToken

Types = dict[MeshAxis, object]

# What no body says, on the axis of the function's group: that a rank's own values are parts of a sum (P), and that equal values will get
# equal gradients (I) or parts of a sum (R). As (first input, output); None: as the body has it.
DECLARED = {
    collectives._CopyToGroup: (None, R),
    collectives._ReduceFromGroup: (P, I),
    collectives._ReduceScatterSequence: (P, None),
    _ChunkedLogProbs: (None, I),
}


def check_types(config: RunConfig, trainable: Trainable = lambda name: True, before: Callable[[], None] = lambda: None) -> None:
    """Types every pipeline chunk of `config`'s model on the axes TP and CP; weights for which `trainable(name)` is False are frozen. Raises
    RankFailedError with the operation and the types that do not fit. `before()` runs first (planted faults)."""
    run_ranks(1, _check_types, config, trainable, before)


def _check_types(config: RunConfig, trainable: Trainable, before: Callable[[], None]) -> None:
    before()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.parallel.world_size)
    groups = replace(initialize_groups(config.parallel), device=torch.device("cpu"))
    p = config.parallel
    deferred = DeferredWeightGradients() if p.pipeline_schedule == "zero-bubble" else None
    tp = TensorParallel(groups.tp, p.sequence_parallel, deferred=deferred)
    remade = [module for module in p.recompute_modules if module != "mlp"]
    options = BuildOptions(attention_kernel="sdpa", loss_chunk_size=config.training.loss_chunk_size, recompute_modules=remade)
    batch = synthetic_batch(config, 0, 0, groups.topology.dp)
    for content in layers_of_chunks(config.model, p):
        chunk = Llama(config.model, tp, groups.cp, content.layers, content.has_embedding, content.has_output, options)
        for name, weight in chunk.named_weights():
            weight.requires_grad_(trainable(name))
        for loss_is_known in (True, False) if content.has_output else (True,):
            _check_chunk(chunk, make_microbatches(batch, groups, config.data.document_mask)[0], groups, loss_is_known, deferred)


def _check_chunk(
    chunk: Llama, microbatch: Microbatch, groups: ParallelGroups, loss_is_known: bool, deferred: DeferredWeightGradients | None
) -> None:
    inputs, tp, objective = microbatch.inputs, chunk.tp, NextToken()
    s, b = inputs.tokens.shape
    inputs.rotary, inputs.plan = rotary_table(inputs.position_ids, chunk.frequencies), chunk.plan_attention(inputs.mask, b)
    inputs.loss_weights = objective.loss_weights(microbatch) if loss_is_known else None
    between_layers = {groups.tp: V if tp.sequence_parallel else I, groups.cp: V}
    with type_checking([groups.tp, groups.cp]):
        for name, weight in chunk.named_weights():
            assert_type(weight, {groups.tp: _type_of_weight(chunk, name), groups.cp: R})
        for tensor in tree_leaves((vars(inputs), microbatch.loss_mask)):
            if isinstance(tensor, Tensor):
                assert_type(tensor, {groups.tp: R, groups.cp: V})
        x = None
        if chunk.tok_embeddings is None:
            x = torch.zeros(s // tp.size if tp.sequence_parallel else s, b, chunk.config.hidden_size, requires_grad=True)
            _set_local_type(x, {MeshAxis.of(group): t for group, t in between_layers.items() if group.size() > 1})
        out = chunk(x, inputs)
        if not out.requires_grad:  # all of it is frozen
            return
        if chunk.output is None:
            assert_type(out, between_layers)
            out.backward(torch.zeros_like(out))
        else:
            loss, _ = objective(out, microbatch, groups.cp)
            assert_type(loss, {groups.tp: I, groups.cp: P})  # gradients are summed over DP and CP
            loss.backward()
        for kept, grads in deferred.take() if deferred else []:
            _check_weight_halves(kept, grads, deferred.linear)


def _check_weight_halves(kept: KeptInput, grads: list[tuple[Tensor, Tensor]], linear: Linear) -> None:
    with torch.no_grad(), _BodyRules():
        x = kept.start()()
        for number, (weight, grad) in enumerate(grads):
            _check_gradient(f"the gradient of layer {number}", get_local_type(linear.weight_gradient(grad, x)), get_local_type(weight))


def _type_of_weight(chunk: Llama, name: str):
    """On the axis TP."""
    spec, tp = chunk.specs[name], chunk.tp
    if spec.split_dim_at(tp.size) is not None:
        return V
    return R if spec.gradient_is_partial(tp.size, tp.sequence_parallel) else I


# --- typing the bodies of autograd functions ---


@contextmanager
def type_checking(groups: list[dist.ProcessGroup]) -> Iterator[None]:
    """Everything inside is typed on the axes of `groups`; raises SpmdTypeError where a type does not fit."""
    with ExitStack() as stack:
        stack.enter_context(set_current_mesh(groups))
        for function in Function.__subclasses__():
            if function.__module__.startswith("megatron_llama3."):
                _type_bodies(function, stack)
        stack.enter_context(typecheck())
        yield


def _type_bodies(function: type[Function], stack: ExitStack) -> None:
    """Until `stack` closes, `function` types what it returns, and checks the gradients that it returns."""
    forward, backward, made = function.forward, function.backward, []

    def typed_forward(ctx, *args):
        ctx.input_types = [dict(get_local_type(x)) if isinstance(x, Tensor) else None for x in args]
        axis = next((MeshAxis.of(a) for a in args if isinstance(a, dist.ProcessGroup) and a.size() > 1), None)
        taken, given = DECLARED.get(function, (None, None)) if axis else (None, None)
        if taken is P and ctx.input_types[0][axis] is V:
            ctx.input_types[0][axis] = P
            args = (_set_local_type(args[0].view_as(args[0]), ctx.input_types[0]), *args[1:])
        with _state._current_mode(), _BodyRules():
            result = forward(ctx, *args)
        ctx.output_types = [dict(get_local_type(x)) for x in _as_tuple(result)]
        if given and ctx.output_types[0][axis] in (R, I):
            ctx.output_types[0][axis] = given
        made.append(ctx.output_types)
        return result

    def typed_backward(ctx, *grads):
        types = [{axis: t.backward_type() for axis, t in types.items()} for types in ctx.output_types]
        grads = [_set_local_type(grad.view_as(grad), t) for grad, t in zip(grads, types, strict=True)]
        with torch.no_grad(), _state._current_mode(), _BodyRules():
            results = backward(ctx, *grads)
        for number, (result, types) in enumerate(zip(_as_tuple(results), ctx.input_types, strict=True)):
            if result is not None:
                _check_gradient(f"{function.__name__}: the gradient of input {number}", get_local_type(result), types)
        return results

    def apply(*args):
        result = function.apply(*args)
        for tensor, types in zip(_as_tuple(result), made.pop(), strict=True):
            _set_local_type(tensor, types)
        return result

    for name, typed in (("forward", typed_forward), ("backward", typed_backward), ("typecheck_forward", apply)):
        stack.enter_context(mock.patch.object(function, name, staticmethod(typed), create=True))
    register_autograd_function(function)


def _as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _check_gradient(what: str, found: Types, types: Types) -> None:
    fitting = {I: (I, R), R: (P, V), V: (V,), P: (R, I)}
    for axis, t in types.items():
        if found[axis] not in fitting[t]:
            raise SpmdTypeError(f"{what} is {found[axis]!r} on axis {axis}, where an input of type {t!r} needs {t.backward_type()!r}")


class _BodyRules(TorchFunctionMode):
    """What bodies do besides plain operations: collectives, products over a dimension that an axis cuts, and writing into what they
    allocated, which has the type of what is first written into it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _COLLECTIVES:
            return _typed_collective(func, args, kwargs)
        if func in _PRODUCTS and isinstance(args[1], Tensor):
            return _typed_product(func, args, kwargs)
        if func in _ALLOCATIONS or func in _UNCHANGED:
            with no_typecheck():
                result = func(*args, **kwargs)
            result.is_unwritten = func in _ALLOCATIONS
            return _set_local_type(result, dict.fromkeys(_state.current_mesh(), R) if func in _ALLOCATIONS else get_local_type(args[0]))
        if func in _WRITES and isinstance(args[-1], Tensor):
            _write(args[0], get_local_type(args[-1]))
        return func(*args, **kwargs)


def _write(target: Tensor, types: Types) -> None:
    """Into a tensor or, as torch's views are, a part of one."""
    whole = target if target._base is None else target._base
    if not getattr(whole, "is_unwritten", False) and get_local_type(whole) != types:
        raise SpmdTypeError(f"{types} is written into a tensor of type {get_local_type(whole)}")
    whole.is_unwritten = False
    for tensor in (target, whole):
        _set_local_type(tensor, dict(types))


def _typed_product(func, args: Sequence, kwargs: dict) -> Tensor:
    added, left, right = args if len(args) == 3 else (None, *args)
    types = {axis: _product(left, right, axis, func in _MATRIX_PRODUCTS) for axis in _state.current_mesh()}
    with no_typecheck():
        result = func(*args, **kwargs)
    target = added if added is not None else kwargs.get("out")
    if target is not None:
        _write(target, types)
    return _set_local_type(result, types)


def _product(left: Tensor, right: Tensor, axis: MeshAxis, is_matrix_product: bool):
    pair = [get_local_type(x)[axis] for x in (left, right)]
    if pair == [P, P]:
        raise SpmdTypeError(f"a product of two partial sums on axis {axis}")
    if pair == [V, V]:
        return P if is_matrix_product else V  # a matrix product of two such sums over the dimension that the axis cuts
    return next((t for t in (P, V, R) if t in pair), I)


def _typed_collective(func, args: Sequence, kwargs: dict) -> Tensor | None:
    source, out, taken, made = _COLLECTIVES[func]
    group = kwargs.get("group", args[-1])
    types = dict(get_local_type(args[source]))
    axis = MeshAxis.of(_resolve_process_group(group) if isinstance(group, str) else group)
    if types[axis] not in taken:
        raise SpmdTypeError(f"{func.__name__} over axis {axis} of what is {types[axis]!r} there")
    with no_typecheck():
        result = func(*args, **kwargs)
    _set_local_type(result if out is None else args[out], types | {axis: made})
    return result


_functional = torch.ops._c10d_functional
# Which argument is the input, which the output (None: the result), the types taken, the type made.
_COLLECTIVES = {
    dist.all_reduce: (0, 0, (V, P), R),
    collectives._all_gather: (1, 0, (V,), R),
    collectives._reduce_scatter: (1, 0, (V, P), V),
    _functional.all_reduce_: (0, None, (V, P), R),
    _functional.all_gather_into_tensor: (0, None, (V,), R),
    _functional.reduce_scatter_tensor: (0, None, (V, P), V),
}
_MATRIX_PRODUCTS = {F.linear, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.addmm_}
_PRODUCTS = _MATRIX_PRODUCTS | {Tensor.mul, Tensor.__mul__}
_ALLOCATIONS = {Tensor.new_empty, torch.empty_like, torch.zeros_like}
_UNCHANGED = {Tensor.__getitem__, Tensor.to, torch.view_as_complex, torch.view_as_real, _functional.wait_tensor}
_WRITES = {Tensor.__setitem__, Tensor.__iadd__, Tensor.add_}
