"""Who computes: tpinv.kernels on a GPU, tpinv.reference on a CPU, by the same signatures. The device alone decides, never a shape or p.

A GPU that the kernels cannot serve is an error, not a silent change of bits. Functions below say what p ranks need of a product or a sum;
which rank holds what they know from ``ranks``, and how it is added from ``tree``, which is that of the sum in contract.py.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from tpinv import contract, kernels, reference
from tpinv.collectives import Ranks, sum_over_ranks
from tpinv.ops.registry import ALONE
from tpinv.ops.shapes import output
from tpinv.tree import ReductionTree


def on_gpu(x: Tensor) -> bool:
    """Whether tpinv.kernels computes on ``x``. ValueError on a device that they cannot serve."""
    if x.device.type == "cpu":
        return False
    if reason := kernels.unavailable(x):
        raise ValueError(f"tpinv has no kernels for this tensor: {reason}; install what is missing, or compute on the CPU")
    return True


def rows_backend(name: str, x: Tensor) -> ModuleType:
    """The module ``name`` of kernels/rows or of the reference, by where ``x`` is."""
    return _module(name, on_gpu(x))


@functools.cache
def _module(name: str, gpu: bool) -> ModuleType:
    return importlib.import_module(f"tpinv.kernels.rows.{name}" if gpu else f"tpinv.reference.{name}")  # at first use: kernels need Triton


def tree_product(a: Tensor, b: Tensor, tree: ReductionTree, ranks: Ranks, *, stride: int = 1) -> Tensor:
    """``a [R, k/p] @ b [k/p, C]``, k sharded: the values [S, R, C] of this rank's maximal subtrees, in the node dtype."""
    backend = kernels if on_gpu(a) else reference
    return backend.tree_product(a, b, tree, ranks.rank, ranks.size, stride=stride)


def sum_product(
    a: Tensor, b: Tensor, lead: torch.Size, tree: ReductionTree, ranks: Ranks, scatter: bool, dtype: torch.dtype, stride: int = 1
) -> Tensor:
    """:func:`tree_product` summed over all ranks as [*lead, C] in ``dtype``, or this rank's part of its dimension 0."""
    if ranks.size == 1 and on_gpu(a):  # the root comes rounded out of the kernel
        return output(kernels.tree_matmul(a, b, tree, stride=stride, out_dtype=dtype), (*lead, b.shape[1]))
    values = tree_product(a, b, tree, ranks, stride=stride)
    values = values.view(values.shape[0], *lead, values.shape[-1])
    result = sum_over_ranks(values, tree, ranks, dtype, scatter)
    return output(result, result.shape)


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
    """``total`` [R, C], float32, += :func:`local_product` in float32, not rounded before: one fp32 addition."""
    if on_gpu(a):
        kernels.add_matmul(total, a, b)
    else:
        total.add_(local_product(a, b, tree, ranks, dim=dim, dtype=torch.float32, stride=stride))


def column_sum(x: Tensor, tree: ReductionTree, ranks: Ranks) -> Tensor:
    """Sum of x [T/p, H] over rows, of which every rank holds its part: float32 [S, H], the values of this rank's subtrees."""
    backend = kernels if on_gpu(x) else reference
    return backend.column_sum(x, tree, ranks.rank, ranks.size)


def bias_grad(dy: Tensor, tree: ReductionTree) -> Tensor:
    """Sum of dy [M, N] over tokens, whole on this rank -> [N] in dy's dtype. Tree over tokens."""
    tree = contract.COLUMN_DB.tree(tree)
    return reference.finish(column_sum(dy, tree, ALONE), tree, tree.subtrees(0, 1), dy.dtype)
