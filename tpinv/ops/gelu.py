"""gelu (arXiv 1606.08415) whose bits depend on the element alone (reference/activation.py says why torch's do not)."""

import torch
from torch import Tensor

from tpinv import reference
from tpinv.ops import products
from tpinv.ops.registry import register


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu: ``approximate`` "none" (erf) or "tanh". Any shape, result and gradient in x's dtype.

    ValueError for another ``approximate``, or a dtype other than float32, bfloat16 and float16. RuntimeError in a backward pass with
    create_graph=True. Autocast changes nothing.
    """
    return OPERATOR(x, approximate)


def _check(x, approximate) -> None:
    reference.check_dtypes(x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} must be 'none' or 'tanh'")


def _forward(x, approximate) -> Tensor:
    return _backend(x).gelu(x.contiguous(), approximate == "tanh")


def _backward(dy, x, needs, approximate) -> tuple:
    return (_backend(x).gelu_backward(x.contiguous(), dy.contiguous(), approximate == "tanh"),)


def _backend(x: Tensor):
    return products.rows_backend("gelu", x)


OPERATOR = register(
    "gelu(Tensor x, str approximate) -> Tensor",
    check=_check,
    forward=_forward,
    fake=lambda x, approximate: torch.empty_like(x, memory_format=torch.contiguous_format),
    backward=_backward,
    kept="x",
    gradients="x",
)
