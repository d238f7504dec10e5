"""The tree GEMM in Triton: any GPU, any strides, every dtype, and the interpreter on a CPU.

One flat loop runs over all k of all leaves of a unit, so that the loads of the next leaf are in flight while the last one
is merged. At a leaf's end the contract's table says how many pending values to merge; the stack is at most DEPTH tiles in
registers. That is what small M (decode) wants, where tiles are tiny and only the bytes of W count; at large M the
registers run out and csrc/sm90_tree_gemm.cu takes over with the same bits.

SPLIT > 1 cuts a tile's leaves into subtrees for as many programs; each publishes its value and the last to arrive adds them
up. No program waits for another one.

The accumulator enters every dot as an operand that is carried around the loop. Writing ``left + dot(a, b)`` instead would
let Triton's Combine pass turn it into ``dot(a, b, left)``: another tree.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from tpinv.kernels.gemm.problem import Problem, most_pending
from tpinv.runtime.device import ceil_div
from tpinv.runtime.launch import entry, kind
from tpinv.runtime.state import device_state


@triton.jit
def _round_node(x, NODE_BF16: tl.constexpr):
    if NODE_BF16:
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x


@triton.jit
def _pop(slot, acc, pending, count, POSITION: tl.constexpr, NODE_BF16: tl.constexpr):
    """Merges the pending value at POSITION of the stack into ``acc`` if it is on top and still to be merged."""
    take = (count > 0) & (pending == POSITION + 1)
    acc = tl.where(take, _round_node(slot + acc, NODE_BF16), acc)
    return acc, pending - take.to(tl.int32), count - take.to(tl.int32)


@triton.jit
def _perfect_sum(ptr, stride, FIRST: tl.constexpr, COUNT: tl.constexpr, NODE_BF16: tl.constexpr):
    """The perfect tree over COUNT published values. ``.cg``: they were written by other multiprocessors."""
    if COUNT == 1:
        return tl.load(ptr + FIRST * stride, cache_modifier=".cg")
    else:
        left = _perfect_sum(ptr, stride, FIRST, COUNT // 2, NODE_BF16)
        right = _perfect_sum(ptr, stride, FIRST + COUNT // 2, COUNT // 2, NODE_BF16)
        return _round_node(left + right, NODE_BF16)


@triton.jit
def _store_root(
    out_ptr, bias_ptr, value, row, col, rows, cols, out_row, BIAS: tl.constexpr, ACCUMULATE: tl.constexpr
):  # fmt: skip
    """Rounds the root once to the output's dtype; then adds the bias and rounds once more, or (ACCUMULATE, fp32) adds the root to what is
    there. row and col are broadcastable."""
    at = out_ptr + row.to(tl.int64) * out_row + col
    mask = (row < rows) & (col < cols)
    ROOT: tl.constexpr = out_ptr.dtype.element_ty
    value = value.to(ROOT)
    if BIAS:
        bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0)
        value = (value.to(tl.float32) + bias.to(tl.float32)).to(ROOT)
    if ACCUMULATE:
        value = tl.load(at, mask=mask, other=0.0) + value
    tl.store(at, value, mask=mask)


_ANY_NUMBER = ["rows", "cols", "steps", "part_leaves"]


@entry
@triton.jit(do_not_specialize=_ANY_NUMBER)
def tree_gemm_kernel(
    a_ptr, b_ptr, out_ptr, bias_ptr, parts_ptr, arrivals_ptr, merges_ptr,
    rows, cols, length, steps, pieces, part_leaves, a_row, a_k, a_piece, b_col, b_k, b_piece, out_row,
    DEPTH: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    NODE_BF16: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] = a b^T over the leaves of one subtree. merges_ptr: int32, for the leaves of one part.

    Grid: tiles * SPLIT. SWAP computes the tile transposed, so that narrow batches fill the matrix instructions' N.
    """
    tiles_m = tl.cdiv(rows, BM)
    tiles_n = tl.cdiv(cols, BN)
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    band = tile // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    m = (band * GROUP + inside % height) * BM + tl.arange(0, BM)
    n = (inside // height) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    # Rows past the end read row 0 again: their results are not stored, and an unmasked load is a faster one.
    a_tile = a_ptr + tl.where(m < rows, m, 0).to(tl.int64)[:, None] * a_row + (ks * a_k)[None, :]
    b_tile = b_ptr + tl.where(n < cols, n, 0).to(tl.int64)[:, None] * b_col + (ks * b_k)[None, :]

    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    if DEPTH > 0:
        s0 = acc
    if DEPTH > 1:
        s1 = acc
    if DEPTH > 2:
        s2 = acc
    if DEPTH > 3:
        s3 = acc
    if DEPTH > 4:
        s4 = acc
    if DEPTH > 5:
        s5 = acc
    pending = 0

    leaf_steps = steps * pieces
    first = part.to(tl.int64) * part_leaves
    for i in range(part_leaves * leaf_steps):
        leaf = i // leaf_steps
        in_leaf = i % leaf_steps
        piece = in_leaf // steps
        at = (in_leaf % steps) * BK
        k = (first + leaf) * length + at
        a_at = a_tile + (k * a_k + piece * a_piece)
        b_at = b_tile + (k * b_k + piece * b_piece)
        if RAGGED:  # the last step of a run must not read into the next leaf
            a = tl.load(a_at, mask=(at + ks < length)[None, :], other=0.0)
            b = tl.load(b_at, mask=(at + ks < length)[None, :], other=0.0)
        else:
            a = tl.load(a_at)
            b = tl.load(b_at)
        if SWAP:
            acc = tl.dot(b, a.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if DEPTH > 0:
            if in_leaf == leaf_steps - 1:
                acc = _round_node(acc, NODE_BF16)
                count = tl.load(merges_ptr + leaf)
                if DEPTH > 5:
                    acc, pending, count = _pop(s5, acc, pending, count, 5, NODE_BF16)
                if DEPTH > 4:
                    acc, pending, count = _pop(s4, acc, pending, count, 4, NODE_BF16)
                if DEPTH > 3:
                    acc, pending, count = _pop(s3, acc, pending, count, 3, NODE_BF16)
                if DEPTH > 2:
                    acc, pending, count = _pop(s2, acc, pending, count, 2, NODE_BF16)
                if DEPTH > 1:
                    acc, pending, count = _pop(s1, acc, pending, count, 1, NODE_BF16)
                acc, pending, count = _pop(s0, acc, pending, count, 0, NODE_BF16)
                s0 = tl.where(pending == 0, acc, s0)
                if DEPTH > 1:
                    s1 = tl.where(pending == 1, acc, s1)
                if DEPTH > 2:
                    s2 = tl.where(pending == 2, acc, s2)
                if DEPTH > 3:
                    s3 = tl.where(pending == 3, acc, s3)
                if DEPTH > 4:
                    s4 = tl.where(pending == 4, acc, s4)
                if DEPTH > 5:
                    s5 = tl.where(pending == 5, acc, s5)
                pending += 1
                acc = tl.zeros_like(acc)
    if DEPTH > 0:
        value = s0
    else:
        value = _round_node(acc, NODE_BF16)

    if SWAP:
        row = m[None, :]
        col = n[:, None]
        inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    else:
        row = m[:, None]
        col = n[None, :]
        inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    if SPLIT == 1:
        _store_root(out_ptr, bias_ptr, value, row, col, rows, cols, out_row, BIAS, ACCUMULATE)
    else:
        published = parts_ptr + (tile * SPLIT).to(tl.int64) * (BM * BN) + inner
        tl.store(published + part * (BM * BN), value)
        tl.debug_barrier()  # every warp has stored before one thread announces it
        before = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        if before == SPLIT - 1:
            tl.debug_barrier()
            root = _perfect_sum(published, BM * BN, 0, SPLIT, NODE_BF16)
            _store_root(out_ptr, bias_ptr, root, row, col, rows, cols, out_row, BIAS, ACCUMULATE)
            tl.store(arrivals_ptr + tile, 0)


@dataclass(frozen=True)
class TritonConfig:
    """A tile of rows x cols over k in steps; parts: subtrees a tile's leaves are split into, one program each."""

    rows: int
    cols: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    swap: bool = False
    group: int = 8

    @property
    def name(self) -> str:
        return "triton-" + "-".join(str(int(v)) for v in asdict(self).values())


# What every other configuration must equal, byte by byte. It spills at large depth and nobody should time it.
CANONICAL = TritonConfig(64, 64, 64, 4, 3)
CANONICAL_FP32 = TritonConfig(64, 64, 32, 4, 2)
MAX_DEPTH = 6
_POINTERS = 7  # of the kernel's arguments, at the front


def canonical(problem: Problem) -> TritonConfig:
    return CANONICAL_FP32 if problem.a.dtype == torch.float32 else CANONICAL


def _numbers(problem: Problem, config: TritonConfig) -> tuple[int, ...]:
    """The kernel's arguments between its pointers and its constants."""
    a, b = problem.a, problem.b
    return (
        problem.rows, problem.cols, problem.length, ceil_div(problem.length, config.k), problem.pieces, len(problem.splits[config.parts]),
        a.stride(0), a.stride(1), problem.piece_stride * a.stride(1),
        b.stride(0), b.stride(1), problem.piece_stride * b.stride(1), problem.out.stride(0),
    )  # fmt: skip


def _constants(problem: Problem, config: TritonConfig, masked: bool = False) -> dict:
    return {
        "DEPTH": most_pending(problem.splits[config.parts]), "SPLIT": config.parts,
        "BIAS": problem.bias is not None, "ACCUMULATE": problem.accumulate, "NODE_BF16": problem.node_bf16,
        "PRECISION": problem.precision, "RAGGED": masked or problem.length % config.k != 0,
        "BM": config.rows, "BN": config.cols, "BK": config.k, "SWAP": config.swap, "GROUP": config.group,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def _argument_kinds(problem: Problem, config: TritonConfig) -> dict[str, tuple]:
    """What Triton may compile in of the arguments. Scratch memory, counters and tables are tpinv's own and always alike."""
    bias = problem.out if problem.bias is None else problem.bias
    kinds = {"a_ptr": kind(problem.a), "b_ptr": kind(problem.b), "out_ptr": kind(problem.out), "bias_ptr": kind(bias)}
    names = tree_gemm_kernel.arg_names[_POINTERS:]
    return kinds | {n: kind(x, n not in _ANY_NUMBER) for n, x in zip(names, _numbers(problem, config), strict=False)}


def layout(problem: Problem) -> tuple:
    """All that the compiled code may depend on of addresses, strides and sizes, whatever the configuration."""
    return tuple(_argument_kinds(problem, canonical(problem)).values())


def compiled(problem: Problem, config: TritonConfig) -> tuple[tuple[str, object], ...]:
    """All that is compiled into the kernel that computes ``problem`` with ``config``."""
    return tuple((_argument_kinds(problem, config) | _constants(problem, config)).items())


def run(problem: Problem, config: TritonConfig, masked: bool = False) -> None:
    """Fills ``problem.out``, or adds to it, on the current stream, or on the CPU under the interpreter.

    ``masked``: every load is, also where a leaf is a whole number of steps. Without a difference to the values.
    """
    a, b, out = problem.a, problem.b, problem.out
    merges = problem.splits[config.parts]
    if most_pending(merges) > MAX_DEPTH:
        raise ValueError(f"a subtree of {problem.leaves} leaves keeps more than {MAX_DEPTH} values pending; use at most 64 leaves a rank")
    state = device_state(out.device.index)
    tiles = ceil_div(problem.rows, config.rows) * ceil_div(problem.cols, config.cols)
    parts = arrived = out
    if config.parts > 1:
        parts = torch.empty(tiles * config.parts * config.rows * config.cols, dtype=torch.float32, device=out.device)
        arrived = state.counters.take(tiles)
    tree_gemm_kernel[(tiles * config.parts,)](
        a, b, out, out if problem.bias is None else problem.bias, parts, arrived, state.table(merges),
        *_numbers(problem, config), **_constants(problem, config, masked),
    )  # fmt: skip


_PROGRAMS = 132  # that keep a GPU busy: multiprocessors of an H100


def _parts(problem: Problem, rows: int, cols: int) -> tuple[int, ...]:
    """Into how many parts the leaves of a tile may be cut: the fewest that keep a GPU busy, twice as many, and half. With few rows a product
    takes as long as its weights take to arrive, which wants many loads under way."""
    tiles, every = ceil_div(problem.rows, rows) * ceil_div(problem.cols, cols), sorted(problem.splits)
    enough = next((n for n in every if tiles * n >= _PROGRAMS), every[-1])
    return tuple(dict.fromkeys(n for n in (enough, 2 * enough, enough // 2) if n in problem.splits))


def candidates(problem: Problem) -> list[TritonConfig]:
    """Configurations worth timing for ``problem``, likely winners first."""
    rows = problem.rows
    tile = max(16, 1 << (rows - 1).bit_length())
    if problem.a.element_size() == 4:
        shapes = [(min(tile, 64), 64, 32, 4, 3, False)] + ([(128, 64, 32, 8, 3, False)] if rows > 64 else [])
    elif rows <= 16:
        shapes = [(tile, 64, 128, 4, 4, True), (tile, 32, 128, 4, 5, False)]
    elif rows <= 64:
        shapes = [(tile, 64, 128, 4, 4, True), (tile, 32, 128, 4, 4, False), (tile, 64, 128, 4, 3, False)]
    elif rows <= 128:
        shapes = [(tile, 64, 128, 4, 3, False), (tile, 32, 128, 4, 4, False), (tile, 128, 64, 8, 4, False)]
    else:
        shapes = [(128, 128, 64, 8, 3, False), (128, 64, 64, 4, 4, False), (64, 64, 64, 4, 3, False)]
    if problem.leaves == 1 and problem.a.element_size() == 2 and rows <= 128 and ceil_div(problem.cols, 32) < _PROGRAMS:
        # One chain that nothing may cut, and few columns: each multiprocessor has its loads to wait for, so more of them, with less each.
        shapes += [(16, 16, 256, 2, 5, False), (16, 32, 256, 4, 4, False)] if rows <= 16 else [(tile, 16, 128, 4, 5, False)]
        shapes += [(tile, 32, 256, 4, 3, False)] if 16 < rows <= 64 else []
    split = rows <= (64 if problem.a.element_size() == 4 else 128)
    return [TritonConfig(*shape[:5], n, shape[5]) for shape in shapes for n in (_parts(problem, *shape[:2]) if split else (1,))]
