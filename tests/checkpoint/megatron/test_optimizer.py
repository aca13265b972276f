"""Adam's state through the native format and back, with megatron-core's own optimizer as the oracle."""

from functools import partial

import numpy as np
import pytest
import torch

from megatron_llama3.checkpoint.megatron import open_megatron, write_megatron
from megatron_llama3.checkpoint.native import open_native, write_native
from megatron_llama3.config.command_line import parse_run_config
from megatron_llama3.config.errors import UserError
from megatron_llama3.data.dataset_writer import IndexedDatasetWriter
from megatron_llama3.planning.local_ranks import RankFailedError, run_ranks
from megatron_llama3.recipes.pretrain import pretrain
from tests.checkpoint.megatron import oracle


def through_native(theirs, folder, is_stacked, dtype=None):
    """Converts to native and back; returns both folders."""
    for name in ("native", "ours"):
        (folder / name).mkdir()
    write_native(open_megatron(theirs, with_optimizer=True), folder / "native")
    source = open_native(folder / "native", with_optimizer=True)
    write_megatron(source, folder / "ours", dtype, is_stacked=is_stacked, is_te=False)
    return folder / "native", folder / "ours" / "iter_0000007"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_stacked", "world", "tp", "dtype", "is_distributed"),
    [
        (True, 1, 1, torch.bfloat16, True),
        (False, 4, 2, torch.float32, True),  # DP 2: each rank holds a part of Adam's state
        (True, 2, 2, torch.bfloat16, False),
    ],
)
def test_state_comes_back_bitwise(tmp_path, is_stacked, world, tp, dtype, is_distributed):
    save = partial(oracle.save_with_optimizer, tmp_path, is_stacked, tp, is_distributed=is_distributed, dtype=dtype)
    run_ranks(world, save)
    theirs = tmp_path / "iter_0000007"
    _, ours = through_native(theirs, tmp_path, is_stacked, dtype)
    loads = [partial(oracle.load_with_optimizer, ours, is_stacked, tp, dtype=dtype)]
    if is_distributed:
        loads.append(partial(oracle.load_with_optimizer, theirs, is_stacked, tp, dtype=dtype))
        results = [run_ranks(world, load) for load in loads]
        for (state, groups), (expected, their_groups) in zip(*results, strict=True):
            assert state.keys() == expected.keys()
            for name, tensors in state.items():
                assert all(torch.equal(tensors[key], expected[name][key]) for key in tensors), name
            said = ("wd_mult", "lr_mult", "step", "betas", "eps", "max_lr")
            assert [[group[key] for key in said] for group in groups] == [[group[key] for key in said] for group in their_groups]
    else:  # another form of the same: its main weights are `fp32_param`
        source, again = open_megatron(theirs, with_optimizer=True), open_megatron(ours, with_optimizer=True)
        assert source.weights["norm.weight"].dtype == torch.float32
        for one, two in [(source.weights, again.weights), (source.optimizer.exp_avg_sq, again.optimizer.exp_avg_sq)]:
            assert all(torch.equal(one[name].read(), two[name].read()) for name in one)
        run_ranks(world, loads[0])


def test_a_run_goes_on_from_it(tmp_path):
    run_ranks(1, partial(oracle.save_with_optimizer, tmp_path, True))
    native, _ = through_native(tmp_path / "iter_0000007", tmp_path, True)
    (theirs, _), *_ = run_ranks(1, partial(oracle.load_with_optimizer, tmp_path / "iter_0000007", True))
    ours = open_native(native, with_optimizer=True)
    for name, key in (("layers.2.attention.wo.weight", "decoder.layers.2.self_attention.linear_proj.weight"), ("norm.weight", None)):
        expected = theirs[key or "decoder.final_layernorm.weight"]
        found = {"param": ours.weights, "exp_avg": ours.optimizer.exp_avg, "exp_avg_sq": ours.optimizer.exp_avg_sq}
        assert all(torch.equal(tensors[name].read().flatten(), expected[kind].flatten()) for kind, tensors in found.items())
    assert (ours.optimizer.step, ours.optimizer.iteration, ours.optimizer.consumed_samples) == (1, 7, 56)

    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for seed in range(40):
            writer.add_document(np.random.default_rng(seed).integers(0, 128, 50))
        writer.finalize()
    model = " ".join(f"--{key.replace('_', '-')} {oracle.ARGUMENTS[key]}" for key in ("num_layers", "hidden_size", "ffn_hidden_size"))
    model += " --num-attention-heads 6 --num-query-groups 2 --max-position-embeddings 512 --use-rope-scaling"
    flags = (
        f"{model} --vocab-size 128 --data-path {tmp_path / 'corpus'} --seq-length 32 --global-batch-size 8 --lr 1e-3 --min-lr 1e-5 "
        f"--lr-warmup-iters 3 --lr-decay-iters 100 --train-iters 9 --eval-iters 0 --load {native} --save {tmp_path / 'on'}"
    )
    with pytest.raises(RankFailedError, match="add --override-data"):
        run_ranks(1, lambda: pretrain(parse_run_config(flags.split())))
    run_ranks(1, lambda: pretrain(parse_run_config([*flags.split(), "--override-data"])))
    assert (tmp_path / "on" / "latest_checkpointed_iteration.txt").read_text() == "9"


def test_a_form_that_one_layout_alone_can_read_is_refused(tmp_path):
    run_ranks(1, partial(oracle.save_with_optimizer, tmp_path, True, form="dp_reshardable"))
    with pytest.raises(UserError, match=r"cut as one layout needs it: save it .* with --dist-ckpt-optim-fully-reshardable"):
        open_megatron(tmp_path / "iter_0000007", with_optimizer=True)
    assert open_megatron(tmp_path / "iter_0000007").weights["norm.weight"].read().shape == (48,)
