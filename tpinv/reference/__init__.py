"""The contract on tensors, in plain torch: the oracle for every kernel, and the CPU backend.

Two kinds of sums, two orders inside a leaf, one tree above them:

- A **product** (linear forward, dgrad, wgrad) accumulates a leaf in fp32 from zero by a chain of steps in increasing k. The
  chain here is ``acc = acc + a[:, k:k+128] @ b[k:k+128]``. What a BLAS does inside one step depends on the shape it is
  given (and, for long k, on the number of threads), so every step is given the same shape at every TP size and every batch:
  64 rows by 128 k by a number of columns that is a whole dimension or one leaf of it, filled up with zeros to a multiple of
  16, from fresh copies. Row i of a product then depends on row i alone.
- A **plain sum** (bias and norm gradients, row sums, the softmax denominator) has no tensor core to please: inside a leaf
  it is again the left-complete binary tree, down to the single elements, in elementwise fp32 additions that IEEE 754
  fixes on any machine.

A sum over a dimension that no rank boundary cuts (column-parallel forward, row-parallel dgrad, wgrad) is one chain.
Legend: M tokens, N out-features, K in-features, V vocabulary, p ranks, L leaves; weights are [N, K].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tpinv.tree import Node, ReductionTree

ROWS = 64  # rows of one step: a multiple of every micro-tile seen, so that a row's position does not matter
COLUMNS = 16  # columns of one step are filled up to a multiple: with 5, 7 or 9 of them MKL adds a row by its position
STEP = 128  # k of one step: short enough that no BLAS splits it further

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def torch_node_dtype(tree: ReductionTree) -> torch.dtype:
    return torch.bfloat16 if tree.node_dtype == "bfloat16" else torch.float32


def node_add(tree: ReductionTree) -> Callable[[Tensor, Tensor], Tensor]:
    """The addition of a node: left + right in fp32, rounded once to the node dtype."""
    dtype = torch_node_dtype(tree)
    return lambda left, right: (left.float() + right.float()).to(dtype)


def check_dtypes(**tensors: Tensor | None) -> None:
    """ValueError unless all given tensors share one dtype of float32, bfloat16, float16."""
    found = {t.dtype for t in tensors.values() if t is not None}
    if len(found) > 1:
        dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
        raise ValueError(f"dtypes must agree, got {dtypes}; cast before the call (autocast does not reach tpinv)")
    for dtype in found.difference(SUPPORTED_DTYPES):
        name = next(name for name, t in tensors.items() if t is not None)
        raise ValueError(f"{name} has dtype {dtype}; sums are accumulated in float32, use float32, bfloat16 or float16")


# -- products ------------------------------------------------------------------------------------------------------------


def chain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [R, k] @ b [k, C]`` in fp32: one chain over k of fixed-shape steps. Returns float32 [R, C].

    The bits of row i depend on ``a[i]``, ``b`` and nothing else, provided C is the same at every TP size. Autocast is off
    in here: it would turn these fp32 steps into bf16 ones, also inside an autograd.Function.
    """
    (rows, length), columns = a.shape, b.shape[1]
    out = torch.zeros(rows, columns, dtype=torch.float32, device=a.device)
    padded = -(-columns // COLUMNS) * COLUMNS
    for k in range(0, length, STEP):
        width = min(STEP, length - k)
        b_step = torch.zeros(width, padded, dtype=torch.float32, device=a.device)
        b_step[:, :columns] = b[k : k + width]
        for r in range(0, rows, ROWS):
            height = min(ROWS, rows - r)
            tile = torch.zeros(ROWS, width, dtype=torch.float32, device=a.device)  # never a view: a BLAS may look at addresses
            tile[:height] = a[r : r + height, k : k + width]
            with torch.autocast(a.device.type, enabled=False):
                out[r : r + height] += (tile @ b_step)[:height, :columns]
    return out


def split_leaves(t: Tensor, dim: int, leaves: int, stride: int = 1) -> list[Tensor]:
    """Cuts ``dim`` into ``leaves`` equal leaves. With ``stride`` s the dimension is s blocks side by side (SwiGLU's fc1:
    gate, then up) and leaf j joins piece j of each block, so that a leaf holds the same features at every TP size."""
    blocks = t.chunk(stride, dim)
    pieces = zip(*(block.chunk(leaves, dim) for block in blocks), strict=True)
    return [torch.cat(piece, dim) if stride > 1 else piece[0] for piece in pieces]


def join_leaves(parts: Sequence[Tensor], dim: int, stride: int = 1) -> Tensor:
    """Inverse of :func:`split_leaves`."""
    if stride == 1:
        return torch.cat(list(parts), dim)
    return torch.cat([torch.cat(block, dim) for block in zip(*(p.chunk(stride, dim) for p in parts), strict=True)], dim)


def local_product(a: Tensor, b: Tensor, leaves: int, *, dim: int, stride: int = 1) -> Tensor:
    """``a [R, k] @ b [k, C]`` where k is whole on this rank and the output's dimension ``dim`` (0: R, 1: C) is the sharded
    one, of which this rank holds ``leaves`` leaves. Each leaf is a product of its own: its shape does not depend on p.

    Returns float32 [R, C]. Column-parallel forward (dim=1), row-parallel dgrad (dim=1), both wgrads.
    """
    if dim == 0:
        return join_leaves([chain_matmul(part, b) for part in split_leaves(a, 0, leaves, stride)], 0, stride)
    return join_leaves([chain_matmul(a, part) for part in split_leaves(b, 1, leaves, stride)], 1, stride)


def tree_product(a: Tensor, b: Tensor, tree: ReductionTree, rank: int, ranks: int, *, stride: int = 1) -> Tensor:
    """``a [R, k/p] @ b [k/p, C]`` where k is the sharded dimension: the values of this rank's maximal subtrees.

    Returns [S, R, C] in the node dtype. Row-parallel forward (k = K) and column-parallel dgrad (k = N).
    """
    count = len(tree.owned(rank, ranks))
    products = zip(split_leaves(a, 1, count, stride), split_leaves(b, 0, count, stride), strict=True)
    dtype = torch_node_dtype(tree)
    values = (chain_matmul(a_leaf, b_leaf).to(dtype) for a_leaf, b_leaf in products)
    return _subtree_values(values, tree, rank, ranks)


def _subtree_values(leaf_values, tree: ReductionTree, rank: int, ranks: int) -> Tensor:
    """Adds a rank's leaf values, given from left to right, up to its maximal subtrees: [S, ...]."""
    leaf_values = iter(leaf_values)
    add = node_add(tree)
    nodes = tree.subtrees(rank, ranks)
    return torch.stack([tree.reduce((next(leaf_values) for _ in range(*node)), add, node) for node in nodes])


# -- plain sums ----------------------------------------------------------------------------------------------------------


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

    Returns float32 [S, ...] without ``dim``. The nodes are float32 whatever the tree's node dtype. Bias and norm
    gradients (tokens, or heads and tokens) and the softmax denominator (vocabulary). ValueError via tree.owned.
    """
    tree = tree.with_float32_nodes()
    owned = tree.owned(rank, ranks)
    length = x.shape[dim] * ranks
    first = tree.span(Node(owned.start, owned.start), length).start
    spans = (tree.span(Node(leaf, leaf + 1), length) for leaf in owned)
    values = (pairwise_sum(x.narrow(dim, span.start - first, len(span)), dim) for span in spans)
    return _subtree_values(values, tree, rank, ranks)


# -- the whole sum at once: what p ranks must reproduce --------------------------------------------------------------------


def finish(values: Tensor, tree: ReductionTree, nodes: Sequence[Node], out_dtype: torch.dtype | None = None) -> Tensor:
    """Adds up the tree above ``nodes``, whose values are [len(nodes), ...]; the root is rounded once to ``out_dtype``."""
    root = tree.finish(dict(zip(nodes, values.unbind(0), strict=True)), node_add(tree))
    return root.to(out_dtype or root.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, tree: ReductionTree) -> Tensor:
    """Row-parallel forward as one rank sees it: x [M, K], weight [N, K], bias [N] or None -> [M, N] in x's dtype.

    Tree over K; the root is rounded once to the output dtype, then the bias is added and rounded once more, so that a
    bias added by the caller (Megatron's skip_bias_add) gives the same bits.
    """
    tree.leaf_length(x.shape[1], "in_features")
    y = finish(tree_product(x, weight.t(), tree, 0, 1), tree, tree.subtrees(0, 1), x.dtype)
    return y if bias is None else y + bias


def linear_dgrad(dy: Tensor, weight: Tensor, tree: ReductionTree, *, stride: int = 1) -> Tensor:
    """Column-parallel dgrad as one rank sees it: dy [M, N], weight [N, K] -> dx [M, K] in dy's dtype. Tree over N."""
    tree.leaf_length(dy.shape[1] // stride, "out_features")
    return finish(tree_product(dy, weight, tree, 0, 1, stride=stride), tree, tree.subtrees(0, 1), dy.dtype)


def linear_wgrad(dy: Tensor, x: Tensor, tree: ReductionTree, *, sharded: int, stride: int = 1) -> Tensor:
    """dW = dy^T x as one rank sees it: dy [M, N], x [M, K] -> [N, K] in x's dtype. One chain over tokens.

    ``sharded`` is the weight's sharded dimension, 0 (column-parallel) or 1 (row-parallel).
    """
    return local_product(dy.t(), x, tree.leaves, dim=sharded, stride=stride).to(x.dtype)


def bias_grad(dy: Tensor, tree: ReductionTree) -> Tensor:
    """db = sum of dy [M, N] over tokens -> [N] in dy's dtype. Tree over tokens."""
    tree = tree.with_float32_nodes()
    return finish(tree_sum(dy, tree, 0, 1, dim=0), tree, tree.subtrees(0, 1), dy.dtype)


def log_sum_exp(logits: Tensor, tree: ReductionTree) -> Tensor:
    """log(sum(exp(logits))) over the last dimension: [..., V] -> float32 [...]. Tree over the vocabulary; the maximum is exact."""
    tree = tree.with_float32_nodes()
    logits = logits.float()
    top = logits.amax(-1)
    total = finish(tree_sum((logits - top.unsqueeze(-1)).exp(), tree, 0, 1, dim=-1), tree, tree.subtrees(0, 1))
    return total.log() + top
