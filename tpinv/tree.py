"""The contract: one binary tree that fixes the order of every sum.

A sum over a dimension of global length K (in-features, out-features in dgrad, tokens, vocabulary, heads) is
cut into L consecutive leaves. What adds the leaves is the left-complete binary tree of RFC 6962 (section 2.1,
Merkle trees): n leaves split at the largest power of two below n. Six leaves:

                [0,6)                 leaf   accumulated in fp32, in an order of its own that no rank boundary cuts
              /       \\               node   left + right: one fp32 addition, rounded once to node_dtype
          [0,4)        [4,6)          root   rounded once to the output dtype; a bias is added after that
         /     \\       /   \\
      [0,2)   [2,4)   4     5         with 3 ranks, rank 0 owns [0,2), rank 1 [2,4), rank 2 [4,6)
      /  \\    /  \\                   with 2 ranks, rank 0 owns [0,2) and leaf 2, rank 1 leaf 3 and [4,6)
     0    1  2    3

With p ranks (p divides L) rank r owns leaves [r L/p, (r+1) L/p), hence a list of maximal subtrees. It sends the
values of those and nothing else; the rest of the tree is finished where the result is needed. That this changes
no bit is the law that everything in tpinv rests on:

    reduce(leaves) == finish({node: reduce(leaves under node) for node in the maximal subtrees of every rank})

It holds for symbols (tests/test_tree.py proves it with ``add = lambda a, b: (a, b)``), so it holds for floats.

This file is the only place where the shape is decided. It knows no tensor: the values and ``add`` are the caller's.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")

NODE_DTYPES = ("float32", "bfloat16")


class Node(NamedTuple):
    """The subtree over leaves ``start`` to ``stop`` (exclusive); a leaf when it covers exactly one."""

    start: int
    stop: int

    @property
    def is_leaf(self) -> bool:
        return self.stop - self.start == 1

    def __str__(self) -> str:
        return str(self.start) if self.is_leaf else f"[{self.start},{self.stop})"


@dataclass(frozen=True)
class ReductionTree:
    """The order of additions of every sum: ``leaves`` leaves under the left-complete binary tree.

    Args:
        leaves: L, at least 1. Every tensor-parallel size that shall give the same bits must divide it: 8 serves
            p = 1, 2, 4, 8; 24 serves 1, 2, 3, 4, 6, 8, 12, 24. It is a promise, not a cost by itself.
        node_dtype: what a leaf's finished value and every node are rounded to, "float32" or "bfloat16" (half the
            bytes on the wire, about 8 bits of precision). It governs the linears' activation-sized sums; sums with small
            payloads (parameter gradients, vocabulary) keep float32 nodes, see :meth:`with_float32_nodes`.

    Raises:
        ValueError: leaves below 1 or not an int, or an unknown node_dtype.
    """

    leaves: int
    node_dtype: str = "float32"

    def __post_init__(self):
        if isinstance(self.leaves, bool) or not isinstance(self.leaves, int) or self.leaves < 1:
            raise ValueError(f"leaves={self.leaves!r} must be an int of at least 1; use 8, or 24 to serve TP=3 and 6 as well")
        if self.node_dtype not in NODE_DTYPES:
            raise ValueError(f"node_dtype={self.node_dtype!r} is unknown; use one of {', '.join(map(repr, NODE_DTYPES))}")

    @property
    def fingerprint(self) -> str:
        """Names the order of additions. Two runs can only agree when their fingerprints do; log it, store it, compare it."""
        return f"tpinv1-rfc6962-L{self.leaves}-{self.node_dtype}"

    @property
    def root(self) -> Node:
        return Node(0, self.leaves)

    def with_float32_nodes(self) -> "ReductionTree":
        """The same shape with float32 nodes."""
        return self if self.node_dtype == "float32" else ReductionTree(self.leaves)

    # -- the shape ---------------------------------------------------------------------------------------------------

    def children(self, node: Node) -> tuple[Node, Node]:
        """Left and right child: ``node`` split at the largest power of two below its number of leaves (RFC 6962)."""
        size = node.stop - node.start
        if size < 2:
            raise ValueError(f"node {node} is a leaf and has no children")
        middle = node.start + (1 << (size - 1).bit_length() - 1)
        return Node(node.start, middle), Node(middle, node.stop)

    @functools.cache
    def subtrees(self, rank: int, ranks: int) -> tuple[Node, ...]:
        """The maximal subtrees under which every leaf belongs to ``rank`` of ``ranks``, from left to right.

        One when L and ranks are powers of two. Their values are all that a rank ever sends.
        """
        owned = self.owned(rank, ranks)

        def maximal(node: Node) -> list[Node]:
            if node.stop <= owned.start or owned.stop <= node.start:
                return []
            if owned.start <= node.start and node.stop <= owned.stop:
                return [node]
            left, right = self.children(node)
            return maximal(left) + maximal(right)

        return tuple(maximal(self.root))

    @functools.cache
    def merges(self, node: Node | None = None) -> tuple[int, ...]:
        """The streaming order a kernel needs: entry i is the number of pending values to merge after leaf i of ``node``.

        Keep a stack. For each leaf from left to right, pop that many pending values, each the left operand of one
        addition, then push the result. One value is left at the end, and never more than about log2(L) are pending.
        """
        node = self.root if node is None else node
        if node.is_leaf:
            return (0,)
        left, right = self.children(node)
        *head, last = self.merges(right)
        return (*self.merges(left), *head, last + 1)

    # -- which leaves, and which elements, belong to whom ------------------------------------------------------------

    @functools.cache
    def owned(self, rank: int, ranks: int) -> range:
        """Leaves of ``rank`` of ``ranks``: [rank L/ranks, (rank+1) L/ranks). ValueError unless ranks divides L."""
        if ranks < 1 or self.leaves % ranks:
            fits = [p for p in range(1, self.leaves + 1) if self.leaves % p == 0]
            raise ValueError(
                f"{ranks} ranks do not divide leaves={self.leaves} (its divisors: {fits}); "
                f"use a tree whose leaves are a multiple of every tensor-parallel size, such as 8 or 24"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank={rank} must be in [0, {ranks})")
        share = self.leaves // ranks
        return range(rank * share, (rank + 1) * share)

    def span(self, node: Node, length: int) -> range:
        """Elements under ``node`` of a dimension of global ``length``: leaf j covers [j length // L, (j+1) length // L).

        Equal leaves where L divides length. Otherwise leaves differ by one element (and are empty below L elements),
        which is for tokens, heads and vocabulary: for every p that divides both L and length, rank boundaries
        still fall on leaf boundaries.
        """
        return range(node.start * length // self.leaves, node.stop * length // self.leaves)

    def leaf_length(self, length: int, name: str) -> int:
        """``length / L`` for the features of a linear, whose leaves must be equal. ``name`` is for the ValueError."""
        if length < 1:
            raise ValueError(f"{name}={length} must be at least 1")
        if length % self.leaves:
            fits = [n for n in range(1, min(length, 128) + 1) if length % n == 0]
            padded = max(1, -(-length // self.leaves)) * self.leaves
            raise ValueError(
                f"{name}={length} has no {self.leaves} equal leaves; use a tree with leaves in {fits}, or pad {name} to {padded}"
            )
        return length // self.leaves

    # -- the two ways to walk it -------------------------------------------------------------------------------------

    def reduce(self, leaves: Iterable[T], add: Callable[[T, T], T], node: Node | None = None) -> T:
        """Adds the values of the leaves under ``node`` (default: the root), consuming them lazily from left to right."""
        pending: list[T] = []
        for value, count in zip(leaves, self.merges(node), strict=True):
            for _ in range(count):
                value = add(pending.pop(), value)
            pending.append(value)
        return pending.pop()

    def finish(self, values: Mapping[Node, T], add: Callable[[T, T], T], node: Node | None = None) -> T:
        """Adds up the tree above the subtrees whose values are given. ValueError when a leaf is covered by none of them."""
        node = self.root if node is None else node
        if node in values:
            return values[node]
        if node.is_leaf:
            raise ValueError(f"leaf {node} lies under none of the given subtrees {[str(n) for n in values]}")
        left, right = self.children(node)
        return add(self.finish(values, add, left), self.finish(values, add, right))
