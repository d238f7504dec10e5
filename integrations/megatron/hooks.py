"""Megatron-Core's two sums outside the model: gradient finalisation and the gradient norm.

Finalisation adds up, over the tensor-parallel ranks, the gradients of norms (under sequence parallelism) and of q/k norms (always,
by their name). tpinv's come out of backward complete, each micro-batch's by itself; ``install_finalize_filter`` keeps Megatron from
adding them p times. It leaves every other parameter to the stock function, so stock and converted models can live in one process.

The norm of the optimizer is a sum over shards in an order of their own; ``convert_optimizer`` makes it exact (tpinv/optim.py).
"""

import functools
import logging
import sys

import megatron.core.distributed.finalize_model_grads  # noqa: F401  (the package exports a function of the same name)
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.utils import get_attr_wrapped_model
from torch.distributed.tensor import DTensor

from tpinv import optim

logger = logging.getLogger("tpinv")

OPTIMIZERS = ("FP32Optimizer", "Float16OptimizerWithFloat16Params", "DistributedOptimizer")
ELEMENTWISE = ("Adam", "SGD")


class _WithoutComplete:
    """A model chunk as finalisation sees it, without the parameters whose gradients are complete."""

    def __init__(self, chunk):
        self._chunk, self.ddp_config = chunk, chunk.ddp_config

    def named_parameters(self):
        named = get_attr_wrapped_model(self._chunk, "named_parameters")()
        return [(name, p) for name, p in named if not getattr(p, "tpinv_complete_grad", False)]


def install_finalize_filter() -> None:
    """Wraps Megatron's ``_allreduce_non_tensor_model_parallel_grads``, once per process. ``convert`` calls it."""
    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    stock = module._allreduce_non_tensor_model_parallel_grads
    if getattr(stock, "tpinv_filter", False):
        return

    @functools.wraps(stock)
    def filtered(model, *args, **kwargs):
        return stock([_WithoutComplete(chunk) for chunk in model], *args, **kwargs)

    filtered.tpinv_filter = True
    module._allreduce_non_tensor_model_parallel_grads = filtered
    module._allreduce_layernorm_grads = filtered


def convert_optimizer(optimizer):
    """Makes the gradient norm of a MegatronOptimizer (or ChainedOptimizer) exact, in place. Returns it. Idempotent.

    Which gradients a rank counts, over which group, and how gradients are scaled by the norm stays the optimizer's own business:
    its methods run with ``norm_fp32`` in the place of Megatron's ``get_grad_norm_fp32``.

    Raises:
        ValueError: an optimizer that is not elementwise (Muon) or takes the norm elsewhere, or data parallelism over more than two
            ranks without a fixed order.
    """
    _check_optimizer(optimizer)
    for each in [optimizer, *getattr(optimizer, "chained_optimizers", [])]:
        for name in ("get_grad_norm", "clip_grad_norm", "step"):
            method = getattr(each, name)
            if not hasattr(method, "tpinv_exact"):
                setattr(each, name, _with_exact_norm(method))
    logger.info("%s: the gradient norm is exact", type(optimizer).__name__)
    return optimizer


def _check_optimizer(optimizer) -> None:
    world = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        kind, inner = type(each).__name__, type(getattr(each, "optimizer", None)).__name__
        if kind not in OPTIMIZERS or not any(name in inner for name in ELEMENTWISE):
            raise ValueError(
                f"{kind} over {inner} is not covered: use one of {', '.join(OPTIMIZERS)} over an elementwise optimizer ({', '.join(ELEMENTWISE)})"
            )
        if world > 2 and not getattr(getattr(each, "ddp_config", None), "reduce_scatter_with_fp32_accumulation", False):
            raise ValueError(
                f"data parallelism over {world} ranks adds gradients in an order that depends on the buckets, and those on the tensor-parallel "
                "size; use at most 2, or the distributed optimizer with reduce_scatter_with_fp32_accumulation"
            )


def norm_fp32(grads_for_norm, norm_type: float = 2.0, grad_stats_parallel_group=None) -> float:
    """In place of megatron.core.optimizer.clip_grads.get_grad_norm_fp32: same arguments, exact sum. ValueError for DTensors."""
    grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else list(grads_for_norm)
    if any(isinstance(grad, DTensor) for grad in grads):
        raise ValueError("gradients are DTensors (Megatron-FSDP), whose norm is not covered; use DistributedDataParallel")
    # A rank that counts no gradient still takes part in the sum, which NCCL wants on the GPU.
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return optim.norm_of(grads, group=grad_stats_parallel_group, norm_type=float(norm_type), device=device).item()


def _with_exact_norm(method):
    @functools.wraps(method)
    def exact(*args, **kwargs):
        stock = megatron_optimizer.get_grad_norm_fp32
        megatron_optimizer.get_grad_norm_fp32 = norm_fp32
        try:
            return method(*args, **kwargs)
        finally:
            megatron_optimizer.get_grad_norm_fp32 = stock

    exact.tpinv_exact = True
    return exact
