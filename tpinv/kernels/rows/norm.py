"""RMSNorm and LayerNorm on the GPU, with the bits of tpinv.ops.norm's arithmetic: one kernel forward, two backward.

    norm            y, one pass over x
    norm_backward   dx and the statistics of each row in one pass; the parameters' gradients as sums over rows, by the tree of
                    kernels/sums.py, whose first level forms the terms dy * normalised while it loads them

A program holds whole rows, and several short ones (q/k norms): a row's bits depend on that row alone.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.rows import sums
from tpinv.kernels.rows.pairwise import absent, row_tree
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry
from tpinv.tree import ReductionTree

_ELEMENTS = 4096  # of a program, if its rows are shorter than that
_TERM_COLUMNS = 256  # more would spill: 32 rows of two operands are in flight
_FLAGS = {"enable_fp_fusion": False}


@triton.jit
def _mean(x, present, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return row_tree(tl.where(present, x, absent(x)), ROWS, COLUMNS) * inverse


@triton.jit
def _normalise(x, present, inverse, eps, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] -> normalised x, the rows' 1/sqrt(mean square + eps), the rows' means (0 unless CENTER)."""
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTER:
        mean = _mean(x, present, inverse, ROWS, COLUMNS)
        x = x - mean[:, None]
    scale = tl.rsqrt(_mean(x * x, present, inverse, ROWS, COLUMNS) + eps)
    return x * scale[:, None], scale, mean


@entry
@triton.jit
def norm_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, rows, cols, inverse, eps,
    CENTER: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLUMNS)[None, :]
    present = (row < rows) & (col < cols)
    x = tl.load(x_ptr + row * cols + col, mask=present, other=0.0).to(tl.float32)
    normalised, _, _ = _normalise(x, present, inverse, eps, CENTER, ROWS, COLUMNS)
    y = normalised * tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(b_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=present)


@entry
@triton.jit
def norm_dx_kernel(
    x_ptr, w_ptr, dy_ptr, dx_ptr, scale_ptr, mean_ptr, rows, cols, inverse, eps,
    CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLUMNS)[None, :]
    present = (row < rows) & (col < cols)
    x = tl.load(x_ptr + row * cols + col, mask=present, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * cols + col, mask=present, other=0.0).to(tl.float32)
    normalised, scale, mean = _normalise(x, present, inverse, eps, CENTER, ROWS, COLUMNS)
    g = dy * tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dx = g - normalised * _mean(g * normalised, present, inverse, ROWS, COLUMNS)[:, None]
    if CENTER:
        dx = dx - _mean(g, present, inverse, ROWS, COLUMNS)[:, None]
    dx = dx * scale[:, None]
    tl.store(dx_ptr + row * cols + col, dx.to(dx_ptr.dtype.element_ty), mask=present)
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(scale_ptr + at, scale, mask=at < rows)
    tl.store(mean_ptr + at, mean, mask=at < rows)


@triton.jit
def _terms(x_ptr, dy_ptr, scale_ptr, mean_ptr, first, col, cols, present, tokens, heads, START: tl.constexpr, COUNT: tl.constexpr):
    """The tree over dy * normalised of rows first + START ... + COUNT, of which ``present`` exist."""
    if COUNT == 1:
        row = first + START
        if heads != 1:  # rows in the order (head, token) lie in memory as (token, head)
            row = (row % tokens) * heads + row // tokens
        here = tl.where(col < cols, present, 0) > START
        x = tl.load(x_ptr + row * cols + col, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * cols + col, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=present > START, other=0.0)
        mean = tl.load(mean_ptr + row, mask=present > START, other=0.0)
        return dy * ((x - mean) * scale)
    else:
        left = _terms(x_ptr, dy_ptr, scale_ptr, mean_ptr, first, col, cols, present, tokens, heads, START, COUNT // 2)
        right = _terms(x_ptr, dy_ptr, scale_ptr, mean_ptr, first, col, cols, present, tokens, heads, START + COUNT // 2, COUNT // 2)
        return tl.where(present > START + COUNT // 2, left + right, left)


@entry
@triton.jit(do_not_specialize=["first", "leaves", "length", "shrink", "pitch", "tokens"])
def norm_terms_kernel(
    x_ptr, dy_ptr, scale_ptr, mean_ptr, out_ptr, first, leaves, length, shrink, pitch, cols, tokens, heads,
    FAN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums.column_sum_kernel on dy * normalised: out [groups, blocks, cols]. Grid: blocks, groups, column blocks."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    col = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start, count = sums.group_rows(group, first, leaves, length, shrink, pitch)
    present = count - block * FAN
    if present > 0:
        total = _terms(x_ptr, dy_ptr, scale_ptr, mean_ptr, start + block * FAN, col, cols, present, tokens, heads, 0, FAN)
        out_row = group.to(tl.int64) * tl.num_programs(0) + block
        tl.store(out_ptr + out_row * cols + col, total, mask=col < cols)


def _tile(cols: int) -> dict:
    columns = triton.next_power_of_2(max(cols, 2))
    return {"ROWS": max(1, _ELEMENTS // columns), "COLUMNS": columns, "num_warps": 4 if columns <= 4096 else 8} | _FLAGS


@functools.cache
def _inverse(cols: int) -> float:
    """What torch multiplies by on a GPU where a tensor is divided by ``cols``: 1 / cols in fp32."""
    return (1.0 / torch.tensor(float(cols))).item() if cols else 0.0


@on_device_of_first
def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """x [M, H] contiguous, weight and bias [H] -> y [M, H] in x's dtype. ``center``: LayerNorm, else RMSNorm."""
    y = torch.empty_like(x)
    rows, cols = x.shape
    if x.numel():
        tile = _tile(cols)
        norm_kernel[(ceil_div(rows, tile["ROWS"]),)](
            x, weight, weight if bias is None else bias, y, rows, cols, _inverse(cols), eps, CENTER=center, BIAS=bias is not None, **tile
        )
    return y


@on_device_of_first
def norm_backward(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, center: bool, tree: ReductionTree, rank: int, ranks: int,
    *, heads: int = 1, bias: bool = False, terms: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx [M, H] in x's dtype, and the values [S, H] (with ``bias`` [S, 2 H]: weight's, then bias's) of this rank's subtrees.

    x, dy [M, H] contiguous, rows (token, head) in memory; the sum over rows takes them in the order (head, token).
    Without ``terms`` the second is None.
    """
    dx = torch.empty_like(x)
    rows, cols = x.shape
    scale, mean = x.new_empty(2, rows, dtype=torch.float32)
    if x.numel():
        tile = _tile(cols)
        norm_dx_kernel[(ceil_div(rows, tile["ROWS"]),)](
            x, weight, dy, dx, scale, mean, rows, cols, _inverse(cols), eps, CENTER=center, **tile
        )
    if not terms:
        return dx, None

    def first_level(partial: Tensor, groups: sums.Groups, grid: tuple[int, int]) -> None:
        norm_terms_kernel[(*grid, ceil_div(cols, _TERM_COLUMNS))](
            x, dy, scale, mean, partial, *groups, cols, rows // heads, heads, FAN=sums.FAN, COLUMNS=_TERM_COLUMNS, **_FLAGS
        )

    values = sums.tree_of_rows(first_level, rows, cols, x.device, tree, rank, ranks)
    if bias:
        by_head = dy if heads == 1 else dy.view(-1, heads, cols).transpose(0, 1).reshape(rows, cols)
        values = torch.cat([values, sums.column_sum(by_head, tree, rank, ranks)], dim=1)
    return dx, values
