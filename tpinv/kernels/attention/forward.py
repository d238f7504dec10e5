"""Attention's forward for training and prefill, over tensors, packs or pages: bits depend on one query head, its keys and values alone.

A program takes a tile of rows of one head through the node's leaves (kernels/attention/leaves.py; reference/attention.py is the contract).
Nothing that libraries let vary is in the bits: no split of the keys by how busy the GPU is, no atomics, and neither a tile's rows nor warps.
A row keeps its bits when the sequence grows: what the mask hides adds zeros, if it is finite (0 * NaN is NaN).

Up to one node (4096 keys) a node's total lives in registers. Longer sequences need the tree's pending values, log2(nodes) of them, kept in
scratch: a fixed number of programs takes one tile after the other, so that scratch does not grow with the sequence
(:func:`scratch_floats`). Which of the two kernels runs follows the longest sequence and is not in the bits.

Sequences of different lengths can lie one behind another in one tensor, a pack, or a request's keys in pages. A program looks up where its
sequence starts and ends and then does what it does for a batch: blocks are counted from the first key of the sequence, so it has the bits
it has alone.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv import contract
from tpinv.kernels.attention import sm90
from tpinv.kernels.attention.leaves import BLOCK, NODE, merge, quotient, tile, walk, walk_window, with_sink
from tpinv.reference.attention import PLAIN, Options, Pack
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry

# Bytes of an element -> head width up to -> rows, warps, stages of a program. Not in the bits. fp32 is for tests.
TILES = {2: {64: (64, 4, 3), 128: (64, 4, 3), 256: (64, 8, 2)}, 4: {128: (32, 4, 1), 256: (16, 4, 1)}}
MAX_WIDTH = 256
DYNAMIC = ["q_rows", "k_rows", "batch", "per_group", "window"]
GRID_LIMIT = 65535  # of the second and third axis
LEVELS = 8  # pending values of the tree
MAX_KEYS = contract.ATTENTION_LEAF * contract.ATTENTION_NODE << LEVELS
PROGRAMS = 2  # of a multiprocessor, when there is a tree


@triton.jit
def place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch):
    """Batch and head of this program, first query, queries, first key, keys. ``batch`` is the launch's first. A pack is batch 0.

    int64: a stride fits into int32 and its multiple may not."""
    batch, head = tl.program_id(2).to(tl.int64) + batch, tl.program_id(1).to(tl.int64)
    q_at, queries, k_at, keys = extent(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch)
    if cu_q is not None:
        batch = tl.zeros_like(batch)
    return batch, head, q_at, queries, k_at, keys


@triton.jit
def extent(cu_q, cu_k, first_q, first_k, q_rows, k_rows, sequence):
    """First query, queries, first key and keys of a sequence."""
    q_at, queries, k_at, keys = 0, q_rows, 0, k_rows
    if cu_q is not None:
        q_at, queries = tl.load(first_q + sequence).to(tl.int64), tl.load(cu_q + sequence + 1) - tl.load(cu_q + sequence)
        k_at, keys = tl.load(first_k + sequence).to(tl.int64), tl.load(cu_k + sequence + 1) - tl.load(cu_k + sequence)
    return q_at, queries, k_at, keys


@triton.jit
def _parked(ptr, level, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a pending value is: acc [ROWS, WIDTH], total and top [ROWS]."""
    row = tl.arange(0, ROWS)
    ptr += level * (ROWS * (WIDTH + 2))
    return ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], ptr + ROWS * WIDTH + row, ptr + ROWS * (WIDTH + 1) + row


