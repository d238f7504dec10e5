"""The gradients of kernels/attention/forward.py, which says what fixes their bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv import contract
from tpinv.kernels.attention import sm90_dkv
from tpinv.kernels.attention.forward import DYNAMIC, MAX_WIDTH, constants, launches, new, padded_width, place, strides
from tpinv.kernels.attention.leaves import tanh, tile
from tpinv.kernels.rows.pairwise import row_tree
from tpinv.kernels.rows.sums import column_sum
from tpinv.reference.attention import PLAIN, Options, Pack
from tpinv.reference.attention_backward import sink_terms
from tpinv.runtime.device import on_device_of_first
from tpinv.runtime.launch import entry
from tpinv.tree import ReductionTree

_ELEMENTS = 4096  # of a program that sums rows
_AT_ONCE = 512  # blocks among which the longest come first
# Bytes of an element -> head width up to -> queries, warps, stages of dq; keys, warps, stages of dk with dv. Not in the bits: what is summed
# over comes in the blocks of contract.ATTENTION_BLOCKS.
SCHEDULES = {
    2: {64: ((128, 8, 3), (128, 8, 3)), 128: ((128, 8, 3), (64, 4, 2)), 256: ((64, 8, 2), (64, 8, 2))},
    4: {128: ((32, 4, 1), (32, 4, 1)), 256: ((16, 4, 1), (16, 4, 1))},
}


def blocks(width: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """(query rows, keys, warps, stages) of dq, and (keys, query rows, warps, stages) of dk and dv. ValueError above MAX_WIDTH."""
    for limit, sizes in contract.ATTENTION_BLOCKS[dtype.itemsize].items():
        if width <= limit:
            return [(rows, summed, *rest) for (_, summed), (rows, *rest) in zip(sizes, SCHEDULES[dtype.itemsize][limit], strict=True)]
    raise ValueError(f"heads of width {width} are wider than {MAX_WIDTH}; use narrower ones")


@triton.jit
def _turn(abreast):
    """Block and head of this program, of a grid [blocks, heads, ...]: ``abreast`` heads take turns, block by block, then the next ones. Blocks
    of a causal head get shorter and shorter; head after head, the last one's would keep the GPU waiting (13 % of 4096 keys, 32 heads)."""
    blocks, heads = tl.num_programs(0), tl.num_programs(1)
    at = tl.program_id(1) * blocks + tl.program_id(0)
    first = at // (abreast * blocks) * abreast
    here = min(abreast, heads - first)
    at -= first * blocks
    return at // here, (first + at % here).to(tl.int64)


@entry
@triton.jit(do_not_specialize=DYNAMIC)
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, o_s, o_b, o_h, d_s, d_b, d_h, cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch, per_group,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [batch, heads, q_rows] = sum of out * dout over the head's width, a tree: ``tl.sum`` would follow the strides of dout."""
    batch, head, _, _, _, _ = place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    out = tile(out_ptr + batch * o_b + head * o_h, row, q_rows, o_s, dim, DIM).to(tl.float32)
    dout = tile(dout_ptr + batch * d_b + head * d_h, row, q_rows, d_s, dim, DIM).to(tl.float32)
    tl.store(delta_ptr + (batch * tl.num_programs(1) + head) * q_rows + row, row_tree(out * dout, ROWS, WIDTH), mask=row < q_rows)


