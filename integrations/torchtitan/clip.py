"""Gradient clipping. TorchTitan's trainers call ``torchtitan.distributed.utils.clip_grad_norm_`` and offer no hook, and its norm adds
the squares of a shard before those of the ranks. ``install`` puts a function in its place that counts the gradients of invariant
modules exactly (tpinv/optim.py) and leaves those of any other model to the stock one.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.distributed import utils

from tpinv.integrations.torchtitan.module import counted_parameters, local
from tpinv.optim import norm_of, scale_to_norm_


def install() -> None:
    """Idempotent. Called by the override, so only in processes whose user asked for it."""
    if not hasattr(utils.clip_grad_norm_, "stock"):
        clip_grad_norm_.stock = utils.clip_grad_norm_
        utils.clip_grad_norm_ = clip_grad_norm_


@torch.no_grad()
def clip_grad_norm_(
    parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, *, group=None, **options
) -> Tensor:
    """As the stock function. The sum of squares is one of integers over all ranks of the job (or of ``group``), so FSDP and TP need no
    order."""
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    counted = counted_parameters()
    ours = [id(parameter) in counted for parameter in parameters]
    if not any(ours):
        return clip_grad_norm_.stock(parameters, max_norm, norm_type, error_if_nonfinite, **options)
    if not all(ours):
        raise ValueError(f"{len(ours) - sum(ours)} of {len(ours)} parameters are not of invariant modules; clip them separately")
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    grads = [local(parameter.grad) for parameter in parameters]
    of_this_rank = [grad for parameter, grad in zip(parameters, grads, strict=True) if _counts(parameter.grad, counted[id(parameter)])]
    norm = norm_of(of_this_rank, group=group, norm_type=norm_type, device=grads[0].device if grads else None)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the total norm of the gradients is {norm.item()}, so it cannot be clipped")
    scale_to_norm_(grads, max_norm, norm)
    return norm


def _counts(grad: Tensor, plain: bool) -> bool:
    """Whether this rank adds its part of the gradient; ``plain`` if it is no DTensor, which knows."""
    if not isinstance(grad, DTensor):
        return plain
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError(f"a gradient of placements {grad.placements} is not reduced yet; clip after the reduction")
    return all(
        not placement.is_replicate() or at == 0 for placement, at in zip(grad.placements, grad.device_mesh.get_coordinate(), strict=True)
    )
