"""Megatron-Core's two sums outside the model: gradient finalisation and the gradient norm.

Finalisation adds up, over the tensor-parallel ranks, the gradients of norms (under sequence parallelism) and of q/k norms (always,
by their name). tpinv's come out of backward complete, each micro-batch's by itself; ``install_finalize_filter`` keeps Megatron from
adding them p times. It leaves every other parameter to the stock function, so stock and converted models can live in one process.

The norm of the optimizer is a sum over shards in an order of their own; ``convert_optimizer`` makes it exact (tpinv/optim.py). An
optimizer of a converted model's parameters that was not told so is refused at its first step (``install_guards``): Megatron's own when it
asks for the norm, torch's ``clip_grad_norm_`` on such gradients, and any optimizer whose update is not elementwise.
"""

import functools
import logging
import sys

import megatron.core.distributed.finalize_model_grads  # noqa: F401  (the package exports a function of the same name)
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.utils import get_attr_wrapped_model
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpinv import optim
from tpinv.collectives import Ranks, agree, resolve
from tpinv.integrations.megatron import converted
from tpinv.integrations.megatron.guard import check_data_parallel, check_optimizer_config
from tpinv.integrations.megatron.modules import check_again

logger = logging.getLogger("tpinv")

OPTIMIZERS = ("FP32Optimizer", "Float16OptimizerWithFloat16Params", "DistributedOptimizer")
ELEMENTWISE = ("Adam", "AdamW", "FusedAdam", "SGD", "FusedSGD")
ELEMENTWISE_TOO = ("Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")  # torch's, without Megatron's optimizer
NORMS = ("get_grad_norm", "clip_grad_norm")


class _WithoutComplete:
    """A model chunk as finalisation sees it, without the parameters whose gradients are complete."""

    def __init__(self, chunk):
        self._chunk, self.ddp_config = chunk, chunk.ddp_config

    def named_parameters(self):
        complete = {id(p) for p, sharding in converted.sharded_parameters(self._chunk) if sharding is None}
        named = get_attr_wrapped_model(self._chunk, "named_parameters")()
        return [(name, p) for name, p in named if id(p) not in complete]


def install_finalize_filter() -> None:
    """Wraps Megatron's ``_allreduce_non_tensor_model_parallel_grads``, once per process. ``convert`` calls it."""
    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    stock = module._allreduce_non_tensor_model_parallel_grads
    if getattr(stock, "tpinv_filter", False):
        return

    @functools.wraps(stock)
    def filtered(model, *args, **kwargs):
        for chunk in model:
            for each in chunk.modules():
                if hasattr(each, "tpinv_accept"):
                    check_data_parallel(chunk.ddp_config, each.tpinv_accept)
                    check_again(each)
        return stock([_WithoutComplete(chunk) for chunk in model], *args, **kwargs)

    filtered.tpinv_filter = True
    module._allreduce_non_tensor_model_parallel_grads = filtered
    module._allreduce_layernorm_grads = filtered


def convert_optimizer(optimizer, *, accept=()):
    """Makes the gradient norm of a MegatronOptimizer (or ChainedOptimizer) exact, in place. Returns it. Idempotent.

    Which gradients a rank counts, over which group, and how gradients are scaled by the norm stays the optimizer's own business:
    its methods run with ``norm_fp32`` in the place of Megatron's ``get_grad_norm_fp32``. What a parameter is, sharded or whole, the modules of
    the converted model say.

    Args:
        optimizer: what get_megatron_optimizer returned.
        accept: names of settings of its OptimizerConfig that you have looked at.

    Raises:
        ValueError: an optimizer that is not elementwise (Muon) or takes the norm elsewhere, a setting that nobody has looked at
            (settings.py), or data parallelism over more than two ranks without a fixed order.
    """
    alone = not parallel_state.model_parallel_is_initialized()
    ranks = Ranks(None, 0, 1) if alone else resolve(parallel_state.get_model_parallel_group())
    agree(ranks, "megatron.convert_optimizer", {"optimizer": type(optimizer).__name__}, lambda: check_optimizer(optimizer, accept))
    for each in [optimizer, *getattr(optimizer, "chained_optimizers", [])]:
        _mark_parameters(each)
        for name in (*NORMS, "step"):
            method = getattr(each, name)
            if not hasattr(method, "tpinv_exact"):
                setattr(each, name, _with_exact_norm(each, method))
    logger.info("%s: the gradient norm is exact", type(optimizer).__name__)
    return optimizer


