"""A residual added and the sum's RMSNorm in one launch: what stands between two blocks of a decoder, where decoding spends time on launches.

    hidden = x + residual, rounded to the dtype          y = rms_norm(hidden, weight, eps)

The bytes of the two operators one after the other: the norm reads what was rounded, and is norm.py's own arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.rows import norm
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry


@entry
@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    x_ptr, residual_ptr, w_ptr, hidden_ptr, y_ptr, rows, cols, inverse, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLUMNS)[None, :]
    present = (row < rows) & (col < cols)
    x = tl.load(x_ptr + row * cols + col, mask=present, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * cols + col, mask=present, other=0.0).to(tl.float32)
    hidden = (x + residual).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * cols + col, hidden, mask=present)
    normalised, _, _ = norm._normalise(hidden.to(tl.float32), present, inverse, eps, False, ROWS, COLUMNS)
    y = normalised * tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=present)


@on_device_of_first
def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [M, H] of one dtype, contiguous, weight [H] -> y and hidden [M, H] in that dtype. ValueError for others."""
    if x.dim() != 2 or x.shape != residual.shape or x.dtype != residual.dtype or weight.shape != x.shape[1:]:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (x, residual, weight))
        raise ValueError(f"x, residual and weight are {shapes}; they must be [M, H] twice, of one dtype, and [H]")
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    hidden, y = torch.empty_like(x), torch.empty_like(x)
    rows, cols = x.shape
    if x.numel():
        tile = norm._tile(cols)
        add_norm_kernel[(ceil_div(rows, tile["ROWS"]),)](x, residual, weight, hidden, y, rows, cols, norm._inverse(cols), eps, **tile)
    return y, hidden
