"""A residual added and the sum's RMSNorm, one after the other. Signature and bits of kernels/rows/add_norm.py."""

from torch import Tensor

from tpinv.reference.norm import norm


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [M, H] of one dtype, weight [H] -> y and hidden [M, H] in that dtype."""
    hidden = x + residual
    return norm(hidden, weight, None, eps, center=False), hidden
