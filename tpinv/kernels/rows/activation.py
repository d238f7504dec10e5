"""silu and SwiGLU on the GPU, elementwise, one kernel each way. The arithmetic is that of tpinv.ops.activation: fp32, every named
result rounded once to the dtype, so that SwiGLU has the bits of silu(gate) * up and its gradients those of its two steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.rows.libm import exp
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

_BLOCK = 1024
_FLAGS = {"enable_fp_fusion": False}


@triton.jit
def _silu(x):
    return tl.div_rn(x, 1.0 + exp(-x))


@triton.jit
def _silu_grad(x):
    sigmoid = tl.div_rn(tl.zeros_like(x) + 1.0, 1.0 + exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@entry
@triton.jit
def silu_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, _silu(x).to(y_ptr.dtype.element_ty), mask=at < count)


@entry
@triton.jit
def silu_grad_kernel(x_ptr, dy_ptr, dx_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, (dy * _silu_grad(x)).to(dx_ptr.dtype.element_ty), mask=at < count)


@entry
@triton.jit
def swiglu_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """x [M, 2 width]: gate, then up. Grid: M, blocks of width."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + at, mask=at < width, other=0.0).to(tl.float32)
    active = _silu(gate).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + at, (active * up).to(y_ptr.dtype.element_ty), mask=at < width)


@entry
@triton.jit
def swiglu_grad_kernel(x_ptr, dy_ptr, dx_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + at, mask=at < width, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    active = _silu(gate).to(dtype).to(tl.float32)
    d_active = (dy * up).to(dtype).to(tl.float32)
    tl.store(dx_ptr + row * 2 * width + at, (d_active * _silu_grad(gate)).to(dtype), mask=at < width)
    tl.store(dx_ptr + row * 2 * width + width + at, (dy * active).to(dtype), mask=at < width)


@on_device_of_first
def silu(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        silu_kernel[(ceil_div(x.numel(), _BLOCK),)](x, y, x.numel(), BLOCK=_BLOCK, **_FLAGS)
    return y


@on_device_of_first
def silu_backward(x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        silu_grad_kernel[(ceil_div(x.numel(), _BLOCK),)](x, dy, dx, x.numel(), BLOCK=_BLOCK, **_FLAGS)
    return dx


@on_device_of_first
def swiglu(x: Tensor) -> Tensor:
    """[M, 2 F] contiguous, gate then up -> [M, F]."""
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    if y.numel():
        swiglu_kernel[(len(x), ceil_div(y.shape[1], _BLOCK))](x, y, y.shape[1], BLOCK=_BLOCK, **_FLAGS)
    return y


@on_device_of_first
def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """x [M, 2 F], dy [M, F], contiguous -> dx [M, 2 F]."""
    dx = torch.empty_like(x)
    if dy.numel():
        swiglu_grad_kernel[(len(x), ceil_div(dy.shape[1], _BLOCK))](x, dy, dx, dy.shape[1], BLOCK=_BLOCK, **_FLAGS)
    return dx
