"""RMSNorm (arXiv 1910.07467)."""

import torch
from torch import Tensor

from tpinv.ops import norm
from tpinv.ops.registry import register
from tpinv.tree import ReductionTree

NAME = "rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    heads_parallel: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., H]; weight: [H], whole on every rank. float32, bfloat16 or float16; the two may differ. Autocast casts neither.
        eps: at least 0.
        tree: orders the sum over rows in the gradient of weight.
        group: the ranks that share the rows. Used with one of the two flags; where neither is set, a group that is given agrees on that.
        sequence_parallel: dimension 0 of x is this rank's p-th part of the tokens, as long on every rank.
        heads_parallel: x is [..., heads/p, H] and this rank holds a p-th part of the heads (Megatron's q/k norms).

    Returns [..., H] in x's dtype. dx is local to a row; dweight sums over all rows of all ranks and is full on every rank.

    Raises:
        ValueError, on every rank that shares the rows: shapes that do not fit or differ between ranks, both flags at once, p not dividing
            the leaves, eps below 0 or not finite.
        RuntimeError: in a backward pass with create_graph=True.
    """
    ranks, settings = norm.settings_of(NAME, eps, tree, group, sequence_parallel, heads_parallel)
    return OPERATOR(x, weight, *settings, ranks=ranks)


def _check(x, weight, *settings) -> None:
    norm.check_norm(x, weight, None, *settings)


def _forward(x, weight, eps, *_) -> Tensor:
    return norm.forward(x, weight, None, eps, center=False)


def _backward(dy, x, weight, needs, *settings) -> tuple:
    return norm.backward(NAME, dy, x, weight, needs, *settings, center=False)[:2]


OPERATOR = register(
    f"{NAME}(Tensor x, Tensor weight, {norm.SETTINGS}) -> Tensor",
    check=_check,
    forward=_forward,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backward=_backward,
    kept="x weight",
    gradients="x weight",
    ranks=norm.asked,
    settings=norm.agreed,
)
