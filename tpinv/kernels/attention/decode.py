"""Attention of few queries over many keys in pages: the keys are split, and the parts merged in the contract's order.

    decode_kernel   a unit of work is some rows of one key head (queries by heads of its group, at most ROWS) and a leaf of keys, or a node.
                    It writes that part of the rows' acc, total and top to scratch
    merge_kernel    a program per row: the chain over a node's leaves, the tree over nodes, one division

The split is the contract's own, so it moves no bit: a unit does what the prefill's program does between two merges. How many
units there are is known to the GPU alone, and so is whether they are leaves or nodes: nodes as soon as there are enough of them to fill
it, because every part is written and read once more. A fixed number of programs counts the units from the lengths (:func:`_work`) and takes
them in turn, hence a CUDA graph serves any lengths up to the bounds that it was captured with.

Scratch, in fp32: units x key heads x ROWS x (WIDTH + 2), for at most UNITS of leaves, or requests x tiles x key heads x nodes of the longest
request if those are more. 4096 units of 16 rows of width 128 are 34 MB.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv import contract
from tpinv.kernels.attention import sm90_decode
from tpinv.kernels.attention.forward import LEVELS, padded_width
from tpinv.kernels.attention.leaves import BLOCK, LOG2E, NODE, merge, quotient, walk, walk_window, with_sink
from tpinv.reference.attention import PLAIN, Options
from tpinv.runtime.device import ceil_div
from tpinv.runtime.launch import entry
from tpinv.runtime.state import device_state

UNITS = 4096  # of leaves at most, key heads included
# Rows of a tile -> warps, stages, programs of a multiprocessor. Not in the bits.
SCHEDULES = {16: (4, 5, 2), 32: (4, 5, 2), 64: (8, 5, 1)}
DYNAMIC = ["table_s", "requests", "key_heads", "per_group", "most", "longest", "enough", "limit", "window"]


@triton.jit
def _hidden(keys, queries, window, unit):
    """Units that no query of a request sees anything of: those before its first query's window."""
    return tl.maximum(keys - queries + 1 - window, 0) // unit