def check_optimizer(optimizer, accept) -> None:
    world = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        kind, inner = type(each).__name__, type(getattr(each, "optimizer", None)).__name__
        if kind not in OPTIMIZERS or inner not in ELEMENTWISE:
            raise ValueError(
                f"{kind} over {inner} is not covered: use one of {', '.join(OPTIMIZERS)} over an elementwise optimizer ({', '.join(ELEMENTWISE)})"
            )
        if hasattr(each, "config"):
            check_optimizer_config(each.config, accept)
        if problem := _states_problem(each.optimizer):
            raise ValueError(problem)
        if world > 2 and not getattr(getattr(each, "ddp_config", None), "reduce_scatter_with_fp32_accumulation", False):
            raise ValueError(
                f"data parallelism over {world} ranks adds gradients in an order that depends on the buckets, and those on the tensor-parallel "
                "size; use at most 2, or the distributed optimizer with reduce_scatter_with_fp32_accumulation"
            )


def _states_problem(optimizer) -> str | None:
    """States that TransformerEngine's Adam keeps in fp16 or fp8, with one scale for the part of a tensor that a rank holds."""
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "master_weight_dtype"):
        dtype = getattr(optimizer, name, torch.float32)
        if dtype not in (torch.float32, torch.bfloat16):
            kind = type(optimizer).__name__
            return f"{kind} with {name}={dtype}: such states carry a scale that is taken from a rank's shard; use float32 or bfloat16"
    return None


# Where an optimizer that keeps parameters of its own (float32, or a shard of the flat buffer) has the model's, and its own beside them.
MAIN_PARAMETERS = (
    ("float16_groups", "fp32_from_float16_groups"),
    ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
    ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ("model_fp32_groups", "shard_fp32_groups"),
)


def _parameters(optimizer):
    """(the model's parameter, the optimizer's own one for it) of a MegatronOptimizer."""
    pairs = []
    for model_groups, main_groups in MAIN_PARAMETERS:
        for group, mains in zip(getattr(optimizer, model_groups, []), getattr(optimizer, main_groups, []), strict=False):
            pairs += zip(group, mains, strict=False)
    return pairs or [(p, p) for p in (optimizer.get_parameters() if hasattr(optimizer, "get_parameters") else [])]


def _mark_parameters(optimizer) -> None:
    """Puts the marks by which Megatron's optimizer tells shards from replicas where the modules say they belong."""
    if hasattr(optimizer, "chained_optimizers"):
        return
    known = {id(p): sharding for model in converted.models() for p, sharding in converted.sharded_parameters(model)}
    for parameter, main in _parameters(optimizer):
        if id(parameter) in known:
            converted.mark(parameter, known[id(parameter)])
            if main is not None and main is not parameter:
                converted.mark(main, known[id(parameter)])


def install_guards() -> None:
    """Once per process; ``convert`` calls it. Optimizers of other parameters than converted models' are left alone."""
    classes = [megatron_optimizer.MegatronOptimizer]
    for kind in classes:
        classes += [sub for sub in kind.__subclasses__() if sub not in classes]
        for name in NORMS:
            stock = vars(kind).get(name)
            if stock is not None and not hasattr(stock, "tpinv_guard"):
                setattr(kind, name, _refused_unless_exact(stock))
    if not hasattr(clip_grad._get_total_norm, "tpinv_guard"):
        clip_grad._get_total_norm = _refused_for_converted(clip_grad._get_total_norm)
        register_optimizer_step_pre_hook(_refuse_what_is_not_elementwise)


