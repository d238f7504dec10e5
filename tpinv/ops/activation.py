"""silu, SwiGLU and gelu whose bits depend on the element alone.

On a CPU, ATen computes silu, sigmoid and tanh-gelu (and their gradients) of the last few elements of a row, those that do not fill
a vector, by another function than the others. Which elements those are depends on the row's width, and with column-parallel layers
the width depends on the tensor-parallel size. Here they are put together from exp, erf, tanh and IEEE arithmetic, which treat all
elements alike (tested), in fp32, rounded once. On a GPU silu and SwiGLU are kernels with the same arithmetic, and gelu is torch's: every
element has a thread of its own there.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpinv import reference
from tpinv.ops import products
from tpinv.ops.shapes import output, rows


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), elementwise; any shape, result and gradient in x's dtype: float32, bfloat16 or float16 (else ValueError)."""
    reference.check_dtypes(x=x)
    return _Silu.apply(x)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate, up] side by side in the last dimension: [..., 2 F] -> [..., F]. silu is rounded to x's dtype before
    it is multiplied, as in the two steps, whose bits these are. ValueError for an odd last dimension or another dtype than silu takes."""
    check_swiglu(x)
    if products.on_gpu(x):
        return _Swiglu.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def check_swiglu(x: Tensor) -> None:
    """The errors of :func:`swiglu`."""
    reference.check_dtypes(x=x)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x {tuple(x.shape)} must hold gate and up side by side: an even last dimension")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu: ``approximate`` "none" (erf) or "tanh". ValueError for another, or another dtype than silu takes."""
    reference.check_dtypes(x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r} must be 'none' or 'tanh'")
    if x.is_cuda:
        return torch.nn.functional.gelu(x, approximate=approximate)
    return _Gelu.apply(x, approximate == "tanh")


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        if products.on_gpu(x):
            from tpinv.kernels.rows import activation

            return activation.silu(x)
        wide = x.float()
        return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if products.on_gpu(x):
            from tpinv.kernels.rows import activation

            return activation.silu_backward(x, dy)
        wide = x.float()
        sigmoid = 1.0 / (1.0 + torch.exp(-wide))
        return (dy.float() * (sigmoid * (1.0 + wide * (1.0 - sigmoid)))).to(x.dtype)


class _Swiglu(torch.autograd.Function):
    """On a GPU: one kernel each way."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return swiglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return swiglu_backward(dy, *ctx.saved_tensors)


def swiglu_forward(x: Tensor) -> Tensor:
    """What autograd and the torch operator (operators.py) share, on a GPU, as :func:`swiglu_backward`."""
    from tpinv.kernels.rows import activation

    y = activation.swiglu(rows(x).contiguous())
    return output(y, (*x.shape[:-1], y.shape[-1]))


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    from tpinv.kernels.rows import activation

    return activation.swiglu_backward(rows(x).contiguous(), rows(dy).contiguous()).view(x.shape)


class _Gelu(torch.autograd.Function):
    """y = x F(x) with F the normal distribution function, or its tanh approximation; dy/dx = F(x) + x F'(x)."""

    @staticmethod
    def forward(ctx, x, tanh):
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        wide = x.float()
        return (wide * _distribution(wide, tanh)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        wide = x.float()
        distribution = _distribution(wide, ctx.tanh)
        if ctx.tanh:  # F = (1 + t) / 2, F' = (1 - t^2) / 2 times the derivative of t's argument
            t = 2.0 * distribution - 1.0
            density = 0.5 * (1.0 - t * t) * (math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * (wide * wide)))
        else:
            density = torch.exp(-0.5 * (wide * wide)) * (1.0 / math.sqrt(2.0 * math.pi))
        return (dy.float() * (distribution + wide * density)).to(x.dtype), None


def _distribution(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
