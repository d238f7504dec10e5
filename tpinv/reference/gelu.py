"""gelu whose bits depend on the element alone (activation.py says why torch's do not). As kernels/rows/gelu.py."""

import math

import torch
from torch import Tensor


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x F(x) with F the normal distribution function, or its tanh approximation, in x's dtype."""
    wide = x.float()
    return (wide * _distribution(wide, tanh)).to(x.dtype)


def gelu_backward(x: Tensor, dy: Tensor, tanh: bool) -> Tensor:
    """dy (F(x) + x F'(x))."""
    wide = x.float()
    distribution = _distribution(wide, tanh)
    if tanh:  # F = (1 + t) / 2, F' = (1 - t^2) / 2 times the derivative of t's argument
        t = 2.0 * distribution - 1.0
        density = 0.5 * (1.0 - t * t) * (math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * (wide * wide)))
    else:
        density = torch.exp(-0.5 * (wide * wide)) * (1.0 / math.sqrt(2.0 * math.pi))
    return (dy.float() * (distribution + wide * density)).to(x.dtype)


def _distribution(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
