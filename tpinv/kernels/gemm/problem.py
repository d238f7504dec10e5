"""What a tree GEMM computes: one subtree of one product, described once for every kernel that can compute it.

``out [R, C] = a [R, k] b [C, k]^T`` where k holds the leaves of one subtree. Any of the three products of a linear is
this, by choice of views and never by a copy:

    forward  y  = x W^T    a = x    [M, K]   b = W    [N, K]   leaves over K
    dgrad    dx = dy W     a = dy   [M, N]   b = W^T  [K, N]   leaves over N
    wgrad    dW = dy^T x   a = dy^T [N, M]   b = x^T  [K, M]   one leaf: all tokens

A leaf is ``pieces`` runs of ``length`` consecutive k (pieces = 2 pairs SwiGLU's gate with its up), one after the other
in one chain. Legend: M tokens, N out-features, K in-features, R x C output, L leaves.
"""

import functools
from dataclasses import dataclass

from torch import Tensor

from tpinv.tree import Node, ReductionTree


@functools.cache
def most_pending(merges: tuple[int, ...]) -> int:
    """How many values wait at most while a later leaf is accumulated: the stack a kernel needs."""
    return _most_pending(tuple((i, count) for i, count in enumerate(merges)), merges)


@functools.cache
def most_pending_pairs(merges: tuple[int, ...]) -> int:
    """The same for a kernel that keeps a left leaf in its accumulators until its sibling, the next leaf, is finished.

    ValueError when some left leaf is not followed by its sibling: no left-complete tree, and a kernel that must not be used.
    """
    steps, i = [], 0
    while i < len(merges):
        if merges[i] == 0 and i + 1 < len(merges):
            if merges[i + 1] == 0:
                raise ValueError(f"merges={merges}: leaf {i + 1} is no sibling of leaf {i}")
            i += 1
            steps.append((i, merges[i] - 1))
        else:
            steps.append((i, merges[i]))
        i += 1
    return _most_pending(tuple(steps), merges)


def _most_pending(steps: tuple[tuple[int, int], ...], merges: tuple[int, ...]) -> int:
    pending, most = 0, 0
    for leaf, count in steps:
        most = max(most, pending)
        pending += 1 - count
        if pending < 1:
            raise ValueError(f"merges={merges} pops a value that is not there after leaf {leaf}")
    if pending != 1:
        raise ValueError(f"merges={merges} leaves {pending} values instead of one")
    return most


@functools.cache
def splits(tree: ReductionTree, node: Node) -> dict[int, tuple[int, ...]]:
    """Into how many equal parts the leaves of ``node`` may be cut, with the merges of one part: 1 always can.

    Decided by the contract: the order inside the parts, then a perfect tree above them, must be the order of ``node``.
    """
    leaves = node.stop - node.start
    whole = tree.reduce(iter(range(leaves)), lambda left, right: (left, right), node)
    found = {}
    for parts in (1, 2, 4, 8):
        if leaves % parts:
            break
        share = leaves // parts
        part = tree.merges(Node(node.start, node.start + share))
        values = []
        for i in range(parts):
            stack: list = []
            for leaf, count in enumerate(part):
                value = i * share + leaf
                for _ in range(count):
                    value = (stack.pop(), value)
                stack.append(value)
            values.append(stack.pop())
        while len(values) > 1:
            values = [(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        if values[0] == whole:
            found[parts] = part
    return found


@dataclass(frozen=True)
class Problem:
    """One subtree of one product, on tensors.

    ``a`` [R, k] and ``b`` [C, k] are views with any strides whose k starts at the subtree's first element; leaf j, piece i
    covers k in [i * piece_stride + j * length, ... + length). ``out`` [R, C] has unit column stride.
    """

    a: Tensor
    b: Tensor
    out: Tensor
    bias: Tensor | None
    leaves: int
    length: int
    pieces: int
    piece_stride: int
    merges: tuple[int, ...]
    splits: dict[int, tuple[int, ...]]  # parts -> merges of one part; see splits()
    node_bf16: bool
    precision: str  # of fp32 products: "ieee" or "tf32"
    accumulate: bool = False  # the root is added to ``out``, which is float32

    @property
    def rows(self) -> int:
        return self.out.shape[0]

    @property
    def cols(self) -> int:
        return self.out.shape[1]

    @property
    def major(self) -> tuple[int, int]:
        """For a and b: 0 when k is contiguous, 1 when rows are."""
        return tuple(0 if t.stride(1) == 1 or t.shape[1] == 1 else 1 for t in (self.a, self.b))

    def numerics(self) -> tuple:
        """What the compiled code may depend on, bits included, besides the configuration: the unit of verification."""
        bias = self.bias is not None
        out = f"+= {self.out.dtype}" if self.accumulate else str(self.out.dtype)
        return (str(self.a.dtype), out, self.major, self.pieces, self.merges, self.node_bf16, self.precision, bias)


def make_problems(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, tree: ReductionTree, rank: int, ranks: int, pieces: int, precision: str
) -> list[Problem]:
    """One problem per maximal subtree of ``rank``; ``out`` is [S, R, C]. Shapes are the caller's to check."""
    owned = tree.owned(rank, ranks)
    piece_stride = a.shape[1] // pieces
    length = piece_stride // len(owned)
    problems = []
    for plane, node in enumerate(tree.subtrees(rank, ranks)):
        start = (node.start - owned.start) * length
        problems.append(
            Problem(
                a[:, start:],
                b[:, start:],
                out[plane],
                bias,
                node.stop - node.start,
                length,
                pieces,
                piece_stride,
                tree.merges(node),
                splits(tree, node),
                tree.node_dtype == "bfloat16",
                precision,
            )  # fmt: skip
        )
    return problems
