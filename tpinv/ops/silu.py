"""silu whose bits depend on the element alone (reference/activation.py says why torch's do not)."""

import torch
from torch import Tensor

from tpinv import reference
from tpinv.ops import products
from tpinv.ops.registry import register


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), elementwise; any shape, result and gradient in x's dtype: float32, bfloat16 or float16 (else ValueError).
    Autocast changes neither. RuntimeError in a backward pass with create_graph=True."""
    return OPERATOR.of_one(x)


def _check(x) -> None:
    reference.check_dtypes(x=x)


def _forward(x) -> Tensor:
    return products.rows_backend("activation", x).silu(x.contiguous())


def _backward(dy, x, needs) -> tuple:
    return (products.rows_backend("activation", x).silu_backward(x.contiguous(), dy.contiguous()),)


OPERATOR = register(
    "silu(Tensor x) -> Tensor",
    check=_check,
    forward=_forward,
    fake=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    backward=_backward,
    kept="x",
    gradients="x",
)
