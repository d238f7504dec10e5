"""LayerNorm (arXiv 1607.06450)."""

import torch
from torch import Tensor

from tpinv.ops import norm
from tpinv.ops.registry import register
from tpinv.tree import ReductionTree

NAME = "layer_norm"


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tree: ReductionTree,
    group=None,
    sequence_parallel: bool = False,
    heads_parallel: bool = False,
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension. Everything else as in :func:`rms_norm`; bias: [H] in
    weight's dtype, or None."""
    ranks, settings = norm.settings_of(NAME, eps, tree, group, sequence_parallel, heads_parallel)
    return OPERATOR(x, weight, bias, *settings, ranks=ranks)


def _forward(x, weight, bias, eps, *_) -> Tensor:
    return norm.forward(x, weight, bias, eps, center=True)


def _backward(dy, x, weight, needs, *settings) -> tuple:
    return norm.backward(NAME, dy, x, weight, needs, *settings, center=True)


OPERATOR = register(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, {norm.SETTINGS}) -> Tensor",
    check=norm.check_norm,
    forward=_forward,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backward=_backward,
    kept="x weight",
    gradients="x weight bias",
    fake_backward=norm.fake_gradients,
    ranks=norm.asked,
    settings=norm.agreed,
)
