"""Gradient clipping. TorchTitan's trainers call ``torchtitan.distributed.utils.clip_grad_norm_`` and offer no hook, and its norm adds
the squares of a shard before those of the ranks. ``install`` puts a function in its place that counts the gradients of invariant
modules exactly (tpinv/optim.py) and leaves those of any other model to the stock one.
"""

from torch import Tensor
from torchtitan.distributed import utils

from tpinv import optim
from tpinv.sharding import find_shardings


def install() -> None:
    """Idempotent. Called by the override, so only in processes whose user asked for it."""
    if not hasattr(utils.clip_grad_norm_, "stock"):
        clip_grad_norm_.stock = utils.clip_grad_norm_
        utils.clip_grad_norm_ = clip_grad_norm_


def clip_grad_norm_(
    parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, *, group=None, **options
) -> Tensor:
    """As the stock function. The sum of squares is one of integers, so FSDP and TP need no order; what is cut over which ranks is what the
    modules and the placements of DTensors say. ``group``: see :func:`tpinv.grad_norm`."""
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    ours = [holder is not None for holder in find_shardings(parameters)]
    if not any(ours):
        return clip_grad_norm_.stock(parameters, max_norm, norm_type, error_if_nonfinite, **options)
    if not all(ours):
        raise ValueError(f"{len(ours) - sum(ours)} of {len(ours)} parameters are not of invariant modules; clip them separately")
    return optim.clip_grad_norm_(parameters, max_norm, group=group, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite)
