"""Rotary embedding of queries and keys in place, one launch: every product and sum rounded to the dtype, as torch's operators do one by one.

    first' = first cos - second sin          second' = second cos + first sin

A head's two halves, or (``interleaved``) its even and odd elements. Nothing is added over anything, so there is no order.
"""

import triton
import triton.language as tl
from torch import Tensor

from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

_HEADS = 8  # of a program: one head each would be 300,000 programs in a prefill of 8192 tokens
_FLAGS = {"enable_fp_fusion": False}


@entry
@triton.jit(do_not_specialize=["q_s", "k_s", "positions_s"])
def rope_kernel(
    position_ptr, q_ptr, k_ptr, table_ptr, q_s, k_s, positions_s, q_heads, all_heads, WIDTH: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, blocks of HEADS heads, of queries and then of keys. table_ptr [positions, 2 HALF]: cos, then sin."""
    token = tl.program_id(0).to(tl.int64)
    head, i = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, BLOCK)[None, :]
    position = tl.load(position_ptr + token * positions_s).to(tl.int64)
    cos = tl.load(table_ptr + position * 2 * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(table_ptr + position * 2 * HALF + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, HALF + i
    of_q, of_k = (head < q_heads) & (i < HALF), (head >= q_heads) & (head < all_heads) & (i < HALF)
    _turn(q_ptr + token * q_s + head * WIDTH, first, second, cos, sin, of_q)
    _turn(k_ptr + token * k_s + (head - q_heads) * WIDTH, first, second, cos, sin, of_k)


@triton.jit
def _turn(at, first, second, cos, sin, inside):
    """Pairs at ``at`` + first and second, in place. A block with none of them costs no memory."""
    dtype: tl.constexpr = at.dtype.element_ty
    x = tl.load(at + first, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + second, mask=inside, other=0.0).to(tl.float32)
    left = (x * cos).to(dtype).to(tl.float32) - (y * sin).to(dtype).to(tl.float32)
    right = (y * cos).to(dtype).to(tl.float32) + (x * sin).to(dtype).to(tl.float32)
    tl.store(at + first, left.to(dtype), mask=inside)
    tl.store(at + second, right.to(dtype), mask=inside)


@on_device_of_first
def rotate(query: Tensor, key: Tensor | None, positions: Tensor, table: Tensor, width: int, *, interleaved: bool = False) -> None:
    """query [M, h width], key [M, g width] or None, of unit stride in the last dimension, change in place.

    Args:
        positions: [M], integers.
        table: [positions, r] in query's dtype, contiguous: r / 2 cosines, then as many sines. Elements of a head past r stay as they are.
        width: of a head, at least r.

    Raises:
        ValueError: tensors that do not fit.
    """
    given = [query, *([] if key is None else [key])]
    fits = all(t.dim() == 2 and len(t) == len(positions) and t.stride(1) == 1 and t.dtype == table.dtype for t in given)
    if not fits or any(t.shape[1] % width for t in given) or table.dim() != 2 or table.shape[1] % 2 or not table.is_contiguous():
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (*given, positions, table))
        raise ValueError(
            f"query, key, positions and table are {shapes}; they must be [M, heads x {width}], [M] and contiguous [n, r] of one dtype"
        )
    if table.shape[1] > width:
        raise ValueError(f"table has rows of {table.shape[1]}, more than the heads' width {width}")
    heads = [t.shape[1] // width for t in given]
    if not len(positions):
        return
    half = table.shape[1] // 2
    rope_kernel[(len(positions), ceil_div(sum(heads), _HEADS))](
        positions, query, query if key is None else key, table, query.stride(0), given[-1].stride(0), positions.stride(0), heads[0],
        sum(heads), WIDTH=width, HALF=half, INTERLEAVED=interleaved, BLOCK=max(16, triton.next_power_of_2(half)), HEADS=_HEADS,
        num_warps=2, **_FLAGS,
    )  # fmt: skip