@triton.jit
def _dq_step(
    q, dout, dq, lse, delta, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale, inner, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    key = at + tl.arange(0, KEYS)
    k = tile(k_ptr, key, keys, k_s, dim, DIM, MASKED)
    v = tile(v_ptr, key, keys, v_s, dim, DIM, MASKED)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if inner is not None:
        scores = tanh(scores * inner)
    p = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - lse[:, None]))
    if MASKED:
        seen = (key < keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None] + offset)
            if window is not None:
                seen = seen & (key[None, :] > row[:, None] + offset - window)
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(dout, v.T, input_precision="ieee")
    ds = p * (dp - delta[:, None])
    if inner is not None:
        ds = ds * tl.fma(-scores, scores, tl.zeros_like(scores) + 1.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@entry
@triton.jit(do_not_specialize=[*DYNAMIC, "abreast"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, d_s, d_b, d_h, o_s, o_b, o_h,
    cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch, per_group, abreast, scale, out_scale, inner, window,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: query blocks, heads, batch. o_* are the strides of dq."""
    batch, _, q_at, queries, k_at, keys = place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch)
    block, head = _turn(abreast)
    block = tl.num_programs(0) - 1 - block  # the last rows see most keys
    if cu_q is not None:
        if block * ROWS >= queries:
            return
    k_ptr += batch * k_b + (head // per_group) * k_h + k_at * k_s
    v_ptr += batch * v_b + (head // per_group) * v_h + k_at * v_s
    row = block * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    offset = keys - queries
    q = tile(q_ptr + batch * q_b + head * q_h + q_at * q_s, row, queries, q_s, dim, DIM)
    dout = tile(dout_ptr + batch * d_b + head * d_h + q_at * d_s, row, queries, d_s, dim, DIM)
    at_row = (batch * tl.num_programs(1) + head) * q_rows + q_at + row
    lse = tl.load(lse_ptr + at_row, mask=row < queries, other=0.0)
    delta = tl.load(delta_ptr + at_row, mask=row < queries, other=0.0)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    whole = keys // KEYS * KEYS
    end = keys
    if CAUSAL:
        whole = min(whole, (block * ROWS + offset + 1) // KEYS * KEYS)
        end = min(keys, block * ROWS + ROWS + offset)
    begin = 0
    if window is not None:  # of the tile's first row, and of its last
        low = tl.maximum(block * ROWS + offset + 1 - window, 0) // KEYS * KEYS
        begin = tl.maximum(low, tl.minimum(end, (tl.maximum(block * ROWS + ROWS + offset - window, 0) + KEYS - 1) // KEYS * KEYS))
        whole = tl.maximum(begin, whole)
        for at in range(low, begin, KEYS):
            dq = _dq_step(
                q, dout, dq, lse, delta, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale, inner, window, True, CAUSAL, DIM, KEYS
            )
    for at in range(begin, whole, KEYS):
        dq = _dq_step(
            q, dout, dq, lse, delta, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale, inner, window, False, CAUSAL, DIM, KEYS
        )
    for at in range(whole, end, KEYS):
        dq = _dq_step(
            q, dout, dq, lse, delta, k_ptr, v_ptr, k_s, v_s, at, row, keys, offset, dim, scale, inner, window, True, CAUSAL, DIM, KEYS
        )
    inside = (row < queries)[:, None] & (dim < DIM)[None, :]
    at_dq = dq_ptr + batch * o_b + head * o_h + (q_at + row[:, None].to(tl.int64)) * o_s + dim[None, :]
    tl.store(at_dq, (dq * out_scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dkv_step(
    k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_s, d_s, at, key, queries, offset, dim, scale, inner, window,
    MASKED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = at + tl.arange(0, ROWS)
    q = tile(q_ptr, row, queries, q_s, dim, DIM)
    lse = tl.load(lse_ptr + row, mask=row < queries, other=float("inf"))  # exp2(0 - inf) = 0 past the end
    scores = tl.dot(k, q.T, input_precision="ieee")
    if inner is not None:
        scores = tanh(scores * inner)
    p = tl.exp2(tl.fma(scores, tl.zeros_like(scores) + scale, tl.zeros_like(scores) - lse[None, :]))
    if MASKED:
        seen = key[:, None] <= row[None, :] + offset
        if window is not None:
            seen = seen & (key[:, None] > row[None, :] + offset - window)
        p = tl.where(seen, p, 0.0)
    dout = tile(dout_ptr, row, queries, d_s, dim, DIM)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    delta = tl.load(delta_ptr + row, mask=row < queries, other=0.0)
    dp = tl.dot(v, dout.T, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    if inner is not None:
        ds = ds * tl.fma(-scores, scores, tl.zeros_like(scores) + 1.0)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@entry
@triton.jit(do_not_specialize=[*DYNAMIC, "abreast"])
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, d_s, d_b, d_h, o_s, o_b, o_h,
    cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch, per_group, abreast, scale, out_scale, inner, window,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One query head's part of dk and dv, o_* their strides by query head. Grid: key blocks, heads, batch."""
    batch, _, q_at, queries, k_at, keys = place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch)
    block, head = _turn(abreast)  # the first keys are seen by most rows
    if cu_q is not None:
        if block * KEYS >= keys:
            return
    q_ptr += batch * q_b + head * q_h + q_at * q_s
    dout_ptr += batch * d_b + head * d_h + q_at * d_s
    lse_ptr += (batch * tl.num_programs(1) + head) * q_rows + q_at
    delta_ptr += (batch * tl.num_programs(1) + head) * q_rows + q_at
    key = block * KEYS + tl.arange(0, KEYS)
    dim = tl.arange(0, WIDTH)
    offset = keys - queries
    k = tile(k_ptr + batch * k_b + (head // per_group) * k_h + k_at * k_s, key, keys, k_s, dim, DIM)
    v = tile(v_ptr + batch * v_b + (head // per_group) * v_h + k_at * v_s, key, keys, v_s, dim, DIM)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    first = 0
    end = queries
    if CAUSAL:
        first = max(0, block * KEYS - offset) // ROWS * ROWS
        whole = min(queries, (max(0, block * KEYS + KEYS - 1 - offset) + ROWS - 1) // ROWS * ROWS)
        if window is not None:  # the last row that sees the last key, and that sees the first
            until = tl.minimum(queries, tl.maximum(block * KEYS + KEYS - 1 - offset + window, 0))
            whole = tl.minimum(whole, until)
            end = tl.maximum(whole, tl.minimum(until, tl.maximum(block * KEYS - offset + window, 0) // ROWS * ROWS))
        for at in range(first, whole, ROWS):
            dk, dv = _dkv_step(
                k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_s, d_s, at, key, queries, offset, dim, scale, inner, window, True,
                DIM, ROWS
            )  # fmt: skip
        first = max(first, whole)
    for at in range(first, end, ROWS):
        dk, dv = _dkv_step(
            k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_s, d_s, at, key, queries, offset, dim, scale, inner, window, False, DIM,
            ROWS
        )  # fmt: skip
    if window is not None:
        for at in range(tl.maximum(first, end), until, ROWS):
            dk, dv = _dkv_step(
                k, v, dk, dv, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_s, d_s, at, key, queries, offset, dim, scale, inner, window, True,
                DIM, ROWS
            )  # fmt: skip
    inside = (key < keys)[:, None] & (dim < DIM)[None, :]
    out = batch * o_b + head * o_h + (k_at + key[:, None].to(tl.int64)) * o_s + dim[None, :]
    tl.store(dk_ptr + out, (dk * out_scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@entry
@triton.jit(do_not_specialize=["rows", "per_group"])
def sum_heads_kernel(part_ptr, dk_ptr, dv_ptr, rows, per_group, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """part [2, rows, per_group, width] fp32 -> dk, dv [rows, width]: a chain over the heads of a group, rounded once. Grid: rows, 2."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    which = tl.program_id(1).to(tl.int64)
    from_ptr = part_ptr + (which * rows + row)[:, None] * per_group * width + at[None, :]
    acc = tl.load(from_ptr, mask=inside, other=0.0)
    for head in range(1, per_group):
        acc += tl.load(from_ptr + head * width, mask=inside, other=0.0)
    out = row.to(tl.int64)[:, None] * width + at[None, :]
    if which == 0:
        tl.store(dk_ptr + out, acc.to(dk_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dv_ptr + out, acc.to(dv_ptr.dtype.element_ty), mask=inside)


@on_device_of_first
def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, causal: bool, pack: Pack | None = None,
    options: Options = PLAIN,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, contiguous, in the shapes of q, k, v; and dsinks if there are any. dout like out, unit stride in d."""
    dq, dk, dv = (new(q, pack)(t.shape) for t in (q, k, v))
    sinks = options.sinks
    if not q.numel():
        return (dq, dk.zero_(), dv.zero_()) if sinks is None else (dq, dk.zero_(), dv.zero_(), torch.zeros_like(sinks))
    delta = row_dots(out, dout)
    fill_dkv(q, k, v, dout, lse, delta, dk, dv, scale, causal, pack, options)
    fill_dq(q, k, v, dout, lse, delta, dq, scale, causal, pack, options)
    if sinks is None:
        return dq, dk, dv
    return dq, dk, dv, column_sum(sink_terms(lse, delta, sinks), ReductionTree(1))[0].to(sinks.dtype)


def row_dots(out: Tensor, dout: Tensor) -> Tensor:
    """[sq, b, h, d], unit stride in d -> delta fp32 [b, h, sq]."""
    sq, batch, heads, width = out.shape
    delta = out.new_empty(batch, heads, sq, dtype=torch.float32)
    padded = padded_width(width)
    rows = _ELEMENTS // padded
    for grid, place_args in launches(out, out, None, rows):
        delta_kernel[grid](out, dout, delta, *strides(out, dout), *place_args, DIM=width, WIDTH=padded, ROWS=rows, enable_fp_fusion=False)
    return delta


def _abreast(grid: tuple[int, ...]) -> int:
    """Heads whose blocks take turns: enough for several rounds of a GPU; one where its own blocks are, for the sake of the L2 cache."""
    return max(1, _AT_ONCE // grid[0]) if 4 * grid[0] < _AT_ONCE else 1


def fill_dkv(q, k, v, dout, lse, delta, dk, dv, scale: float, causal: bool, pack: Pack | None, options: Options = PLAIN) -> None:
    batch, heads, width = q.shape[1:]
    sk, _, groups, _ = k.shape
    per_group = heads // groups
    parts = (dk, dv) if per_group == 1 else new(q, pack)(2, sk, batch, heads, width, dtype=torch.float32)
    if not options.given and sm90_dkv.admits(q, k, v, dout, causal, pack, fill_parts):
        sm90_dkv.run(q, k, v, dout, lse, delta, *parts, scale, causal)
    else:
        fill_parts(q, k, v, dout, lse, delta, *parts, scale, causal, pack, options)
    if per_group > 1:
        of_program = max(1, _ELEMENTS // 2 // padded_width(width))
        grid = triton.cdiv(sk * batch * groups, of_program), 2
        sum_heads_kernel[grid](
            parts, dk, dv, sk * batch * groups, per_group, width, ROWS=of_program, BLOCK=padded_width(width), num_warps=4
        )


def fill_parts(q, k, v, dout, lse, delta, dk, dv, scale: float, causal: bool, pack: Pack | None = None, options: Options = PLAIN) -> None:
    """Of each query head, by Triton. dk and dv have the same strides."""
    inner, outer = options.factors(scale)
    keys, rows, warps, stages = blocks(q.shape[3], q.dtype)[1]
    for grid, place_args in launches(q, k, pack, keys, by_keys=True):
        dkv_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, *strides(q, k, v, dout, dk), *place_args, _abreast(grid), outer, scale, inner, options.window,
            ROWS=rows, KEYS=keys, num_warps=warps, num_stages=stages, **constants(q, causal),
        )  # fmt: skip


def fill_dq(q, k, v, dout, lse, delta, dq, scale: float, causal: bool, pack: Pack | None, options: Options = PLAIN) -> None:
    inner, outer = options.factors(scale)
    rows, keys, warps, stages = blocks(q.shape[3], q.dtype)[0]
    for grid, place_args in launches(q, k, pack, rows):
        dq_kernel[grid](
            q, k, v, dout, lse, delta, dq, *strides(q, k, v, dout, dq), *place_args, _abreast(grid), outer, scale, inner, options.window,
            ROWS=rows, KEYS=keys, num_warps=warps, num_stages=stages, **constants(q, causal),
        )  # fmt: skip
