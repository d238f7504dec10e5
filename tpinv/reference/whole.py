"""Sums at once, as a single rank sees them: what p ranks must reproduce. M tokens, N out-features, K in-features, V vocabulary."""

from torch import Tensor

from tpinv import contract
from tpinv.reference.products import local_product, tree_product
from tpinv.reference.sums import finish, tree_sum
from tpinv.tree import ReductionTree


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
    tree = contract.COLUMN_DB.tree(tree)
    return finish(tree_sum(dy, tree, 0, 1, dim=0), tree, tree.subtrees(0, 1), dy.dtype)


def log_sum_exp(logits: Tensor, tree: ReductionTree) -> Tensor:
    """log(sum(exp(logits))) over the last dimension: [..., V] -> float32 [...]. Tree over the vocabulary; the maximum is exact."""
    tree = contract.VOCABULARY.tree(tree)
    logits = logits.float()
    top = logits.amax(-1)
    total = finish(tree_sum((logits - top.unsqueeze(-1)).exp(), tree, 0, 1, dim=-1), tree, tree.subtrees(0, 1))
    return total.log() + top
