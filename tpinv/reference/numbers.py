"""What every sum here agrees on about numbers: the dtypes that float32 holds exactly, and the addition of a node."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpinv.tree import ReductionTree

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