@triton.jit
def _rows(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, parked_ptr, table_ptr, sinks_ptr, q_s, k_s, k_b, v_s, v_b, o_s, block, head, queries,
    keys, scale, inner, window,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, TREE: tl.constexpr,
    LEAF: tl.constexpr,
):  # fmt: skip
    """One tile of one head of one sequence, at whose first row, key and head the pointers are."""
    row = block * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    q = tile(q_ptr, row, queries, q_s, dim, DIM)
    sees = row + (keys - queries + 1)
    whole = keys // BLOCK * BLOCK
    end = keys
    if CAUSAL:
        whole = max(0, min(whole, (block * ROWS + keys - queries + 1) // BLOCK * BLOCK))
        end = max(0, min(keys, block * ROWS + ROWS + keys - queries))
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if TREE:
        pending = 0
        first, empty = 0, 0
        if window is not None:  # the nodes before are empty, and stand in the tree for nothing: as many values as their number has ones
            first = tl.maximum(block * ROWS + keys - queries + 1 - window, 0) // (LEAF * NODE) * (LEAF * NODE)
            left = first // (LEAF * NODE)
            while left > 0:
                empty += left % 2
                left = left // 2
            pending = empty
        for start in range(first, end, LEAF * NODE):
            stop = min(end, start + LEAF * NODE)
            acc, total, top = _node(
                q, start, max(start, min(whole, stop)), stop, block, queries, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim,
                scale, inner, window, CAUSAL, DIM, WIDTH, PAGE, TREE, LEAF,
            )  # fmt: skip
            turn = start // (LEAF * NODE)
            if stop == end:
                turn = (1 << pending) - 1  # the last node takes all that is pending
            while turn % 2 == 1:
                pending -= 1
                if window is None:  # noqa: SIM114 (without a window the other branch is not compiled)
                    acc_at, total_at, top_at = _parked(parked_ptr, pending, ROWS, WIDTH)
                    acc, total, top = merge(tl.load(acc_at), tl.load(total_at), tl.load(top_at), acc, total, top)
                elif pending >= empty:
                    acc_at, total_at, top_at = _parked(parked_ptr, pending, ROWS, WIDTH)
                    acc, total, top = merge(tl.load(acc_at), tl.load(total_at), tl.load(top_at), acc, total, top)
                else:
                    empty = pending
                turn = turn // 2
            if stop != end:
                acc_at, total_at, top_at = _parked(parked_ptr, pending, ROWS, WIDTH)
                tl.debug_barrier()  # what was there has been read
                tl.store(acc_at, acc)
                tl.store(total_at, total)
                tl.store(top_at, top)
                tl.debug_barrier()  # a thread may read what another one stored
                pending += 1
    else:
        acc, total, top = _node(
            q, 0, whole, end, block, queries, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim, scale, inner, window,
            CAUSAL, DIM, WIDTH, PAGE, TREE, LEAF,
        )  # fmt: skip
    if sinks_ptr is not None:
        acc, total, top = with_sink(acc, total, top, sinks_ptr, head)
    out = quotient(acc, total)
    if PAGE and CAUSAL:
        if (keys < queries) & (keys > 0):
            out = tl.full(out.shape, float("nan"), tl.float32)
    inside = (row < queries)[:, None] & (dim < DIM)[None, :]
    tl.store(out_ptr + row[:, None].to(tl.int64) * o_s + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row < queries)


@triton.jit
def _node(
    q, start, whole, stop, block, queries, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim, scale, inner, window,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TREE: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """A node's keys from ``start`` to ``stop``, of which every row of the tile ``block`` sees those up to ``whole`` but for the window.

    Leaves are a loop of their own, in which a product runs on into the next block's, or the pipeline of loads runs on through them. On an
    H100, 128 wide, the first was faster up to 4096 keys (376 us against 400), the second at 16384 (5.26 ms against 5.85)."""
    acc = tl.zeros((q.shape[0], WIDTH), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    top = tl.full((q.shape[0],), float("-inf"), tl.float32)
    leaf_acc, leaf_total, leaf_top = acc, total, top
    if window is not None:
        sees_first = block * q.shape[0] + keys - queries + 1
        acc, total, top, leaf_acc, leaf_total, leaf_top = walk_window(
            q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, stop, sees_first, sees_first + q.shape[0] - 1, keys, sees, k_ptr, v_ptr,
            k_s, k_b, v_s, v_b, table_ptr, dim, scale, inner, window, DIM, PAGE, LEAF,
        )  # fmt: skip
    elif not TREE and WIDTH <= 128:
        leaves_end = start + (whole - start) // LEAF * LEAF
        for leaf_start in range(start, leaves_end, LEAF):
            new_acc = tl.zeros((q.shape[0], WIDTH), tl.float32)
            new_total = tl.zeros((q.shape[0],), tl.float32)
            new_top = tl.full((q.shape[0],), float("-inf"), tl.float32)
            _, _, _, new_acc, new_total, new_top = walk(
                q, acc, total, top, new_acc, new_total, new_top, leaf_start, leaf_start + LEAF, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b,
                table_ptr, dim, scale, inner, None, None, False, CAUSAL, DIM, PAGE, 0,
            )  # fmt: skip
            acc, total, top = merge(acc, total, top, new_acc, new_total, new_top)
        _, _, _, leaf_acc, leaf_total, leaf_top = walk(
            q, acc, total, top, leaf_acc, leaf_total, leaf_top, leaves_end, whole, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr,
            dim, scale, inner, None, None, False, CAUSAL, DIM, PAGE, 0,
        )  # fmt: skip
    else:
        acc, total, top, leaf_acc, leaf_total, leaf_top = walk(
            q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, whole, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim,
            scale, inner, None, None, False, CAUSAL, DIM, PAGE, LEAF,
        )  # fmt: skip
    if window is None:
        acc, total, top, leaf_acc, leaf_total, leaf_top = walk(
            q, acc, total, top, leaf_acc, leaf_total, leaf_top, whole, stop, keys, sees, k_ptr, v_ptr, k_s, k_b, v_s, v_b, table_ptr, dim,
            scale, inner, None, None, True, CAUSAL, DIM, PAGE, LEAF,
        )  # fmt: skip
    return merge(acc, total, top, leaf_acc, leaf_total, leaf_top)


@entry
@triton.jit(do_not_specialize=DYNAMIC)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, o_s, o_b, o_h,
    cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch, per_group, scale, inner, window, sinks_ptr,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows, heads, batch. No sequence has more than a node of keys. ``scale`` includes log2(e), and ``inner`` is the other of
    Options.factors; it, ``window`` and sinks_ptr [heads] are None without the option, and nothing of them is compiled. lse [batch, heads,
    q_rows] is in powers of two."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    batch, head, q_at, queries, k_at, keys = place(cu_q, cu_k, first_q, first_k, q_rows, k_rows, batch)
    if cu_q is not None:
        if block * ROWS >= queries:
            return
    _rows(
        q_ptr + batch * q_b + head * q_h + q_at * q_s,
        k_ptr + batch * k_b + (head // per_group) * k_h + k_at * k_s,
        v_ptr + batch * v_b + (head // per_group) * v_h + k_at * v_s,
        out_ptr + batch * o_b + head * o_h + q_at * o_s,
        lse_ptr + (batch * tl.num_programs(1) + head) * q_rows + q_at,
        None, None, sinks_ptr, q_s, k_s, 0, v_s, 0, o_s, block, head, queries, keys, scale, inner, window, CAUSAL, DIM, WIDTH, ROWS, 0,
        False, LEAF,
    )  # fmt: skip


@entry
@triton.jit(do_not_specialize=[*DYNAMIC, "heads", "sequences", "tiles", "table_s", "others"])
def long_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, parked_ptr, turn_ptr, table_ptr, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, o_s, o_b, o_h,
    cu_q, cu_k, first_q, first_k, q_rows, k_rows, table_s, others, heads, sequences, tiles, per_group, scale,
    inner, window, sinks_ptr,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, LEAF: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """attention_kernel for any number of keys. Grid: programs, each of which takes the next tile whenever it is done with one: those of a
    key head one after another, the longest rows first. turn_ptr: int32, 0. ``tiles``: of the longest sequence. parked_ptr: fp32 [programs, LEVELS, ROWS * (WIDTH + 2)].

    PAGE: keys in pages of that many; a request's are in row ``sequence`` of table_ptr, in distance table_s, cu_k has their number, and
    k_b, v_b are distances of pages. Requests of up to ``others`` queries are another kernel's."""
    work = tiles * heads * sequences
    parked_ptr += tl.program_id(0).to(tl.int64) * (LEVELS * ROWS * (WIDTH + 2))
    item = tl.atomic_add(turn_ptr, 1)
    while item < work:
        of_group = item % (tiles * per_group)  # whose keys are in the L2 cache then
        block = tiles - 1 - of_group // per_group
        groups = heads // per_group
        group = item // (tiles * per_group)
        head = (group % groups * per_group + of_group % per_group).to(tl.int64)
        sequence = (group // groups).to(tl.int64)
        if PAGE:
            q_at = tl.load(cu_q + sequence).to(tl.int64)
            queries = (tl.load(cu_q + sequence + 1) - q_at).to(tl.int32)
            keys = tl.load(cu_k + sequence)
            batch = tl.zeros_like(sequence)
            k_first, v_first = batch, batch
            table_ptr_here = table_ptr + sequence * table_s
            mine = queries > others
        else:
            q_at, queries, k_at, keys = extent(cu_q, cu_k, first_q, first_k, q_rows, k_rows, sequence)
            batch = sequence
            if cu_q is not None:
                batch = tl.zeros_like(sequence)
            k_first, v_first = batch * k_b + k_at * k_s, batch * v_b + k_at * v_s
            table_ptr_here = None
            mine = True
        if mine & (block * ROWS < queries):
            lse_at = None
            if lse_ptr is not None:
                lse_at = lse_ptr + (batch * heads + head) * q_rows + q_at
            _rows(
                q_ptr + batch * q_b + head * q_h + q_at * q_s,
                k_ptr + k_first + (head // per_group) * k_h,
                v_ptr + v_first + (head // per_group) * v_h,
                out_ptr + batch * o_b + head * o_h + q_at * o_s,
                lse_at, parked_ptr, table_ptr_here, sinks_ptr, q_s, k_s, k_b, v_s, v_b, o_s, block, head, queries, keys, scale, inner, window,
                CAUSAL, DIM, WIDTH, ROWS, PAGE, True, LEAF,
            )  # fmt: skip
        item = tl.atomic_add(turn_ptr, 1)


def tile_sizes(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, warps and stages for heads of ``width``. ValueError above MAX_WIDTH."""
    for limit, sizes in TILES[dtype.itemsize].items():
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


def programs_for(work: int, device: torch.device) -> int:
    """Programs of a kernel that takes ``work`` tiles in turn."""
    if device.type != "cuda":
        return min(work, 3)  # under Triton's interpreter
    return min(work, PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count)


def scratch_floats(programs: int, rows: int, width: int) -> int:
    """fp32 numbers that long_attention_kernel parks: on an H100, 128 rows of width 128, 70 MB whatever the lengths."""
    return programs * LEVELS * rows * (padded_width(width) + 2)


@on_device_of_first
def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, pack: Pack | None = None, options: Options = PLAIN
) -> tuple[Tensor, Tensor]:
    """q [sq, b, h, d], k and v [sk, b, g, d], unit stride in d, any others -> out [sq, b, h, d], lse fp32 [b, h, sq]. b is 1 in a pack.

    By csrc/sm90_attention.cu where it can, and was seen to have the bytes of the Triton kernel. It knows no options."""
    if options.given:
        return triton_forward(q, k, v, scale, causal, pack, options=options)
    if sm90.admits(q, k, v, causal, pack, triton_forward):
        _check_keys(len(k) if pack is None else pack.longest_k)
        out, lse = empty_results(q, pack)
        sm90.run(q, k, v, out, lse, scale, causal, pack)
        return out, lse
    return triton_forward(q, k, v, scale, causal, pack)


def empty_results(q: Tensor, pack: Pack | None) -> tuple[Tensor, Tensor]:
    sq, batch, heads, _ = q.shape
    return new(q, pack)(q.shape), q.new_empty(batch, heads, sq, dtype=torch.float32)


@on_device_of_first
def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    pack: Pack | None = None,
    leaf: int = contract.ATTENTION_LEAF,
    options: Options = PLAIN,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` by the Triton kernels alone. ``leaf``: another number of keys is another contract, for measurements."""
    sq, batch, heads, width = q.shape
    out, lse = empty_results(q, pack)
    if pack is not None and options.sinks is not None:
        lse.fill_(float("-inf"))  # rows of no sequence, which the gradient of a sink leaves out
    inner, scale = options.factors(scale)
    last = scale, inner, options.window, options.sinks
    rows, warps, stages = tile_sizes(width, q.dtype)
    constant = {"ROWS": rows, "LEAF": leaf, "num_warps": warps, "num_stages": stages, **constants(q, causal)}
    longest = len(k) if pack is None else pack.longest_k
    if longest <= leaf * contract.ATTENTION_NODE:
        for grid, place_args in launches(q, k, pack, rows):
            attention_kernel[grid](q, k, v, out, lse, *strides(q, k, v, out), *place_args, *last, **constant)
        return out, lse
    _check_keys(longest)
    sequences, where, tiles = (batch, (None,) * 4, ceil_div(sq, rows))
    if pack is not None:
        sequences, where, tiles = len(pack.cu_q) - 1, pack[:4], ceil_div(pack.longest_q, rows)
    if work := tiles * heads * sequences:
        programs = programs_for(work, q.device)
        parked, turn = q.new_empty(scratch_floats(programs, rows, width), dtype=torch.float32), q.new_zeros(1, dtype=torch.int32)
        long_attention_kernel[(programs,)](
            q, k, v, out, lse, parked, turn, None, *strides(q, k, v, out), *where, sq, len(k), 0, 0, heads, sequences, tiles,
            heads // k.shape[2], *last, PAGE=0, LEVELS=LEVELS, **constant,
        )  # fmt: skip
    return out, lse


def _check_keys(longest: int) -> None:
    if longest > MAX_KEYS:
        raise ValueError(f"{longest} keys are more than {MAX_KEYS}, the most of one sequence; use shorter ones")
