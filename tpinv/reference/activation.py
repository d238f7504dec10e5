"""silu and SwiGLU whose bits depend on the element alone. As kernels/rows/activation.py.

On a CPU, ATen computes silu, sigmoid and tanh-gelu (and their gradients) of the last few elements of a row, those that do not fill
a vector, by another function than the others. Which elements those are depends on the row's width, and with column-parallel layers
the width depends on the tensor-parallel size. Here they are put together from exp, erf, tanh and IEEE arithmetic, which treat all
elements alike (tested), in fp32, rounded once.
"""

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) in x's dtype."""
    wide = x.float()
    return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)


def silu_backward(x: Tensor, dy: Tensor) -> Tensor:
    wide = x.float()
    sigmoid = 1.0 / (1.0 + torch.exp(-wide))
    return (dy.float() * (sigmoid * (1.0 + wide * (1.0 - sigmoid)))).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """[M, 2 F], gate then up -> [M, F]. silu(gate) is rounded to x's dtype, then multiplied and rounded."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """x [M, 2 F], dy [M, F] -> dx [M, 2 F]: the gradients of the two steps."""
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([silu_backward(gate, dy * up), dy * silu(gate)], dim=-1)
