"""megatron-core itself as the oracle: its GPTModel and its dist_checkpointing, on a CPU.

Its code names CUDA here and there; what it asks of a device is answered with "cpu". Call `on_cpu` first, on a forked rank of its own.
"""

import argparse
import enum
import multiprocessing
import queue
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

HEADS, GROUPS, HEAD_DIM, HIDDEN, FFN, LAYERS = 6, 2, 8, 48, 80, 4
ARGUMENTS = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS, "num_query_groups": GROUPS,
    "group_query_attention": True, "kv_channels": HEAD_DIM, "max_position_embeddings": 512, "norm_epsilon": 1e-5, "rotary_base": 500000,
    "rotary_percent": 1.0, "use_rope_scaling": True, "rope_scaling_factor": 8.0, "swiglu": True, "normalization": "RMSNorm",
    "position_embedding_type": "rope", "add_bias_linear": False, "qk_layernorm": False, "num_experts": None, "init_method_std": 0.02,
    "padded_vocab_size": 128, "consumed_train_samples": 56, "seq_length": 32, "params_dtype": torch.bfloat16,
}  # fmt: skip


class Backend(enum.Enum):
    """As Megatron-LM's arguments hold some."""

    auto = 5


def on_cpu() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    warnings.simplefilter("ignore")
    multiprocessing.current_process()._config["daemon"] = False  # it writes from a child
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *args: None
    torch.Tensor.cuda = lambda tensor, *args, **options: tensor
    results = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results
    torch.serialization.add_safe_globals([argparse.Namespace, Backend])  # as Megatron-LM's training script does
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()


def gpt_model(tp: int, pp: int, tied: bool = False, qk_norm: bool = False, dtype: torch.dtype = torch.float32):
    """This rank's part of a Llama as megatron-core has it, with random weights, norms too."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    on_cpu()
    parallel_state.initialize_model_parallel(tp, pp)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_query_groups=GROUPS,
        qk_layernorm=qk_norm, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=dtype, params_dtype=dtype,
        bf16=dtype != torch.float32,
        use_cpu_initialization=True, gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        add_bias_linear=False, bias_activation_fusion=False, attention_dropout=0.0, hidden_dropout=0.0, layernorm_epsilon=1e-5,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_norm), vocab_size=128, max_sequence_length=512,
        position_embedding_type="rope", rotary_base=500_000, rope_scaling=True, share_embeddings_and_output_weights=tied,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    ).to(dtype)  # fmt: skip
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
    return model


def metadata(is_stacked: bool) -> dict:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"dp_cp_group": group, "non_homogeneous_layers": not is_stacked, "distrib_optim_sharding_type": "fully_reshardable"}


def save(folder: Path, is_stacked: bool, tp: int = 1, pp: int = 1, arguments: dict | None = None, **options) -> None:
    """On every rank: a checkpoint as Megatron-LM's training script writes one, in `folder`/iter_0000007."""
    from megatron.core import dist_checkpointing

    model = gpt_model(tp, pp, **options)
    step = folder / "iter_0000007"
    step.mkdir(exist_ok=True, parents=True)
    tied = options.get("tied", False)
    said = ARGUMENTS | {"untie_embeddings_and_output_weights": not tied, "qk_layernorm": options.get("qk_norm", False)}
    args = argparse.Namespace(**said | (arguments or {}), attention_backend=Backend.auto, tensor_model_parallel_size=tp)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": model.sharded_state_dict(metadata=metadata(is_stacked))}
    dist_checkpointing.save(state, str(step), ("torch_dist", 1), content_metadata={"non_homogeneous_layers": not is_stacked})
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def load(folder: Path, is_stacked: bool, tp: int = 1, pp: int = 1, strict: str = "raise_all", **options) -> dict[str, Tensor]:
    """On every rank: what megatron-core's model has after it loaded a checkpoint, and nothing may be missing or left over."""
    model = gpt_model(tp, pp, **options)
    return _loaded(model, folder, is_stacked, strict)


