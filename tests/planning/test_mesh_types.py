"""The model is typed under every combination of axes, and planted faults of the sums, which need no numbers to be seen, do not type."""

import pytest
import torch.distributed as dist

from megatron_llama3.model.sharding import PartialOver, WeightSpec
from megatron_llama3.parallel import collectives, context_parallel, tensor_parallel
from megatron_llama3.planning.local_ranks import RankFailedError
from megatron_llama3.planning.mesh_types import check_types
from tests.planning.faults import FAULTS, patch
from tests.training.layouts import config_of, name_of, trainable_of
from tests.training.test_equivalence import MATRIX, PLAIN

LAYOUTS = {
    "tp": {"tp": 2, "kv_heads": 2},
    "sp": {"tp": 2, "sp": True, "kv_heads": 2},
    "cp": {"cp": 2},
    "tp cp": {"tp": 2, "cp": 2, "kv_heads": 2},
    "replicated kv": {"tp": 4, "kv_heads": 2},
    "replicated kv, sp, cp": {"tp": 4, "kv_heads": 2, "sp": True, "cp": 2},
    "tied": {"tp": 2, "sp": True, "tied": True},
    "tied pp": {"tp": 2, "pp": 2, "cp": 2, "tied": True},
    "head norms": {"tp": 4, "kv_heads": 2, "cp": 2, "qk_norm": True},
    "remade norms": {"tp": 2, "sp": True, "cp": 2, "recompute": "selective-layernorm"},
    "zero bubble": {"tp": 2, "sp": True, "pp": 2, "schedule": "zero-bubble"},
    "virtual stages": {"tp": 2, "sp": True, "pp": 2, "v": 2, "dp": 2},
}


def config(layout: str):
    return config_of(PLAIN | LAYOUTS[layout], "fp32")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_typed(layout):
    check_types(config(layout))


@pytest.mark.slow
@pytest.mark.parametrize("row", MATRIX, ids=name_of)
def test_every_row_of_the_matrix_is_typed(row):
    check_types(config_of(row, "fp32"), trainable_of(row))


def _sum_nothing_before_column_layers() -> None:
    patch(tensor_parallel, "copy_to_group", lambda original, x, group: x)


def _sum_twice_after_row_layers() -> None:
    collectives._ReduceFromGroup.backward = staticmethod(lambda ctx, grad: (collectives.all_reduce(grad, dist.group.WORLD), None))


def _cut_gradient_instead_of_reduce_scatter() -> None:
    collectives._GatherSequence.backward = staticmethod(lambda ctx, grad: (grad.chunk(ctx.group.size())[0], None))


def _leave_keys_values_gradient_of_other_ranks() -> None:
    context_parallel._GatherInOrder.backward = staticmethod(lambda ctx, grad: (grad.chunk(ctx.group.size())[0], None))


def _take_head_norms_for_residual_norms() -> None:
    """A norm of each head's channels is said to be partial over what the norms of the residual stream are."""

    def partial(original, spec: WeightSpec, tp_size: int, sequence_parallel: bool) -> bool:
        is_head_norm = len(spec.shape) == 1 and spec.partial_over is PartialOver.HEADS
        return sequence_parallel if is_head_norm else original(spec, tp_size, sequence_parallel)

    patch(WeightSpec, "gradient_is_partial", partial)


def _leave_softmax_sum_of_other_ranks() -> None:
    patch(dist, "all_reduce", lambda original, x, *args, **kwargs: original(x, *args, **kwargs) if x.ndim != 2 else None)


OTHER_FAULTS = {
    "no sum before column layers": (_sum_nothing_before_column_layers, "tp"),
    "gradient summed twice after row layers": (_sum_twice_after_row_layers, "tp"),
    "gradient cut, not reduce-scattered": (_cut_gradient_instead_of_reduce_scatter, "sp"),
    "keys' and values' gradient of other CP ranks left out": (_leave_keys_values_gradient_of_other_ranks, "cp"),
    "head norms summed as norms of the residual stream": (_take_head_norms_for_residual_norms, "head norms"),
    "softmax over this rank's part of the vocabulary": (_leave_softmax_sum_of_other_ranks, "tp"),
}
OF_SUMS = ["forward all-reduce dropped", "backward all-reduce dropped", "norm gradients unsummed", "replicated KV gradients unsummed"]


@pytest.mark.parametrize("fault", OF_SUMS)
@pytest.mark.parametrize("layout", ["tp", "sp", "cp", "replicated kv", "replicated kv, sp, cp"])
def test_a_fault_does_not_type_where_the_layout_has_its_axis_and_only_there(fault, layout):
    if not FAULTS[fault].has_axis(config(layout)):
        check_types(config(layout), before=FAULTS[fault].plant)
        return
    with pytest.raises(RankFailedError, match="SpmdTypeError"):
        check_types(config(layout), before=FAULTS[fault].plant)


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_other_faults_do_not_type(fault):
    plant, layout = OTHER_FAULTS[fault]
    with pytest.raises(RankFailedError, match="SpmdTypeError"):
        check_types(config(layout), before=plant)
