"""Softmax statistics and gradients over a rank's part of the vocabulary, with the bits of tpinv.ops.cross_entropy.

Logits are read three times and never widened in memory: for the maximum, for the tree over exp(x - top), and for the gradient,
which is written in their own dtype. A program of the sums takes one row and one subtree; in it a leaf is cut into blocks of a power
of two, whose values are kept until all have come (kernels/sums.py says why the tree over blocks is the tree over elements).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.kernels.rows.libm import exp
from tpinv.kernels.rows.pairwise import absent, row_tree
from tpinv.kernels.rows.sums import leaf_rows, require_left_complete
from tpinv.runtime.device import ceil_div, on_device_of_first
from tpinv.runtime.launch import entry
from tpinv.tree import Node, ReductionTree

# Columns at a time and warps, for speed alone: docs/benchmarks-te.md.
_MAX = {"BLOCK": 4096, "num_warps": 4, "enable_fp_fusion": False}
_SUMS_BLOCK, _SUMS = 2048, {"num_warps": 2, "enable_fp_fusion": False}
_GRAD = {"BLOCK": 1024, "num_warps": 2, "enable_fp_fusion": False}


@entry
@triton.jit
def row_max_kernel(x_ptr, out_ptr, x_row, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, cols, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + at, mask=at < cols, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(top, 0)
    nan = tl.max((top != top).to(tl.int32), 0)  # the reduction above may lose a NaN
    tl.store(out_ptr + row, tl.where(nan > 0, float("nan"), largest))


@triton.jit
def _keep(cells, value, at, CELLS: tl.constexpr):
    return tl.where(tl.arange(0, CELLS)[None, :] == at, value[:, None], cells)


@entry
@triton.jit(do_not_specialize=["rows", "subtree", "subtrees", "owned", "first", "here", "leaves", "length"])
def vocab_sums_kernel(
    x_ptr, top_ptr, out_ptr, rows, subtree, subtrees, owned, first, here, leaves, length, x_row, blocks,
    SHIFTED: tl.constexpr, LEAVES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[:, subtree] of [1 + SHIFTED, subtrees, rows]: the trees over exp(x - top), and with SHIFTED, before it, over x - top.

    The subtree holds ``here`` leaves from ``first`` on, of ``leaves`` over ``length`` columns; x begins where leaf ``owned`` does. Grid:
    rows. BLOCKS and LEAVES: powers of two, at least the blocks of a leaf and the leaves of a subtree.
    """
    row = tl.program_id(0)
    origin, _ = leaf_rows(owned, leaves, length)
    top = tl.load(top_ptr + row)
    x_ptr += row.to(tl.int64) * x_row
    cells = absent(tl.zeros((1, LEAVES * BLOCKS), tl.float32))
    shifted_cells = cells
    for i in range(here * blocks):
        leaf = i // blocks
        block = i % blocks
        start, count = leaf_rows(first + leaf, leaves, length)
        start = (start - origin).to(tl.int32)
        count = count.to(tl.int32)
        at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        shifted = tl.load(x_ptr + start + at, mask=at < count, other=0.0).to(tl.float32) - top
        value = row_tree(tl.where(at < count, exp(shifted), absent(shifted)), 1, BLOCK)
        value = tl.where(count + block == 0, 0.0, value)  # an empty leaf is the empty sum
        cells = _keep(cells, value, leaf * BLOCKS + block, LEAVES * BLOCKS)
        if SHIFTED:
            value = row_tree(tl.where(at < count, shifted, absent(shifted)), 1, BLOCK)
            value = tl.where(count + block == 0, 0.0, value)
            shifted_cells = _keep(shifted_cells, value, leaf * BLOCKS + block, LEAVES * BLOCKS)
    plane = subtrees.to(tl.int64) * rows
    out_ptr += subtree.to(tl.int64) * rows + row + tl.arange(0, 1)
    if SHIFTED:
        tl.store(out_ptr, row_tree(shifted_cells, 1, LEAVES * BLOCKS))
        out_ptr += plane
    tl.store(out_ptr, row_tree(cells, 1, LEAVES * BLOCKS))


