"""What takes this rank's part of a parameter for the whole of it is refused: torch's gradient clipping, and optimizers that add up elements.

``torch.nn.utils.clip_grad_norm_`` (and ``get_total_norm``) counts the elements that a rank holds, so that every rank scales its gradients by a norm of its own, and
what is whole on all of them drifts apart. An optimizer that looks at a parameter as a matrix (Muon, Adafactor, Shampoo), or at its norm (LAMB),
updates a part otherwise than the whole. Neither says a word, and both give other weights at every number of ranks.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpinv.sharding import find_shardings, grads_of_parts

# By name. ZeRO holds whole parameters of other optimizers, which are looked at themselves.
ELEMENTWISE = {
    "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "SGD", "FusedAdam", "FusedSGD",
    "ZeroRedundancyOptimizer",
}  # fmt: skip


def install() -> None:
    """Once per process; the first ShardedModule among ranks calls it. What belongs to other modules is left alone."""
    if not hasattr(clip_grad._get_total_norm, "tpinv_parts"):
        nn.utils.get_total_norm = clip_grad._get_total_norm = _refused_for_parts(clip_grad._get_total_norm)
        register_optimizer_step_pre_hook(_refuse_what_is_not_elementwise)


def _refused_for_parts(stock):
    @functools.wraps(stock)
    def guarded(tensors, *args, **kwargs):
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        parts = grads_of_parts()
        if any(id(tensor) in parts for tensor in tensors):
            raise ValueError(
                "torch's gradient norm takes this rank's part of a gradient for the whole: every rank would scale by another one; use "
                "tpinv.clip_grad_norm_(model, max_norm) or tpinv.grad_norm(model)"
            )
        return stock(tensors, *args, **kwargs)

    guarded.tpinv_parts = True
    return guarded


def _refuse_what_is_not_elementwise(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    kind = type(optimizer)
    if kind.__name__ in ELEMENTWISE or getattr(kind, "elementwise", False) is True or torch.compiler.is_compiling():
        return
    holders = find_shardings([p for group in optimizer.param_groups for p in group["params"]])
    parts = [h for h in holders if h is not None and h.sharding is not None and h.sharding.dim is not None and h.sharding.ranks.size > 1]
    if parts:
        raise ValueError(
            f"{kind.__name__} updates {parts[0].name}, {parts[0].sharding}, and is not known to treat every element alike, whatever part it is in; "
            f"use an elementwise optimizer ({', '.join(sorted(ELEMENTWISE))}), or set {kind.__name__}.elementwise = True if it is one"
        )
