"""Column sums on the GPU: bias and norm-weight gradients, with the bytes that plain torch additions give on a CPU.

A plain sum has no tensor core to please. Inside a leaf its order is the left-complete binary tree over single elements, in
fp32. That tree has a property which makes it fast: cut the rows into blocks of FAN (a power of two); the tree over all
rows is the tree over the blocks' values, each block being such a tree itself. So one kernel, applied again to its own
output until one row is left, computes it, with FAN independent loads in flight per thread and no shared memory. The leaves
are combined by the same kernel, after the host has checked that the contract's tree over them is the left-complete one.

An absent right child is skipped, not added as zero: -0.0 + 0.0 would lose the sign.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.runtime.device import ceil_div, table
from tpinv.runtime.launch import entry
from tpinv.tree import Node, ReductionTree

FAN = 32  # rows of a block
COLUMNS = 512  # columns of a program


@triton.jit
def _block(ptr, row_stride, present, START: tl.constexpr, COUNT: tl.constexpr):
    """The tree over rows START .. START + COUNT of a block, of which the first ``present`` (one number a column) exist."""
    if COUNT == 1:
        return tl.load(ptr + START * row_stride, mask=present > START, other=0.0).to(tl.float32)
    else:
        left = _block(ptr, row_stride, present, START, COUNT // 2)
        right = _block(ptr, row_stride, present, START + COUNT // 2, COUNT // 2)
        return tl.where(present > START + COUNT // 2, left + right, left)


@entry
@triton.jit
def column_sum_kernel(x_ptr, out_ptr, spans_ptr, cols, x_row, out_group, FAN: tl.constexpr, COLUMNS: tl.constexpr):
    """out [groups, blocks, cols] fp32: the tree over rows block * FAN ... of each group. spans_ptr: int32 [groups, 2], first row
    and number of rows. Grid: blocks, groups, column blocks."""
    block = tl.program_id(0)  # the one axis without a limit of 65535
    group = tl.program_id(1)
    col = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(spans_ptr + 2 * group).to(tl.int64)
    count = tl.load(spans_ptr + 2 * group + 1)
    present = count - block * FAN
    if present > 0:
        ptr = x_ptr + (start + block * FAN) * x_row + col
        total = _block(ptr, x_row, tl.where(col < cols, present, 0), 0, FAN)
        tl.store(out_ptr + group.to(tl.int64) * out_group + block.to(tl.int64) * cols + col, total, mask=col < cols)


Launch = Callable[[Tensor, Tensor, tuple[int, int]], None]


def _sum_rows(x: Tensor) -> Launch:
    """What fills ``partial`` [groups, blocks, cols] with the blocks' sums of x, given the groups' spans on the GPU."""
    cols = x.shape[1]

    def launch(partial: Tensor, spans: Tensor, grid: tuple[int, int]) -> None:
        column_sum_kernel[(*grid, ceil_div(cols, COLUMNS))](
            x, partial, spans, cols, x.stride(0), partial.stride(0), FAN=FAN, COLUMNS=COLUMNS
        )

    return launch


class _Level(NamedTuple):
    """One launch: blocks of FAN rows of every group, whose first rows and counts are ``spans`` (int32 [groups, 2], on the GPU)."""

    spans: Tensor
    groups: int
    blocks: int
    most: int  # rows of the longest group
    least: int


def _levels(device: torch.device, spans: list[tuple[int, int]]) -> Iterator[_Level]:
    """What adds up groups of rows, spans of (first row, rows), to one row each."""
    while True:
        counts = [count for _, count in spans]
        blocks = max(1, -(-max(counts) // FAN))
        yield _Level(table(spans, device), len(spans), blocks, max(counts), min(counts))
        if blocks == 1:
            return
        # An empty group keeps one zero row, the value of its empty sum.
        spans = [(group * blocks, max(1, -(-count // FAN))) for group, count in enumerate(counts)]


@functools.cache
def _plan(device: torch.device, rows: int, tree: ReductionTree, rank: int, ranks: int) -> tuple[_Level, ...]:
    """The leaves, then the subtrees."""
    owned, nodes = tree.owned(rank, ranks), tree.subtrees(rank, ranks)
    require_left_complete(tree, nodes)
    length = rows * ranks
    first = tree.span(Node(owned.start, owned.start), length).start
    spans = [tree.span(Node(leaf, leaf + 1), length) for leaf in owned]
    levels = list(_levels(device, [(span.start - first, len(span)) for span in spans]))
    if len(nodes) < len(owned):
        levels += _levels(device, [(node.start - owned.start, node.stop - node.start) for node in nodes])
    return tuple(levels)


def require_left_complete(tree: ReductionTree, nodes: tuple[Node, ...]) -> None:
    """ValueError unless the contract's tree below each of ``nodes`` is the left-complete one, the only shape that kernels of plain sums know."""
    if not all(tree.merges(node) == ReductionTree(node.stop - node.start).merges() for node in nodes):
        raise ValueError(f"{tree.fingerprint} is not left-complete below {nodes}; these kernels know no other shape")


def column_sum(x: Tensor, tree: ReductionTree, rank: int = 0, ranks: int = 1) -> Tensor:
    """Sum of x over its rows, of which this rank holds its p-th part: values of its maximal subtrees, with float32 nodes.

    Args:
        x: [T/p, H], any floating dtype, unit column stride or not (then copied). T/p may be 0.
        tree: over all T rows; leaf j covers ``tree.span(Node(j, j + 1), T)``.

    Returns:
        float32 [S, H], S = len(tree.subtrees(rank, ranks)).

    Raises:
        ValueError: x is not two-dimensional, or ranks does not divide the leaves (tree.owned).
    """
    if x.dim() != 2:
        raise ValueError(f"column_sum sums the rows of a matrix, got shape {tuple(x.shape)}; flatten the tokens first")
    if x.stride(1) != 1:
        x = x.contiguous()
    return tree_of_rows(_sum_rows(x), *x.shape, x.device, tree, rank, ranks)


def tree_of_rows(launch: Launch, rows: int, cols: int, device: torch.device, tree: ReductionTree, rank: int, ranks: int) -> Tensor:
    """:func:`column_sum` of rows [T/p, H] that need not lie in memory: ``launch`` forms them while it adds up their first level."""
    for level in _plan(device, rows, tree.with_float32_nodes(), rank, ranks):
        out = torch.zeros if level.least == 0 else torch.empty
        partial = out(level.groups, level.blocks, cols, dtype=torch.float32, device=device)
        if cols and level.most:
            launch(partial, level.spans, (level.blocks, level.groups))
        launch = _sum_rows(partial.view(-1, cols))
    return partial[:, 0]