@entry
@triton.jit
def vocab_grad_kernel(
    x_ptr, dx_ptr, top_ptr, total_ptr, index_ptr, dloss_ptr, x_row, cols, hit, smooth, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = (exp(x - top) / total - hit [column = index] - smooth) dloss. index: -1 where the target is elsewhere, -2 where ignored."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(top_ptr + row)
    total = tl.load(total_ptr + row)
    index = tl.load(index_ptr + row)
    dloss = tl.load(dloss_ptr + row)
    x = tl.load(x_ptr + row * x_row + at, mask=at < cols, other=0.0).to(tl.float32)
    dx = tl.div_rn(exp(x - top), tl.zeros_like(x) + total)
    dx = tl.where(at == index, dx - hit, dx)
    if SMOOTH:
        dx = dx - smooth
    dx = tl.where(index == -2, 0.0, dx * dloss)
    tl.store(dx_ptr + row * cols + at, dx.to(dx_ptr.dtype.element_ty), mask=at < cols)


@on_device_of_first
def row_max(x: Tensor) -> Tensor:
    """x [M, V/p], unit column stride, at least one column -> float32 [M]; NaN where a row has one."""
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    if len(x):
        row_max_kernel[(len(x),)](x, out, x.stride(0), x.shape[1], **_MAX)
    return out


@functools.lru_cache(maxsize=4096)
def _plan(tree: ReductionTree, rank: int, ranks: int, cols: int) -> tuple[int, tuple[Node, ...], int, int]:
    """The first leaf here, the subtrees, the most leaves of one, and the columns of the longest leaf."""
    owned, nodes = tree.owned(rank, ranks), tree.subtrees(rank, ranks)
    require_left_complete(tree, nodes)
    longest = max(len(tree.span(Node(leaf, leaf + 1), cols * ranks)) for leaf in owned)
    return owned.start, nodes, max(node.stop - node.start for node in nodes), longest


@on_device_of_first
def vocab_sums(x: Tensor, top: Tensor, tree: ReductionTree, rank: int, ranks: int, shifted: bool) -> list[Tensor]:
    """Values [S, M] of this rank's subtrees: (the sum of x - top if ``shifted``,) the sum of exp(x - top)."""
    owned, nodes, leaves, longest = _plan(tree, rank, ranks, x.shape[1])
    out = x.new_empty(1 + shifted, len(nodes), len(x), dtype=torch.float32)
    block = min(_SUMS_BLOCK, triton.next_power_of_2(max(longest, 2)))
    blocks = max(1, ceil_div(longest, block))
    for subtree, node in enumerate(nodes if len(x) else ()):
        vocab_sums_kernel[(len(x),)](
            x, top, out, len(x), subtree, len(nodes), owned, node.start, node.stop - node.start, tree.leaves, x.shape[1] * ranks,
            x.stride(0), blocks, SHIFTED=shifted,
            LEAVES=triton.next_power_of_2(leaves), BLOCKS=triton.next_power_of_2(blocks), BLOCK=block, **_SUMS,
        )  # fmt: skip
    return list(out.unbind(0))


@on_device_of_first
def vocab_grad(x: Tensor, top: Tensor, total: Tensor, index: Tensor, dloss: Tensor, hit: float, smooth: float) -> Tensor:
    """[M, V/p] in x's dtype. index int64 [M]: the target's column here, -1 where it is on another rank, -2 where it is ignored."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        grid = (len(x), ceil_div(x.shape[1], _GRAD["BLOCK"]))
        vocab_grad_kernel[grid](x, dx, top, total, index, dloss, x.stride(0), x.shape[1], hit, smooth, SMOOTH=smooth != 0.0, **_GRAD)
    return dx
