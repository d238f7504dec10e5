"""Recovers the order of additions of anything that sums, compiled or not, ours or a stranger's.

The idea is FPRev's (Xie et al., USENIX ATC 2025): put +M at leaf i, -M at leaf j and 1 elsewhere, with M so large that ones added
to it vanish. Every one under the lowest common ancestor of i and j is swallowed before M cancels, every other one
survives: the result is n minus the number of leaves under that ancestor. All pairs together give the tree.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tpinv.tree import ReductionTree

Shape = int | tuple  # a leaf's index, or the tuple of a node's children


def tree_shape(tree: ReductionTree) -> Shape:
    """The contract's tree as nested tuples: ``((0, 1), 2)`` for three leaves. What :func:`order_probe` must return."""
    return tree.reduce(range(tree.leaves), lambda left, right: (left, right))


def order_probe(
    total: Callable[[Tensor], Tensor], leaves: int, *, batched: bool = False, dtype: torch.dtype = torch.float32, big: float = 2.0**60
) -> Shape:
    """The order in which ``total`` adds ``leaves`` values, as nested tuples of leaf indices.

    Args:
        total: maps [leaves] values to their sum, or with ``batched`` [B, leaves] to [B] sums (one call for all probes).
        leaves: n, at most 256 (the ones must be countable in bfloat16 nodes).
        dtype: of the values handed to ``total``.
        big: M; up to 256 ones vanish beside it in fp32 from 2^33 on. It must be finite in ``dtype``.

    Returns:
        An int for n = 1; a node is the tuple of its children, which are ordered by their first leaf, since a + b = b + a hides
        which came left. A node with more than two children was added in one step (a tensor core's fused sum).

    Raises:
        ValueError: the results are not those of any tree of additions (a value is dropped, scaled or added twice; compensated sums).
    """
    if not 1 <= leaves <= 256:
        raise ValueError(f"leaves={leaves} must be in [1, 256]")
    if not torch.tensor(big, dtype=dtype).isfinite():
        raise ValueError(f"big={big} is not finite in {dtype}; use float32 or bfloat16 values")
    pairs = [(i, j) for i in range(leaves) for j in range(i + 1, leaves)]
    probes = torch.ones(len(pairs) + 1, leaves, dtype=dtype)
    for row, (i, j) in enumerate(pairs):
        probes[row, i], probes[row, j] = big, -big
    sums = total(probes) if batched else torch.stack([total(probe) for probe in probes])
    *counts, ones = (leaves - sums.detach().double().cpu()).tolist()
    if ones != 0:
        raise ValueError(f"the sum of {leaves} ones came out as {leaves - ones}; this is not a plain sum of its inputs")
    under = {}  # number of leaves under the lowest common ancestor
    for (i, j), count in zip(pairs, counts, strict=True):
        under[i, j] = under[j, i] = count

    def build(members: list[int]) -> Shape:
        """The subtree over ``members``, grown from its first leaf outwards: siblings met at one ancestor share its count."""
        first, *rest = members
        shape: Shape = first
        for count in sorted({under[first, j] for j in rest}):
            siblings = [j for j in rest if under[first, j] == count]
            shape = (shape, *_split_fused(siblings, count))
        return shape

    def _split_fused(siblings: list[int], count: float) -> list[Shape]:
        """Siblings whose own ancestor is the node itself are separate children of it."""
        groups: list[list[int]] = []
        for j in siblings:
            home = next((g for g in groups if under[g[0], j] != count), None)
            groups.append([j]) if home is None else home.append(j)
        return [build(group) for group in groups]

    shape = build(list(range(leaves)))
    if _counts_under(shape) != {pair: under[pair] for pair in pairs}:
        raise ValueError("the results fit no tree of additions; is this a plain sum, and the same at every call?")
    return shape


def _counts_under(shape: Shape) -> dict[tuple[int, int], int]:
    """For each pair of leaves the number of leaves under their lowest common ancestor: what the probe must have seen."""
    counts = {}

    def walk(node: Shape) -> list[int]:
        if isinstance(node, int):
            return [node]
        children = [walk(child) for child in node]
        size = sum(map(len, children))
        for a, left in enumerate(children):
            for right in children[a + 1 :]:
                counts.update({(min(i, j), max(i, j)): size for i in left for j in right})
        return [leaf for child in children for leaf in child]

    walk(shape)
    return counts
