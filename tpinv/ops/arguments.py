"""What functions ask of the arguments that many of them share. Errors are ValueErrors that say rule, value and fix."""

import functools
import math

import torch
from torch import Tensor

from tpinv.collectives import Ranks, refuse
from tpinv.tree import ReductionTree


def require(ranks: Ranks, name: str, problem: str | None) -> None:
    """ValueError(``problem``), if there is one, here and on the other ranks of ``name``'s call: for what is found before its operator runs."""
    if problem:
        error = ValueError(problem)
        refuse(ranks, name, error)
        raise error


def problem_of_tree(tree: ReductionTree) -> str | None:
    """An int or None would fail later, by another name."""
    if not isinstance(tree, ReductionTree):
        return f"tree={tree!r} must be a tpinv.ReductionTree; pass tree=ReductionTree(8), the same on every rank"
    return None


def problem_of_eps(eps: float) -> str | None:
    """Of a norm's eps. (With 0 a row of zeros is 0 / 0, NaN, as in torch.)"""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not math.isfinite(eps) or eps < 0:
        return f"eps={eps!r} must be a finite number of at least 0; use 1e-5, or what the checkpoint was trained with"
    return None


def check_eps(eps: float) -> None:
    """ValueError with :func:`problem_of_eps`."""
    if problem := problem_of_eps(eps):
        raise ValueError(problem)


@functools.cache
def tree_of(leaves: int, node_dtype: str = "float32") -> ReductionTree:
    """The tree that an operator's arguments name."""
    return ReductionTree(leaves, node_dtype)


def check_ids(ids: Tensor, bound: int, name: str, ignore_index: int | None = None) -> Tensor:
    """``ids`` as int64; ValueError unless they are integers in [0, bound) (or ignore_index). On CUDA the range check is asynchronous."""
    check_integers(ids, name)
    ids = ids.long()  # a rank subtracts its first id, which would wrap around in uint8
    fine = (ids >= 0) & (ids < bound)
    if ignore_index is not None:
        fine |= ids == ignore_index
    rule = f"{name} must be in [0, {bound}), the global vocabulary"
    if ids.is_cuda:
        torch._assert_async(fine.all(), rule if ignore_index is None else f"{rule}, or ignore_index={ignore_index}")
    elif not fine.all():
        wrong = ids[~fine]
        fix = "" if ignore_index is None else f"; write ignore_index={ignore_index} where there is no label, or pass another ignore_index"
        raise ValueError(f"{rule}; got {wrong[0].item()} and {wrong.numel() - 1} others{fix}")
    return ids


def check_integers(ids: Tensor, name: str) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