def _refused_unless_exact(stock):
    @functools.wraps(stock)
    def guarded(self, *args, **kwargs):
        if megatron_optimizer.get_grad_norm_fp32 is not norm_fp32:  # not inside a method of a converted optimizer
            ours = set().union(*map(converted.parameter_ids, converted.models()))
            inner = getattr(self, "chained_optimizers", [self])
            if any(id(parameter) in ours for each in inner for parameter, _ in _parameters(each)):
                raise ValueError(
                    f"{type(self).__name__} holds parameters of a converted model, but its gradient norm is Megatron's, which depends on the "
                    "tensor-parallel size; call convert_optimizer(optimizer), or convert(model, tree=tree, optimizer=optimizer)"
                )
        return stock(self, *args, **kwargs)

    guarded.tpinv_guard = True
    return guarded


def _refused_for_converted(stock):
    @functools.wraps(stock)
    def guarded(tensors, *args, **kwargs):
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        ours = {id(p.grad) for model in converted.models() for p in model.parameters() if p.grad is not None}
        ours |= {id(p.main_grad) for model in converted.models() for p in model.parameters() if hasattr(p, "main_grad")}
        if any(id(tensor) in ours for tensor in tensors):
            raise ValueError(
                "torch's gradient norm counts this rank's shards of a converted model alone; use Megatron's optimizer through "
                "convert_optimizer(optimizer), or tpinv.clip_grad_norm_(model, ...), which asks the modules"
            )
        return stock(tensors, *args, **kwargs)

    guarded.tpinv_guard = True
    return guarded


def _refuse_what_is_not_elementwise(optimizer, args, kwargs) -> None:
    kind = type(optimizer).__name__
    problem = _states_problem(optimizer)
    if kind not in (*ELEMENTWISE, *ELEMENTWISE_TOO):
        problem = (
            f"{kind} updates parameters of a converted model, and is not known to treat every element alike, whatever shard it is in; use "
            f"an elementwise optimizer ({', '.join((*ELEMENTWISE, *ELEMENTWISE_TOO))})"
        )
    if problem is None or not (models := converted.models()):
        return
    ours = set().union(*map(converted.parameter_ids, models))
    ours |= {id(main) for model in models for p in model.parameters() if (main := getattr(p, "main_param", None)) is not None}
    if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(problem)


def norm_fp32(grads_for_norm, norm_type: float = 2.0, grad_stats_parallel_group=None) -> float | torch.Tensor:
    """In place of megatron.core.optimizer.clip_grads.get_grad_norm_fp32: same arguments, exact sum. Where Megatron scales by a tensor (0.19
    with TransformerEngine) it is one, float32 [1], and the host does not wait for it. ValueError for DTensors."""
    grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else list(grads_for_norm)
    if any(isinstance(grad, DTensor) for grad in grads):
        raise ValueError("gradients are DTensors (Megatron-FSDP), whose norm is not covered; use DistributedDataParallel")
    # A rank that counts no gradient still takes part in the sum, which NCCL wants on the GPU.
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    norm = optim.norm_of(grads, group=grad_stats_parallel_group, norm_type=float(norm_type), device=device)
    as_tensor = getattr(clip_grads, "multi_tensor_scale_tensor_impl", None) is not None and norm_type != float("inf")
    return norm.reshape(1) if as_tensor else norm.item()


def _with_exact_norm(optimizer, method):
    @functools.wraps(method)
    def exact(*args, **kwargs):
        _mark_parameters(optimizer)  # a parameter may have been replaced since
        stock = megatron_optimizer.get_grad_norm_fp32
        megatron_optimizer.get_grad_norm_fp32 = norm_fp32
        try:
            return method(*args, **kwargs)
        finally:
            megatron_optimizer.get_grad_norm_fp32 = stock

    exact.tpinv_exact = True
    return exact
