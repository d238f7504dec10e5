"""Plain sums: inside a leaf the left-complete binary tree, down to single elements, in fp32 additions that IEEE 754 fixes on any machine.

It is the shape of tree.py once more, so that a leaf, a node and a row of a matrix are added by one rule, and the nodes are float32
whatever the tree's node dtype says: payloads are small. On a GPU: kernels/rows/sums.py, the same bytes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tpinv.reference.numbers import node_add
from tpinv.tree import Node, ReductionTree


def pairwise_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` in fp32 by the left-complete binary tree over its single elements; 0.0 when there are none.

    Level by level: neighbours are added, an odd last one is carried. That is the tree of ReductionTree(n) (a property
    of Merkle trees, tested), in log2(n) elementwise operations.
    """
    x = x.float()
    if x.shape[dim] == 0:
        return x.sum(dim)
    x = x.movedim(dim, 0)
    while (n := x.shape[0]) > 1:
        paired = x[0 : n - 1 : 2] + x[1:n:2]
        x = torch.cat([paired, x[n - 1 :]]) if n % 2 else paired
    return x[0]


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, which is whole on every rank: [..., H] -> float32 [...]."""
    return pairwise_sum(x, -1)


def tree_sum(x: Tensor, tree: ReductionTree, rank: int, ranks: int, *, dim: int) -> Tensor:
    """Sum over the sharded dimension ``dim``, of which this rank holds its p-th part: values of its maximal subtrees.

    Returns float32 [S, ...] without ``dim``. Bias and norm gradients (tokens, or heads and tokens) and the softmax
    denominator (vocabulary). ValueError via tree.owned.
    """
    owned = tree.owned(rank, ranks)
    length = x.shape[dim] * ranks
    first = tree.span(Node(owned.start, owned.start), length).start
    spans = (tree.span(Node(leaf, leaf + 1), length) for leaf in owned)
    values = (pairwise_sum(x.narrow(dim, span.start - first, len(span)), dim) for span in spans)
    return subtree_values(values, tree, rank, ranks, torch.add)


def column_sum(x: Tensor, tree: ReductionTree, rank: int = 0, ranks: int = 1) -> Tensor:
    """Sum of x [T/p, H] over its rows: float32 [S, H], the values of this rank's maximal subtrees of the tree over all T rows."""
    return tree_sum(x, tree, rank, ranks, dim=0)


def subtree_values(leaf_values: Iterator[Tensor], tree: ReductionTree, rank: int, ranks: int, add) -> Tensor:
    """This rank's leaves, in order -> [S, ...], the values of its maximal subtrees. Leaves are consumed lazily."""
    nodes = tree.subtrees(rank, ranks)
    return torch.stack([tree.reduce((next(leaf_values) for _ in range(*node)), add, node) for node in nodes])


def finish(values: Tensor, tree: ReductionTree, nodes: Sequence[Node], out_dtype: torch.dtype | None = None) -> Tensor:
    """Adds up the tree above ``nodes``, whose values are [len(nodes), ...]; the root is rounded once to ``out_dtype``."""
    root = tree.finish(dict(zip(nodes, values.unbind(0), strict=True)), node_add(tree))
    return root.to(out_dtype or root.dtype)
