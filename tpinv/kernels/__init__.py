"""GPU kernels of the contract: products and column sums whose order of additions is the tree's, at the speed of cuBLAS.

    tree_product    the values of a rank's maximal subtrees, [S, R, C]      a linear's sum over the sharded dimension
    tree_matmul     the root, rounded once, bias after it, [R, C]           the same when one rank holds everything
    matmul          one chain over k, [R, C]                                sums that no rank boundary cuts, wgrad among them
    add_matmul      the same, added to a float32 total                      wgrad straight into Megatron's main_grad
    column_sum      the values of a rank's maximal subtrees, [S, H]         bias and norm-weight gradients

Operands are ``a [R, k]`` and ``b [k, C]``, any strides, nothing is copied: a linear's forward is (x, W.t()), its dgrad
(dy, W), its wgrad (dy.t(), x). Element (i, j) depends on row i of a, column j of b, the tree and nothing else: not on M, on
the shard's width, or on which kernel and tile ran. kernels/ knows no process group.

Layers: problem.py describes one product; gemm.py (Triton) and sm90.py (csrc/sm90_tree_gemm.cu) compute it; tuner.py picks
among configurations whose bits it has verified; calls.py keeps what a repeated call needs. They are no torch operators: those that
compilers see are tpinv.ops, which call these.
Nothing is compiled or probed at import.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from tpinv.runtime.device import on_device_of_first
from tpinv.tree import ReductionTree

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(tensor: Tensor) -> str | None:
    """Why these kernels cannot take ``tensor``; None when they can. Then the reference has the same contract, slower."""
    return _unavailable_on(tensor.device)


@functools.cache
def _unavailable_on(device: torch.device) -> str | None:
    if device.type == "meta":
        return "a meta tensor holds no numbers to compute with"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"tensor is on {device}, the kernels need an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def available(tensor: Tensor) -> bool:
    """Whether these kernels can take ``tensor``."""
    return unavailable(tensor) is None


def tree_product(
    a: Tensor, b: Tensor, tree: ReductionTree, rank: int = 0, ranks: int = 1, *, stride: int = 1, precision: str = "ieee"
) -> Tensor:
    """``a [R, k/p] @ b [k/p, C]`` where k is the sharded dimension: the values of this rank's maximal subtrees.

    Args:
        a, b: one dtype of float32, bfloat16, float16, on one GPU.
        tree: its leaves order the sum over k; values are in its node dtype.
        stride: k is so many blocks side by side (2 for SwiGLU's fc1: gate, then up) and leaf j joins piece j of each.
        precision: of float32 products, "ieee" or "tf32"; the same on every rank that shall give the same bits.

    Returns:
        [S, R, C] in the node dtype, S = len(tree.subtrees(rank, ranks)).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no equal leaves, or ranks that do not divide the leaves.
    """
    dtype = torch.bfloat16 if tree.node_dtype == "bfloat16" else torch.float32
    return _tree_gemm(a, b, None, tree, rank, ranks, stride, dtype, precision)


def tree_matmul(
    a: Tensor, b: Tensor, tree: ReductionTree, *, bias: Tensor | None = None, stride: int = 1,
    out_dtype: torch.dtype | None = None, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """``a [R, k] @ b [k, C]`` where one rank holds every leaf: the root, rounded once to ``out_dtype`` (default: a's), then
    ``bias`` [C] (in that dtype) added and rounded once more. Returns [R, C]. Arguments and errors as in tree_product."""
    return _tree_gemm(a, b, bias, tree, 0, 1, stride, out_dtype or a.dtype, precision)[0]


def matmul(a: Tensor, b: Tensor, *, bias: Tensor | None = None, out_dtype: torch.dtype | None = None, precision: str = "ieee") -> Tensor:
    """``a [R, k] @ b [k, C]`` as one chain over k in fp32, for a k that no rank boundary cuts: column-parallel forward,
    row-parallel dgrad, and both wgrads (``matmul(dy.t(), x)``, tokens in increasing order). Returns [R, C] in ``out_dtype``
    (default: a's). k may have any length, 0 included. Errors as in tree_product."""
    return _tree_gemm(a, b, bias, ReductionTree(1), 0, 1, 1, out_dtype or a.dtype, precision)[0]


def add_matmul(total: Tensor, a: Tensor, b: Tensor, *, precision: str = "ieee") -> None:
    """``total += matmul(a, b, out_dtype=torch.float32)``, the same bytes in one kernel: the chain, not rounded, is added by one fp32 addition.

    ``total`` [R, C] is float32 and may have any strides; rows that are dense are what the kernel takes. Errors as in
    tree_product, and ValueError for a total of another dtype, shape or device.
    """
    _check(a, b, precision, total)
    if total.dtype != torch.float32 or total.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"total {tuple(total.shape)} {total.dtype} must be float32 [{a.shape[0]}, {b.shape[1]}]")
    if total.stride(1) != 1 or total.stride(0) < total.shape[1]:
        total.add_(matmul(a, b, out_dtype=torch.float32, precision=precision))
        return
    if total.numel() == 0 or a.shape[1] == 0:
        total.add_(0.0)  # an empty sum is +0.0, and -0.0 + 0.0 another zero
        return
    from tpinv.kernels.gemm import calls  # needs Triton

    calls.run(a, b, total.unsqueeze(0), None, 1, "float32", 0, 1, 1, precision, accumulate=True)


@on_device_of_first
def column_sum(x: Tensor, tree: ReductionTree, rank: int = 0, ranks: int = 1) -> Tensor:
    """Sum of x [T/p, H] over its rows: float32 [S, H], the values of this rank's maximal subtrees of the tree over all T rows.

    Inside a leaf the order is the left-complete binary tree over single rows, as in tpinv.reference: the same bytes on CPU
    and GPU. Nodes are float32 whatever the tree says. Ragged leaves and T = 0 are fine. ValueError unless x is a matrix.
    """
    _require(x)
    if x.dim() != 2:
        raise ValueError(f"column_sum sums the rows of a matrix, got shape {tuple(x.shape)}; flatten the tokens first")
    tree.owned(rank, ranks)
    from tpinv.kernels.rows import sums  # needs Triton

    return sums.column_sum(x, tree, rank, ranks)


def _require(tensor: Tensor) -> None:
    reason = None if tensor.is_cuda else unavailable(tensor)
    if reason:
        raise ValueError(f"tpinv.kernels cannot take this tensor: {reason}; use tpinv.reference")


def _check(a, b, precision, *others) -> None:
    _require(a)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be [R, k] and [k, C] with one k")
    given = [t for t in (a, b, *others) if t is not None]
    if len({t.device for t in given}) > 1 or a.dtype != b.dtype or a.dtype not in _DTYPES:
        described = [(str(t.dtype), str(t.device)) for t in given]
        raise ValueError(f"operands must share one GPU and one dtype of float32, bfloat16, float16; got {described}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f'precision={precision!r} must be "ieee" or "tf32"')


def _tree_gemm(a, b, bias, tree, rank, ranks, stride, out_dtype, precision) -> Tensor:
    _check(a, b, precision, bias)
    if bias is not None and (bias.shape != b.shape[1:] or bias.dtype != out_dtype or bias.stride(0) != 1):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} must be contiguous [{b.shape[1]}] in the output dtype {out_dtype}")
    if out_dtype not in _DTYPES:
        raise ValueError(f"out_dtype={out_dtype} must be float32, bfloat16 or float16")
    leaves = len(tree.owned(rank, ranks))
    if stride < 1 or a.shape[1] % (stride * leaves):
        raise ValueError(f"k={a.shape[1]} has no {leaves} equal leaves in each of {stride} pieces; pad it, or use a tree with fewer leaves")
    out = a.new_empty(len(tree.subtrees(rank, ranks)), a.shape[0], b.shape[1], dtype=out_dtype)
    if out.numel() == 0:
        return out
    if a.shape[1] == 0:  # an empty sum
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    from tpinv.kernels.gemm import calls  # needs Triton

    calls.run(a, b, out, bias, tree.leaves, tree.node_dtype, rank, ranks, stride, precision)
    return out