def _loaded(model, folder: Path, is_stacked: bool, strict: str) -> dict[str, Tensor]:
    from megatron.core import dist_checkpointing

    wanted = {"model": model.sharded_state_dict(metadata=metadata(is_stacked))}
    model.load_state_dict(dist_checkpointing.load(wanted, str(folder), strict=strict)["model"])
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits(folder: Path, is_stacked: bool, tokens: Tensor, **options) -> Tensor:
    """fp32 [s, V] of megatron-core's model on one rank; tokens int64 [s]."""
    model = gpt_model(1, 1, **options)
    _loaded(model, folder, is_stacked, "assume_ok_unexpected")
    mask = torch.triu(torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool), 1)
    with torch.no_grad():
        return model(tokens[None], torch.arange(len(tokens))[None], mask)[0]


def optimizer_of(model, is_distributed: bool = True):
    """megatron-core's Adam over the model after one step on random gradients: the distributed optimizer, or each rank with all of it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # With torch's Adam, which keeps its step beside the moments, loading asks for one that no checkpoint has: the groups have it.
    take = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = lambda part, weight, tensors: take(
        part, weight, tensors | {"step": torch.as_tensor(float(part.optimizer.param_groups[0]["step"]))}
    )
    kind, make = torch.Tensor.type, torch.tensor
    torch.Tensor.type = lambda tensor, *args: kind(tensor, *args) if args else kind(tensor).replace("torch.", "torch.cuda.")
    torch.tensor = lambda *args, **options: make(*args, **options | ({"device": "cpu"} if options.get("device") == "cuda" else {}))
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=is_distributed, grad_reduce_in_fp32=True), model
    )
    options = {"lr": 1e-3, "min_lr": 1e-5, "clip_grad": 0.0, "weight_decay": 0.1, "use_distributed_optimizer": is_distributed}
    dtype = model.config.params_dtype
    options |= {"optimizer": "adam", "bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    optimizer = get_megatron_optimizer(OptimizerConfig(**options), [wrapped])
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for weight in model.parameters():
        weight.main_grad.copy_(torch.randn(weight.shape, generator=generator))
    for part in optimizer.chained_optimizers:
        part.prepare_grads()
        part.step_with_ready_grads()
    return optimizer


def save_with_optimizer(
    folder: Path, is_stacked: bool, tp: int = 1, form: str = "fully_reshardable", is_distributed: bool = True, **options
) -> None:
    from megatron.core import dist_checkpointing

    model = gpt_model(tp, 1, **options)
    optimizer = optimizer_of(model, is_distributed)
    step = folder / "iter_0000007"
    step.mkdir(exist_ok=True, parents=True)
    said = ARGUMENTS | {"untie_embeddings_and_output_weights": not options.get("tied", False), "lr": 1e-3, "min_lr": 1e-5}
    said |= {"lr_decay_style": "cosine", "lr_decay_iters": 100, "lr_warmup_iters": 3, "weight_decay": 0.1, "global_batch_size": 8}
    said |= {"train_iters": 100, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "clip_grad": 1.0}
    weights = model.sharded_state_dict(metadata=metadata(is_stacked))
    state = {"args": argparse.Namespace(**said), "checkpoint_version": 3.0, "iteration": 7, "model": weights}
    state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=metadata(is_stacked) | {"distrib_optim_sharding_type": form})
    dist_checkpointing.save(state, str(step), ("torch_dist", 1))


def load_with_optimizer(folder: Path, is_stacked: bool, tp: int = 1, **options) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
    """What the distributed optimizer holds after loading: name of this rank's weight -> its part of param, exp_avg, exp_avg_sq; groups."""
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model = gpt_model(tp, 1, **options)
    optimizer = optimizer_of(model)
    weights = model.sharded_state_dict(metadata=metadata(is_stacked))
    wanted = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata(is_stacked))}
    loaded = dist_checkpointing.load(wanted, str(folder), strict="raise_all")
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    if "opt_param_scheduler" in loaded:  # what Megatron-LM makes of its flags has to equal what the checkpoint says
        scheduler = OptimizerParamScheduler(optimizer, 0.0, 1e-3, 1e-5, 24, 800, "cosine", 0.1, 0.1, 800, "constant")
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
        assert scheduler.num_steps == 56
    part = optimizer.chained_optimizers[0]
    held = {name: weight for name, weight in model.named_parameters() if weight in part.model_param_group_index_map}
    states = {name: part._get_main_param_and_optimizer_states(weight) for name, weight in held.items()}
    states = {name: {key: state[key].clone() for key in ("param", "exp_avg", "exp_avg_sq")} for name, state in states.items()}
    return states, [{key: value for key, value in group.items() if key != "params"} for group in part.optimizer.param_groups]
