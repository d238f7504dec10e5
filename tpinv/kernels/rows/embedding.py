"""The gradient of an embedding table on the GPU: row v is one chain over the tokens with id v, in token order.

Tokens are sorted by id, stably, so that those of one id are neighbours and in order. The program of the first of them adds up all of
them; the others leave at once. No atomics, no counting on the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.rows.pairwise import absent
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

_AHEAD = 8  # tokens of an id that are loaded before they are added
_COLUMNS = 512


@triton.jit
def _chain(acc, dy_ptr, ids_ptr, order_ptr, at, tokens, row, col, cols, START: tl.constexpr, COUNT: tl.constexpr):
    """acc + token ``at`` + token ``at + 1`` ..., as far as they have this id, ``row``."""
    if COUNT == START:
        return acc
    else:
        same = tl.load(ids_ptr + at + START, mask=at + START < tokens, other=-1) == row
        token = tl.load(order_ptr + at + START, mask=same, other=0)
        x = tl.load(dy_ptr + token * cols + col, mask=tl.where(same, col, cols) < cols, other=0.0).to(tl.float32)
        acc = acc + tl.where(same, x, absent(x))
        return _chain(acc, dy_ptr, ids_ptr, order_ptr, at, tokens, row, col, cols, START + 1, COUNT)


@entry
@triton.jit
def sum_by_id_kernel(dy_ptr, ids_ptr, order_ptr, out_ptr, tokens, rows, cols, AHEAD: tl.constexpr, COLUMNS: tl.constexpr):
    """ids, order int64 [tokens]: sorted ids and the tokens they come from. out [rows, cols], zero where no token writes."""
    at = tl.program_id(0)
    row = tl.load(ids_ptr + at)
    before = tl.load(ids_ptr + at - 1, mask=at > 0, other=-1)
    if (row != before) & (row >= 0) & (row < rows):
        col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((COLUMNS,), tl.float32)
        more = row >= 0
        while more:
            acc = _chain(acc, dy_ptr, ids_ptr, order_ptr, at, tokens, row, col, cols, 0, AHEAD)
            at += AHEAD
            more = tl.load(ids_ptr + at, mask=at < tokens, other=-1) == row
        tl.store(out_ptr + row * cols + col, acc.to(out_ptr.dtype.element_ty), mask=col < cols)


@on_device_of_first
def sum_by_id(ids: Tensor, dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, H] in ``dtype``, rounded once. ids int64 [M]; those outside [0, rows) are skipped. dy [M, H]."""
    dy = dy.contiguous()
    out = torch.zeros(rows, dy.shape[1], dtype=dtype, device=dy.device)
    by_id, order = torch.sort(ids, stable=True)
    if dy.numel() and rows:
        grid = (len(ids), ceil_div(dy.shape[1], _COLUMNS))
        sum_by_id_kernel[grid](dy, by_id, order, out, len(ids), rows, dy.shape[1], AHEAD=_AHEAD, COLUMNS=_COLUMNS)
    return out
