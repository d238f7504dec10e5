"""Reshapes that every function here needs."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[..., C] -> [M, C]; also for M = 0."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with its last dimension dense, which kernels that take any other stride ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def output(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh ``y``, which nobody else holds, in its final shape, as the output of an autograd.Function. Not a view: autograd forbids
    callers to modify a view made inside a custom Function in place, which stock Megatron does with logits."""
    if y._is_view() or not y.is_contiguous():
        return torch.ops.aten._unsafe_view.default(y, list(shape))
    return y if y.shape == shape else y.resize_(shape)  # its sizes alone; a view costs the host four times as much
