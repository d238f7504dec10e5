"""Who computes a sum: tpinv.kernels on a GPU, tpinv.reference on a CPU. The device alone decides, never a shape or p.

A GPU that the kernels cannot serve is an error, not a silent change of bits.
"""

import torch
from torch import Tensor

from tpinv import kernels, reference
from tpinv.collectives import Ranks
from tpinv.tree import ReductionTree


def on_gpu(x: Tensor) -> bool:
    """Whether tpinv.kernels computes on ``x``. ValueError on a GPU that they cannot serve."""
    if x.device.type == "cpu":
        return False
    if reason := kernels.unavailable(x):
        raise ValueError(f"tpinv has no kernels for this tensor: {reason}; install what is missing, or compute on the CPU")
    return True


def tree_product(a: Tensor, b: Tensor, tree: ReductionTree, ranks: Ranks, *, stride: int = 1) -> Tensor:
    """``a [R, k/p] @ b [k/p, C]``, k sharded: the values [S, R, C] of this rank's maximal subtrees, in the node dtype."""
    backend = kernels if on_gpu(a) else reference
    return backend.tree_product(a, b, tree, ranks.rank, ranks.size, stride=stride)


def local_product(
    a: Tensor, b: Tensor, tree: ReductionTree, ranks: Ranks, *, dim: int, dtype: torch.dtype, stride: int = 1, bias: Tensor | None = None
) -> Tensor:
    """``a [R, k] @ b [k, C]`` as one chain over k, which is whole here; output dimension ``dim`` is the sharded one. [R, C] in
    ``dtype``, to which the sum is rounded once; then ``bias`` [C] is added and rounded once."""
    if on_gpu(a):
        return kernels.matmul(a, b, bias=bias, out_dtype=dtype)
    leaves = len(tree.owned(ranks.rank, ranks.size))
    y = reference.local_product(a, b, leaves, dim=dim, stride=stride).to(dtype)
    return y if bias is None else y + bias


def add_local_product(total: Tensor, a: Tensor, b: Tensor, tree: ReductionTree, ranks: Ranks, *, dim: int, stride: int = 1) -> None:
    """``total`` [R, C], float32, += :func:`local_product` rounded once to a's dtype: one fp32 addition."""
    if on_gpu(a):
        kernels.add_matmul(total, a, b)
    else:
        total.add_(local_product(a, b, tree, ranks, dim=dim, dtype=a.dtype, stride=stride))


def column_sum(x: Tensor, tree: ReductionTree, ranks: Ranks) -> Tensor:
    """Sum of x [T/p, H] over rows, of which every rank holds its part: float32 [S, H], the values of this rank's subtrees."""
    if on_gpu(x):
        return kernels.column_sum(x, tree, ranks.rank, ranks.size)
    return reference.tree_sum(x, tree, ranks.rank, ranks.size, dim=0)


def bias_grad(dy: Tensor, tree: ReductionTree) -> Tensor:
    """Sum of dy [M, N] over tokens, whole on this rank -> [N] in dy's dtype. Tree over tokens."""
    tree = tree.with_float32_nodes()
    alone = Ranks(None, 0, 1)
    return reference.finish(column_sum(dy, tree, alone), tree, tree.subtrees(0, 1), dy.dtype)
