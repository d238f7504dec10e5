"""gelu on the GPU, elementwise, one kernel each way: y = x F(x) with F the normal distribution function (erf), or its tanh approximation;
dx = dy (F(x) + x F'(x)).

The arithmetic is that of tpinv.reference.activation, in fp32, rounded once. torch's own kernel loads vectors where a tensor's address
and length allow it and single elements elsewhere; here every element has one way through one program, wherever it lies.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.rows.libm import erf, exp, tanh
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

_BLOCK = 1024
_FLAGS = {"enable_fp_fusion": False}

# What the reference multiplies by, products of Python's floats: rounded to fp32 once, where they meet a tensor.
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
ONE_OVER_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
CUBIC = tl.constexpr(0.044715)
CUBIC_3 = tl.constexpr(3.0 * 0.044715)


@triton.jit
def _distribution(x, TANH: tl.constexpr):
    if TANH:
        return 0.5 * (1.0 + tanh((x + (x * x * x) * CUBIC) * SQRT_2_OVER_PI))
    else:
        return 0.5 * (1.0 + erf(x * SQRT_HALF))


@triton.jit
def _density(x, distribution, TANH: tl.constexpr):
    """F' of the erf form; of the tanh form, with t = 2 F - 1, (1 - t^2) / 2 times the derivative of t's argument."""
    if TANH:
        t = 2.0 * distribution - 1.0
        return 0.5 * (1.0 - t * t) * ((1.0 + (x * x) * CUBIC_3) * SQRT_2_OVER_PI)
    else:
        return exp(-0.5 * (x * x)) * ONE_OVER_SQRT_2PI


@entry
@triton.jit
def gelu_kernel(x_ptr, y_ptr, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * _distribution(x, TANH)).to(y_ptr.dtype.element_ty), mask=at < count)


@entry
@triton.jit
def gelu_grad_kernel(x_ptr, dy_ptr, dx_ptr, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    distribution = _distribution(x, TANH)
    dx = dy * (distribution + x * _density(x, distribution, TANH))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < count)


@on_device_of_first
def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x, any shape -> x F(x) in its dtype."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        gelu_kernel[(ceil_div(x.numel(), _BLOCK),)](x, y, x.numel(), TANH=tanh, BLOCK=_BLOCK, **_FLAGS)
    return y


@on_device_of_first
def gelu_backward(x: Tensor, dy: Tensor, tanh: bool) -> Tensor:
    """dx, contiguous, in x's dtype."""
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        gelu_grad_kernel[(ceil_div(x.numel(), _BLOCK),)](x, dy, dx, x.numel(), TANH=tanh, BLOCK=_BLOCK, **_FLAGS)
    return dx
