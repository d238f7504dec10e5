"""The kernels as torch operators: opaque to torch.compile, with shapes it can trace, usable under CUDA graphs.

None of them has a gradient formula: the gradient of one product of a linear is another product, and which ranks share it is
known to tpinv.ops alone.
"""

import functools

import torch
from torch import Tensor

from tpinv.kernels.gemm import calls
from tpinv.kernels.rows import sums
from tpinv.runtime.device import on_device_of_first
from tpinv.tree import ReductionTree

_library = torch.library.Library("tpinv", "FRAGMENT")
_library.define(
    "tree_gemm(Tensor a, Tensor b, Tensor? bias, int leaves, str node_dtype, int rank, int ranks, int stride, "
    "ScalarType out_dtype, str precision) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "add_matmul(Tensor(a!) total, Tensor a, Tensor b, str precision) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "column_sum(Tensor x, int leaves, int rank, int ranks) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


@functools.cache
def _subtrees(leaves: int, rank: int, ranks: int) -> int:
    return len(ReductionTree(leaves).subtrees(rank, ranks))


def tree_gemm_cuda(a, b, bias, leaves, node_dtype, rank, ranks, stride, out_dtype, precision) -> Tensor:
    out = a.new_empty(_subtrees(leaves, rank, ranks), a.shape[0], b.shape[1], dtype=out_dtype)
    if out.numel() == 0:
        return out
    if a.shape[1] == 0:  # an empty sum
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    calls.run(a, b, out, bias, leaves, node_dtype, rank, ranks, stride, precision)
    return out


def tree_gemm_fake(a, b, bias, leaves, node_dtype, rank, ranks, stride, out_dtype, precision) -> Tensor:
    return a.new_empty(_subtrees(leaves, rank, ranks), a.shape[0], b.shape[1], dtype=out_dtype)


def add_matmul_cuda(total, a, b, precision) -> None:
    if total.numel() == 0 or a.shape[1] == 0:
        total.add_(0.0)  # an empty sum is +0.0, and -0.0 + 0.0 another zero
        return
    calls.run(a, b, total.unsqueeze(0), None, 1, "float32", 0, 1, 1, precision, accumulate=True)


def add_matmul_fake(total, a, b, precision) -> None:
    pass


@on_device_of_first
def column_sum_cuda(x, leaves, rank, ranks) -> Tensor:
    return sums.column_sum(x, ReductionTree(leaves), rank, ranks)


def column_sum_fake(x, leaves, rank, ranks) -> Tensor:
    return x.new_empty(_subtrees(leaves, rank, ranks), x.shape[1], dtype=torch.float32)


_library.impl("tree_gemm", tree_gemm_cuda, "CUDA")
_library.impl("add_matmul", add_matmul_cuda, "CUDA")
_library.impl("column_sum", column_sum_cuda, "CUDA")
torch.library.register_fake("tpinv::tree_gemm", tree_gemm_fake, lib=_library)
torch.library.register_fake("tpinv::add_matmul", add_matmul_fake, lib=_library)
torch.library.register_fake("tpinv::column_sum", column_sum_fake, lib=_library)
