"""Attention on the GPU whose bits depend on one query head, its keys and its values, and nothing else.

Three kernels, FlashAttention-2's recurrences (arXiv 2307.08691) in fixed blocks and without atomics:

    forward     a program per query block: out and the row's log2 of sum(exp2); key blocks in increasing order from key 0
    dq          a program per query block: key blocks in increasing order
    dk, dv      a program per key block and query head: query blocks in increasing order; then, for grouped queries, one chain
                over the heads of the group, in fp32

What libraries let vary is fixed here: no split of the keys by how busy the GPU is, no atomics, block sizes by head width and dtype
alone. They enter the bits (the softmax is rescaled once a block), so unlike the products' tiles they are part of the contract on GPUs:
``BLOCKS``. A row also keeps its bits when the sequence grows: what the mask hides adds zeros, if it is finite (0 * NaN is NaN).

Sequences of different lengths can lie one behind another in one tensor, a pack. A program of a pack looks up where its sequence starts
and ends and then does what it does for a batch: blocks are counted from the first row of the sequence, so it has the bits it has alone.

Multiply-adds are written out and contraction is off, so that no specialization of the compiler decides a rounding.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.reference.attention import Pack
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

# head width up to -> (query rows, keys, warps, stages): forward, dq; (keys, query rows, warps, stages): dk and dv. fp32 is for tests.
BLOCKS = {
    2: {
        64: ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    4: {128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)), 256: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))},
}
MAX_WIDTH = 256
LOG2E = 1.4426950408889634
DYNAMIC = ["q_rows", "k_rows", "batch", "per_group"]
GRID_LIMIT = 65535  # of the second and third axis


@triton.jit
def place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch):
    """Batch and head of this program, first query, queries, first key, keys. ``batch`` is the launch's first. A pack is batch 0.

    int64: a stride fits into int32 and its multiple may not."""
    batch, head = tl.program_id(2).to(tl.int64) + batch, tl.program_id(1).to(tl.int64)
    q_at, queries, k_at, keys = 0, q_rows, 0, k_rows
    if cu_q is not None:
        q_at, queries = tl.load(first_q + batch).to(tl.int64), tl.load(cu_q + batch + 1) - tl.load(cu_q + batch)
        k_at, keys = tl.load(first_k + batch).to(tl.int64), tl.load(cu_k + batch + 1) - tl.load(cu_k + batch)
        batch = tl.zeros_like(batch)
    return batch, head, q_at, queries, k_at, keys


@triton.jit
def tile(ptr, row, rows, stride, dim, DIM: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows [ROWS, DIM padded]; zeros past the end. MASKED: rows may lie past the end."""
    at = ptr + row[:, None].to(tl.int64) * stride + dim[None, :]
    if dim.shape[0] != DIM:
        return tl.load(at, mask=(row[:, None] < rows) & (dim[None, :] < DIM), other=0.0)
    elif MASKED:
        return tl.load(at, mask=row[:, None] < rows, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _forward_step(
    q, acc, total, top, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key = at + tl.arange(0, KEYS)
    k = tile(k_ptr, key, keys, k_s, dim, DIM, MASKED)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        seen = (key < keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None] + offset)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - new_top[:, None]))
    shrink = tl.exp2(top - new_top)
    total = tl.fma(total, shrink, tl.sum(p, 1))
    acc = acc * shrink[:, None]
    v = tile(v_ptr, key, keys, v_s, dim, DIM, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_top


@entry
@triton.jit(do_not_specialize=DYNAMIC)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, o_s, o_b, o_h,
    cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch, per_group, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: query blocks, heads, batch. ``scale`` includes log2(e). lse [batch, heads, q_rows] is in powers of two."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    batch, head, q_at, queries, k_at, keys = place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch)
    if cu_q is not None:
        if block * ROWS >= queries:
            return
    q_ptr += batch * q_b + head * q_h + q_at * q_s
    k_ptr += batch * k_b + (head // per_group) * k_h + k_at * k_s
    v_ptr += batch * v_b + (head // per_group) * v_h + k_at * v_s
    out_ptr += batch * o_b + head * o_h + q_at * o_s
    lse_ptr += (batch * tl.num_programs(1) + head) * q_rows + q_at
    row = block * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    offset = keys - queries
    q = tile(q_ptr, row, queries, q_s, dim, DIM)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    whole = keys // KEYS * KEYS
    end = keys
    if CAUSAL:
        whole = min(whole, (block * ROWS + offset + 1) // KEYS * KEYS)
        end = min(keys, block * ROWS + ROWS + offset)
    for at in range(0, whole, KEYS):
        acc, total, top = _forward_step(
            q, acc, total, top, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale, False, CAUSAL, DIM, KEYS
        )
    for at in range(whole, end, KEYS):
        acc, total, top = _forward_step(
            q, acc, total, top, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale, True, CAUSAL, DIM, KEYS
        )
    out = tl.div_rn(acc, tl.zeros_like(acc) + total[:, None])
    inside = (row < queries)[:, None] & (dim < DIM)[None, :]
    tl.store(out_ptr + row[:, None].to(tl.int64) * o_s + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row, top + tl.log2(total), mask=row < queries)


def blocks(width: int, dtype: torch.dtype) -> tuple:
    """Block sizes of forward, dq, and dk with dv, for heads of ``width``. ValueError above MAX_WIDTH."""
    table = BLOCKS[dtype.itemsize]
    for limit, sizes in table.items():
        if width <= limit:
            return sizes
    raise ValueError(f"heads of width {width} are wider than {MAX_WIDTH}; use narrower ones")


def strides(*tensors: Tensor) -> list[int]:
    """By sequence, batch and head, of [s, b, heads, d]."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def padded_width(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def constants(q: Tensor, causal: bool) -> dict:
    width = q.shape[-1]
    return {"CAUSAL": causal, "DIM": width, "WIDTH": padded_width(width), "enable_fp_fusion": False}


def new(q: Tensor, pack: Pack | None):
    """Makes tensors for results. Kernels fill them, but for what is in no sequence of a pack."""
    return q.new_empty if pack is None else q.new_zeros


def launches(q: Tensor, k: Tensor, pack: Pack | None, block: int, by_keys: bool = False) -> Iterator[tuple]:
    """Grids of blocks of ``block`` queries or keys, heads and batch, and the kernels' arguments from cu_q to per_group."""
    longest, sequences, where = len(k if by_keys else q), q.shape[1], (None,) * 4
    if pack is not None:
        longest, sequences, where = pack.longest_k if by_keys else pack.longest_q, len(pack.cu_q) - 1, pack[:4]
    if longest and q.shape[2]:
        for batch in range(0, sequences, GRID_LIMIT):
            grid = ceil_div(longest, block), q.shape[2], min(GRID_LIMIT, sequences - batch)
            yield grid, (*where, len(q), len(k), batch, q.shape[2] // k.shape[2])


@on_device_of_first
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, pack: Pack | None = None) -> tuple[Tensor, Tensor]:
    """q [sq, b, h, d], k and v [sk, b, g, d], unit stride in d, any others -> out [sq, b, h, d], lse fp32 [b, h, sq]. b is 1 in a pack."""
    sq, batch, heads, width = q.shape
    out, lse = new(q, pack)(q.shape), q.new_empty(batch, heads, sq, dtype=torch.float32)
    rows, keys, warps, stages = blocks(width, q.dtype)[0]
    for grid, place_args in launches(q, k, pack, rows):
        attention_kernel[grid](
            q, k, v, out, lse, *strides(q, k, v, out), *place_args, scale * LOG2E,
            ROWS=rows, KEYS=keys, num_warps=warps, num_stages=stages, **constants(q, causal),
        )  # fmt: skip
    return out, lse
