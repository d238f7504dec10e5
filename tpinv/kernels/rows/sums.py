"""Column sums on the GPU: bias and norm-weight gradients, with the bytes that plain torch additions give on a CPU.

A plain sum has no tensor core to please. Inside a leaf its order is the left-complete binary tree over single elements, in
fp32. That tree has a property which makes it fast: cut the rows into blocks of FAN (a power of two); the tree over all
rows is the tree over the blocks' values, each block being such a tree itself. So one kernel, applied again to its own
output until one row is left, computes it, with FAN independent loads in flight per thread and no shared memory. The leaves
are combined by the same kernel, after the host has checked that the contract's tree over them is the left-complete one.

An absent right child is skipped, not added as zero: -0.0 + 0.0 would lose the sign.

Which rows a group holds is arithmetic that every program does for itself: leaf j of L covers rows [j n // L, (j + 1) n // L) of n, and
what a level leaves of it is a ceil division. So there is no table, nothing to copy to the GPU for a number of rows never seen before,
and nothing that a CUDA graph could find changed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpinv.runtime.device import ceil_div
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


@triton.jit
def leaf_rows(leaf, leaves, length):
    """int64 first row and number of rows of ``leaf``: tree.span of the contract, of ``length`` rows in ``leaves`` leaves."""
    n = length.to(tl.int64)
    start = leaf.to(tl.int64) * n // leaves
    return start, (leaf.to(tl.int64) + 1) * n // leaves - start


@triton.jit
def group_rows(group, first, leaves, length, shrink, pitch):
    """int64 first row of ``group`` and int32 number of its rows, after levels that made one row of ``shrink``: see Groups."""
    origin, _ = leaf_rows(first, leaves, length)
    start, count = leaf_rows(first + group, leaves, length)
    if pitch > 0:
        start = group.to(tl.int64) * pitch
        count = tl.maximum((count + shrink - 1) // shrink, 1)  # an empty group keeps one zero row, the value of its empty sum
    else:
        start -= origin
    return start, count.to(tl.int32)


@entry
@triton.jit(do_not_specialize=["first", "leaves", "length", "shrink", "pitch"])
def column_sum_kernel(x_ptr, out_ptr, first, leaves, length, shrink, pitch, cols, x_row, FAN: tl.constexpr, COLUMNS: tl.constexpr):
    """out [groups, blocks, cols] fp32: the tree over rows block * FAN ... of each group. Grid: blocks, groups, column blocks."""
    block = tl.program_id(0)  # the one axis without a limit of 65535
    group = tl.program_id(1)
    col = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start, count = group_rows(group, first, leaves, length, shrink, pitch)
    present = count - block * FAN
    if present > 0:
        ptr = x_ptr + (start + block * FAN) * x_row + col
        total = _block(ptr, x_row, tl.where(col < cols, present, 0), 0, FAN)
        out_row = group.to(tl.int64) * tl.num_programs(0) + block
        tl.store(out_ptr + out_row * cols + col, total, mask=col < cols)


class Groups(NamedTuple):
    """What a kernel is told of the rows that it adds up: group g holds leaf ``first`` + g of ``leaves`` over ``length`` rows, counted
    from the first leaf's first row. Once levels have made one row of ``shrink``, ``pitch`` is the distance between groups; before, 0."""

    first: int
    leaves: int
    length: int
    shrink: int = 1
    pitch: int = 0


class _Level(NamedTuple):
    """One launch: blocks of FAN rows of every group."""

    rows: Groups
    groups: int
    blocks: int
    empty: bool  # is some group?


Launch = Callable[[Tensor, Groups, tuple[int, int]], None]


def _sum_rows(x: Tensor) -> Launch:
    """What fills ``partial`` [groups, blocks, cols] with the blocks' sums of x."""
    cols = x.shape[1]

    def launch(partial: Tensor, rows: Groups, grid: tuple[int, int]) -> None:
        column_sum_kernel[(*grid, ceil_div(cols, COLUMNS))](x, partial, *rows, cols, x.stride(0), FAN=FAN, COLUMNS=COLUMNS)

    return launch


def _levels(rows: Groups, counts: list[int]) -> list[_Level]:
    """What adds up groups of ``counts`` rows to one row each."""
    levels, longest = [], max(counts)
    while True:
        blocks = max(1, ceil_div(longest, FAN))
        levels.append(_Level(rows, len(counts), blocks, not levels and min(counts) == 0))
        if blocks == 1:
            return levels
        rows, longest = rows._replace(shrink=rows.shrink * FAN, pitch=blocks), blocks


@functools.lru_cache(maxsize=4096)
def _plan(rows: int, tree: ReductionTree, rank: int, ranks: int) -> tuple[list[_Level], list[tuple[int, list[_Level]]]]:
    """The levels of the leaves; and for every subtree that is more than a leaf, of all if one is, its first leaf here and its levels."""
    owned, nodes = tree.owned(rank, ranks), tree.subtrees(rank, ranks)
    require_left_complete(tree, nodes)
    length = rows * ranks
    counts = [len(tree.span(Node(leaf, leaf + 1), length)) for leaf in owned]
    above = [] if len(nodes) == len(owned) else nodes
    return _levels(Groups(owned.start, tree.leaves, length), counts), [
        (node.start - owned.start, _levels(Groups(0, 1, node.stop - node.start), [node.stop - node.start])) for node in above
    ]


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
    leaves, subtrees = _plan(rows, tree, rank, ranks)
    values = _add_up(launch, leaves, rows, cols, device)
    if not subtrees:
        return values
    roots = [_add_up(_sum_rows(values[first:]), levels, len(values), cols, device) for first, levels in subtrees]
    return roots[0] if len(roots) == 1 else torch.cat(roots)


def _add_up(launch: Launch, levels: list[_Level], rows: int, cols: int, device: torch.device) -> Tensor:
    """[groups, cols]."""
    for level in levels:
        new = torch.zeros if level.empty else torch.empty
        partial = new(level.groups, level.blocks, cols, dtype=torch.float32, device=device)
        if cols and rows:
            launch(partial, level.rows, (level.blocks, level.groups))
        launch = _sum_rows(partial.flatten(0, 1))
    return partial[:, 0]