@triton.jit
def _work(
    cu_q, lens, requests, key_heads, per_group, most, longest, enough, limit, window, ROWS: tl.constexpr, LEAF: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """[SIZE] for each request: units of work of a key head, and how many there are up to it and in it; none where other kernels compute. And
    the keys of a unit: a node's if ``enough`` units are, or more than ``limit`` units of leaves would be."""
    i = tl.arange(0, SIZE)
    queries = tl.load(cu_q + i + 1, mask=i < requests, other=0) - tl.load(cu_q + i, mask=i < requests, other=0)
    keys = tl.minimum(tl.load(lens + i, mask=i < requests, other=0), longest)
    tiles = tl.where(queries <= most, (queries * per_group + ROWS - 1) // ROWS, 0)
    leaves, nodes = tiles * ((keys + LEAF - 1) // LEAF), tiles * ((keys + LEAF * NODE - 1) // (LEAF * NODE))
    if window is not None:
        leaves = tiles * ((keys + LEAF - 1) // LEAF - tl.minimum(_hidden(keys, queries, window, LEAF), (keys + LEAF - 1) // LEAF))
        nodes_of = (keys + LEAF * NODE - 1) // (LEAF * NODE)
        nodes = tiles * (nodes_of - tl.minimum(_hidden(keys, queries, window, LEAF * NODE), nodes_of))
    whole = (tl.sum(nodes) * key_heads >= enough) | (tl.sum(leaves) * key_heads > limit)
    work = tl.where(whole, nodes, leaves)
    return work, tl.cumsum(work, 0), tl.where(whole, LEAF * NODE, LEAF)


@entry
@triton.jit(do_not_specialize=DYNAMIC)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, sums_ptr, table_ptr, cu_q, lens, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    table_s, requests, key_heads, per_group, most, longest, enough, limit, scale, inner, window,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, LEAF: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Grid: programs. acc_ptr [units, key heads, ROWS, WIDTH], sums_ptr [units, key heads, 2, ROWS] of total and top. Requests of more than
    ``most`` queries are another kernel's, keys past ``longest`` nobody's."""
    work, ends, unit = _work(cu_q, lens, requests, key_heads, per_group, most, longest, enough, limit, window, ROWS, LEAF, SIZE)
    request_index = tl.arange(0, SIZE)
    everything = tl.sum(work) * key_heads
    dim = tl.arange(0, WIDTH)
    for item in range(tl.program_id(0), everything, tl.num_programs(0)):
        unit_of_all, head = item // key_heads, (item % key_heads).to(tl.int64)
        request = tl.sum((ends <= unit_of_all).to(tl.int32))
        inside = unit_of_all - tl.sum(tl.where(request_index < request, work, 0))
        q_at = tl.load(cu_q + request)
        queries = tl.load(cu_q + request + 1) - q_at
        keys = tl.minimum(tl.load(lens + request), longest)
        tiles = (queries * per_group + ROWS - 1) // ROWS
        start = inside // tiles * unit
        if window is not None:
            start += _hidden(keys, queries, window, unit) * unit
        row = inside % tiles * ROWS + tl.arange(0, ROWS)
        query = row // per_group
        rows = queries * per_group
        sees = keys - queries + query + 1
        at_q = q_ptr + (q_at + query).to(tl.int64) * q_s + (head * per_group + row % per_group) * q_h
        q = tl.load(at_q[:, None] + dim[None, :], mask=(row < rows)[:, None] & (dim < DIM)[None, :], other=0.0)
        stop = min(keys, start + unit)
        whole = stop // BLOCK * BLOCK
        if CAUSAL:  # of the tile's first row, and of its last
            whole = min(whole, max(0, keys - queries + inside % tiles * ROWS // per_group + 1) // BLOCK * BLOCK)
            stop = max(start, min(stop, keys - queries + (inside % tiles * ROWS + ROWS - 1) // per_group + 1))
        whole = max(start, whole)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        leaf_acc, leaf_total, leaf_top = acc, total, top
        k_at, v_at, table_at = k_ptr + head * k_h, v_ptr + head * v_h, table_ptr + request.to(tl.int64) * table_s
        if window is not None:
            first = keys - queries + inside % tiles * ROWS // per_group + 1
            last = keys - queries + (inside % tiles * ROWS + ROWS - 1) // per_group + 1
            acc, total, top, leaf_acc, leaf_total, leaf_top = walk_window(
                q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, stop, first, last, keys, sees, k_at, v_at, k_s, k_b, v_s, v_b,
                table_at, dim, scale, inner, window, DIM, PAGE, LEAF,
            )  # fmt: skip
        else:
            acc, total, top, leaf_acc, leaf_total, leaf_top = walk(
                q, acc, total, top, leaf_acc, leaf_total, leaf_top, start, whole, keys, sees, k_at, v_at, k_s, k_b, v_s, v_b, table_at, dim,
                scale, inner, None, None, False, CAUSAL, DIM, PAGE, LEAF,
            )  # fmt: skip
            acc, total, top, leaf_acc, leaf_total, leaf_top = walk(
                q, acc, total, top, leaf_acc, leaf_total, leaf_top, whole, stop, keys, sees, k_at, v_at, k_s, k_b, v_s, v_b, table_at, dim,
                scale, inner, None, None, True, CAUSAL, DIM, PAGE, LEAF,
            )  # fmt: skip
        acc, total, top = merge(acc, total, top, leaf_acc, leaf_total, leaf_top)
        lane = tl.arange(0, ROWS)
        at = (unit_of_all.to(tl.int64) * key_heads + head) * ROWS
        tl.store(acc_ptr + (at + lane[:, None]) * WIDTH + dim[None, :], acc, mask=(row < rows)[:, None])
        tl.store(sums_ptr + 2 * at + lane, total, mask=row < rows)
        tl.store(sums_ptr + 2 * at + ROWS + lane, top, mask=row < rows)


@triton.jit
def _parts(acc_ptr, sums_ptr, part_at, part_s, row, node, in_node, units, hidden, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """acc [NODE, WIDTH], total and top [NODE] of one row of a node's units; nothing where there is none, or one that is ``hidden``."""
    i, dim = tl.arange(0, NODE), tl.arange(0, WIDTH)
    unit = node * in_node + i
    here = (i < in_node) & (unit < units)
    if hidden is not None:
        here = here & (unit >= hidden)
        unit -= hidden
    at = (part_at + unit.to(tl.int64) * part_s) * ROWS
    accs = tl.load(acc_ptr + (at + row)[:, None] * WIDTH + dim[None, :], mask=here[:, None], other=0.0)
    totals = tl.load(sums_ptr + 2 * at + row, mask=here, other=0.0)
    return accs, totals, tl.load(sums_ptr + 2 * at + ROWS + row, mask=here, other=float("-inf"))


@entry
@triton.jit(do_not_specialize=[*DYNAMIC, "tokens", "elsewhere"])
def merge_kernel(
    out_ptr, acc_ptr, sums_ptr, cu_q, lens, o_s, o_h, tokens, requests, key_heads, per_group, most, longest, enough, limit,
    elsewhere, window, sinks_ptr,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr,
    SIZE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Grid: heads, queries (some), requests and one more for rows of none, which are zero. Rows of a request with more than ``most`` queries,
    unless they are ``elsewhere``, of one with more than ``longest`` keys, or with fewer keys than queries, are NaN."""
    head, request = tl.program_id(0).to(tl.int64), tl.program_id(2)
    dim = tl.arange(0, WIDTH)
    inside = dim < DIM
    q_at = tl.load(cu_q + request)
    if request == requests:  # head * 0: int64, also of a loop's number
        for row in range(q_at + tl.program_id(1), tokens, tl.num_programs(1)):
            tl.store(out_ptr + (head * 0 + row) * o_s + head * o_h + dim, tl.zeros((WIDTH,), out_ptr.dtype.element_ty), mask=inside)
        return
    queries = tl.load(cu_q + request + 1) - q_at
    keys = tl.load(lens + request)
    refused = (keys > longest) | (queries > most)
    if CAUSAL:
        refused = refused | ((keys < queries) & (keys > 0))
    if refused:
        if (queries <= most) | (elsewhere == 0):
            for row in range(q_at + tl.program_id(1), q_at + queries, tl.num_programs(1)):
                nothing = tl.full((WIDTH,), float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (head * 0 + row) * o_s + head * o_h + dim, nothing, mask=inside)
        return
    query = tl.program_id(1)
    if query >= queries:
        return
    work, _, unit = _work(cu_q, lens, requests, key_heads, per_group, most, longest, enough, limit, window, ROWS, LEAF, SIZE)
    first = tl.sum(tl.where(tl.arange(0, SIZE) < request, work, 0))
    row = query * per_group + (head % per_group).to(tl.int32)
    tiles = (queries * per_group + ROWS - 1) // ROWS
    units = (keys + unit - 1) // unit
    in_node = NODE * LEAF // unit
    nodes = (units + in_node - 1) // in_node
    part_at = (first + row // ROWS).to(tl.int64) * key_heads + head // per_group
    part_s = tiles * key_heads
    level = tl.arange(0, LEVELS)
    parked_acc = tl.zeros((LEVELS, WIDTH), tl.float32)
    parked_total = tl.zeros((LEVELS,), tl.float32)
    parked_top = tl.zeros((LEVELS,), tl.float32)
    pending = 0
    acc = tl.zeros((WIDTH,), tl.float32)
    total = 0.0
    top = float("-inf")
    part = tl.arange(0, NODE)
    hidden = None
    first_node = 0
    if window is not None:  # the nodes before stand in the tree for nothing: as many values as their number has ones
        hidden = tl.minimum(_hidden(keys, queries, window, unit), units)
        first_node = hidden // in_node
        parked_top = tl.full((LEVELS,), float("-inf"), tl.float32)
        rest = first_node
        while rest > 0:
            pending += rest % 2
            rest = rest // 2
    accs, totals, tops = _parts(acc_ptr, sums_ptr, part_at, part_s, row % ROWS, first_node, in_node, units, hidden, ROWS, WIDTH)
    for node in range(first_node, nodes):
        # The next node's parts are under way while this one's are merged.
        here_accs, here_totals, here_tops = accs, totals, tops
        accs, totals, tops = _parts(acc_ptr, sums_ptr, part_at, part_s, row % ROWS, node + 1, in_node, units, hidden, ROWS, WIDTH)
        acc = tl.zeros((WIDTH,), tl.float32)
        total = 0.0
        top = float("-inf")
        for i in tl.static_range(NODE):
            this = part == i
            right_acc = tl.sum(tl.where(this[:, None], here_accs, 0.0), 0)
            right_total, right_top = tl.sum(tl.where(this, here_totals, 0.0), 0), tl.sum(tl.where(this, here_tops, 0.0), 0)
            acc, total, top = merge(acc, total, top, right_acc, right_total, right_top)
        turn = node
        if node == nodes - 1:
            turn = (1 << pending) - 1  # the last node takes all that is pending
        while turn % 2 == 1:
            pending -= 1
            left = level == pending
            left_acc = tl.sum(tl.where(left[:, None], parked_acc, 0.0), 0)
            left_total, left_top = tl.sum(tl.where(left, parked_total, 0.0), 0), tl.sum(tl.where(left, parked_top, 0.0), 0)
            acc, total, top = merge(left_acc, left_total, left_top, acc, total, top)
            turn = turn // 2
        here = level == pending
        parked_acc = tl.where(here[:, None], acc[None, :], parked_acc)
        parked_total = tl.where(here, total, parked_total)
        parked_top = tl.where(here, top, parked_top)
        pending += 1
    if sinks_ptr is not None:
        acc, total, top = with_sink(acc, total, top, sinks_ptr, head)
    out = quotient(acc, total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (q_at + query).to(tl.int64) * o_s + head * o_h + dim, out, mask=inside)


def decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    most: int, longest: int, scale: float, causal: bool, out: Tensor, elsewhere: bool, leaf: int = contract.ATTENTION_LEAF,
    options: Options = PLAIN,
) -> None:  # fmt: skip
    """Fills out's rows of requests with at most ``most`` queries, and of none. ``elsewhere``: the others are another kernel's.
    csrc/sm90_decode.cu knows no options."""
    numbers = block_table, seq_lens, query_start_loc, most, longest, scale
    if leaf == contract.ATTENTION_LEAF and not options.given and query.is_cuda and longest > 0:
        spec = sm90_decode.spec_for(query, key_cache, value_cache, len(seq_lens), most, out)
        if spec and _verified(spec, query.device):
            sm90_decode.run(spec, query, key_cache, value_cache, *numbers[:-1], scale * LOG2E, causal, out, elsewhere, UNITS)
            return
    decode_in_triton(query, key_cache, value_cache, *numbers, causal, out, elsewhere, leaf, options)


def _verified(spec: sm90_decode.Spec, device: torch.device) -> bool:
    """Whether csrc/sm90_decode.cu has the bytes of the kernels here, on this device: compared once, for all tiles, because a capture, which
    forbids it and is told no, may ask for another one than the calls before it."""
    known, key = device_state(device.index).verified, (sm90_decode.SOURCE, spec)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return False
        for rows in sm90_decode.ROWS:
            of_rows = spec._replace(rows=rows)
            known[sm90_decode.SOURCE, of_rows] = _same_bytes(of_rows, device)
    return known[key]


def _same_bytes(spec: sm90_decode.Spec, device: torch.device) -> bool:
    """Four queries or as many as fit, of two key heads; lengths around every boundary, one refused; units of leaves, and of nodes."""
    longest, page, per_group = contract.ATTENTION_LEAF * contract.ATTENTION_NODE + 700, 16, max(1, spec.rows // 4)
    lengths = (1, 63, 65, 511, 512, 513, 2000, longest - 700, longest, 0, longest + 1)
    generator = torch.Generator(device).manual_seed(0)
    most = spec.rows // per_group
    counts = [min(most, n) for n in lengths[:-2]] + [0, most]
    pages = ceil_div(longest, page)
    cache = torch.randn(pages, 2, page, 2, spec.width, device=device, generator=generator).to(spec.dtype)
    table = torch.randperm(pages, device=device, generator=generator).int().expand(len(lengths), -1)
    query = torch.randn(sum(counts) + 3, 2 * per_group, spec.width, device=device, generator=generator).to(spec.dtype)
    starts, lens = (torch.tensor(t, dtype=torch.int32, device=device) for t in ([0, *itertools.accumulate(counts)], lengths))
    outs = [torch.full_like(query, 7.0) for _ in range(3)]
    arguments = query, *cache.unbind(1), table, lens, starts, most, longest
    decode_in_triton(*arguments, 1.0, True, outs[0], False, contract.ATTENTION_LEAF)
    for out, limit in zip(outs[1:], (UNITS, 1), strict=True):
        sm90_decode.run(spec, *arguments, LOG2E, True, out, False, limit)
    expected, *found = (torch.where(t.isnan(), torch.inf, t).view(torch.int16) for t in outs)  # a NaN is a NaN
    return all(torch.equal(expected, t) for t in found)


def decode_in_triton(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    most: int, longest: int, scale: float, causal: bool, out: Tensor, elsewhere: bool, leaf: int,
    options: Options = PLAIN,
) -> None:  # fmt: skip
    """:func:`decode` on any GPU."""
    (tokens, heads, width), (_, page, key_heads, _), requests = query.shape, key_cache.shape, len(seq_lens)
    per_group, padded = heads // key_heads, padded_width(width)
    rows = max(16, min(64, triton.next_power_of_2(most * per_group)))
    tiles = ceil_div(most * per_group, rows)
    of_each = requests * tiles * key_heads
    items = max(min(of_each * ceil_div(longest, leaf), UNITS), of_each * ceil_div(longest, leaf * contract.ATTENTION_NODE))
    scratch = query.new_empty(items * rows * (padded + 2), dtype=torch.float32)
    acc, sums = scratch[: items * rows * padded], scratch[items * rows * padded :]
    warps, stages, _ = SCHEDULES[rows]
    common = {
        "CAUSAL": causal, "DIM": width, "WIDTH": padded, "ROWS": rows, "LEAF": leaf,
        "SIZE": max(16, triton.next_power_of_2(requests)), "enable_fp_fusion": False,
    }  # fmt: skip
    enough, programs = 1 << 30, min(items, 3)  # under Triton's interpreter
    if query.is_cuda:
        enough = torch.cuda.get_device_properties(query.device).multi_processor_count
        programs = min(items, SCHEDULES[rows][2] * enough)
    inner, scale = options.factors(scale)
    bounds = key_heads, per_group, most, longest, enough, UNITS
    if items:
        decode_kernel[(programs,)](
            query, key_cache, value_cache, acc, sums, block_table, query_start_loc, seq_lens, query.stride(0), query.stride(1),
            *(s for t in (key_cache, value_cache) for s in t.stride()[:3]), block_table.stride(0), requests, *bounds,
            scale, inner, options.window, PAGE=page, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
    merge_kernel[(heads, max(1, min(most, tokens)), requests + 1)](
        out, acc, sums, query_start_loc, seq_lens, out.stride(0), out.stride(1), tokens, requests, *bounds,
        int(elsewhere), options.window, options.sinks, LEVELS=LEVELS, num_warps=1, **common,
    )  # fmt: skip
