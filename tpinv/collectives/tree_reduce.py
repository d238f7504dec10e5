"""tree_all_reduce and tree_reduce_scatter: the rank part of the tree.

Where every rank can map every other rank's memory (the GPUs of one NVLink domain) it runs in one kernel (nvlink.py), elsewhere
over the ProcessGroup (process_group.py). The order of additions comes from the tree alone; no path, message size or slice
boundary changes a bit.

    tree_all_reduce, tree_reduce_scatter    check, announce the call to the peers, and add
    sum_over_ranks                          adds: for a function whose ranks have agreed on its call, which decides all of this one's arguments

The first two are one torch operator, opaque to torch.compile and with a shape that it can trace; what runs uncompiled does without.
"""

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor

from tpinv import reference
from tpinv.collectives import nvlink, process_group, symmetric
from tpinv.collectives.agreement import agree, chip, ranks_for, refuse
from tpinv.collectives.group import Ranks, resolve
from tpinv.runtime.device import on_device_of_first
from tpinv.tree import ReductionTree

_NAMES = {False: "tree_all_reduce", True: "tree_reduce_scatter"}
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_library = torch.library.Library("tpinv", "FRAGMENT")
_library.define(
    "tree_reduce(Tensor values, int leaves, str node_dtype, str group, ScalarType out_dtype, bool scatter) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def tree_all_reduce(values: Tensor, *, tree: ReductionTree, group=None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Sums over all ranks' leaves by the tree; every rank gets the whole sum.

    Args:
        values: [S, ...] in the tree's node dtype: the values of this rank's maximal subtrees, in the order of
            ``tree.subtrees(rank, p)``. The shape behind S is the same on every rank.
        tree: its leaves are a multiple of the group's size.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the default group.
        out_dtype: the root is rounded to it once (default: the node dtype), before it travels again.

    Returns:
        [...] in out_dtype, the same bytes on every rank and for every group size. It has no gradient. With one rank it may share
        memory with ``values``.

    Raises:
        ValueError: p does not divide the leaves, S is not this rank's number of subtrees, dtype is not the node dtype, or
            ``values`` require a gradient (with gradients enabled).
    """
    return _reduce(values, tree, group, out_dtype, False)


def tree_reduce_scatter(values: Tensor, *, tree: ReductionTree, group=None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Sums like :func:`tree_all_reduce`, bit for bit; rank r gets rows [r M/p, (r+1) M/p) of the sum.

    Args and errors as there. values: [S, M, ...] with p dividing M. Returns [M/p, ...] in out_dtype.
    """
    return _reduce(values, tree, group, out_dtype, True)


def all_reduce_add_norm(
    values: Tensor, residual: Tensor, weight: Tensor, eps: float, *, tree: ReductionTree, ranks: Ranks
) -> tuple[Tensor, Tensor] | None:
    """hidden = residual + tree_all_reduce(values) and its RMSNorm in one kernel, for reduce_add_rms_norm; None, on all ranks alike,
    where there is no such kernel. values [S, ..., H], residual [..., H], weight [H]; the ranks have agreed on the call."""
    if not values.is_cuda or ranks.size == 1 or nvlink.refuses(tree, ranks.size, residual.dtype):
        return None
    workspace = symmetric.workspace(ranks, values.device)
    if workspace is None:
        return None
    width = residual.shape[-1]
    with torch.cuda.device(values.device):
        fused = nvlink.add_norm(workspace, values.reshape(len(values), -1, width), residual.reshape(-1, width), weight, eps, tree)
    return fused and (fused[0].view(residual.shape), fused[1].view(residual.shape))


def _reduce(values: Tensor, tree: ReductionTree, group, out_dtype: torch.dtype | None, scatter: bool) -> Tensor:
    ranks = ranks_for(_NAMES[scatter], group)
    try:
        _check_arguments(values, tree, out_dtype)
        if ranks.size == 1:
            check_values(values, tree, ranks, scatter)
    except ValueError as error:
        refuse(ranks, _NAMES[scatter], error)
        raise
    out_dtype = out_dtype or values.dtype
    if ranks.size == 1:
        return reference.finish(values, tree, tree.subtrees(0, 1), out_dtype)
    arguments = values, tree.leaves, tree.node_dtype, ranks.group.group_name, out_dtype, scatter
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(values) is not Tensor or values.is_neg():
        return torch.ops.tpinv.tree_reduce(*arguments)
    with torch.no_grad():
        return _tree_reduce(*arguments)


def sum_over_ranks(
    values: Tensor, tree: ReductionTree, ranks: Ranks, out_dtype: torch.dtype | None = None, scatter: bool = False
) -> Tensor:
    """:func:`tree_all_reduce`, or :func:`tree_reduce_scatter` with ``scatter``, of arguments that are right and the same on every rank."""
    out_dtype = out_dtype or values.dtype
    if ranks.size == 1:
        return reference.finish(values, tree, tree.subtrees(0, 1), out_dtype)
    if values.is_cuda and not nvlink.refuses(tree, ranks.size, out_dtype):
        if workspace := symmetric.workspace(ranks, values.device):
            return _over_shared_memory(values, workspace, tree, out_dtype, scatter)
    path = process_group.reduce_scatter if scatter else process_group.all_reduce
    return path(values, tree, ranks, out_dtype)


def _check_arguments(values: Tensor, tree: ReductionTree, out_dtype: torch.dtype | None) -> None:
    """What has to be right before there can be an operator call."""
    if not isinstance(tree, ReductionTree):
        raise ValueError(f"tree is {tree!r}; pass a tpinv.ReductionTree, such as ReductionTree(8)")
    if not isinstance(values, Tensor) or isinstance(values, DTensor):
        raise ValueError(
            f"values are a {type(values).__name__}; pass a plain tensor (of a DTensor, the subtrees' values of its to_local())"
        )
    if out_dtype is not None and out_dtype not in _OUT_DTYPES:
        raise ValueError(f"out_dtype={out_dtype} cannot hold a sum that is rounded once; use one of {', '.join(map(str, _OUT_DTYPES))}")
    if torch.is_grad_enabled() and values.requires_grad:
        raise ValueError(
            f"values {tuple(values.shape)} require a gradient, which this collective does not have; use row_parallel_linear, "
            "or call it under torch.no_grad()"
        )


def check_values(values: Tensor, tree: ReductionTree, ranks: Ranks, scatter: bool = False) -> None:
    mine = tree.subtrees(ranks.rank, ranks.size)
    if values.dim() < 1 or values.shape[0] != len(mine):
        raise ValueError(
            f"values of shape {tuple(values.shape)} must hold one value for each of this rank's {len(mine)} subtrees "
            f"{[str(node) for node in mine]} in dimension 0 (rank {ranks.rank} of {ranks.size}, {tree.fingerprint})"
        )
    if values.dtype != reference.torch_node_dtype(tree):
        raise ValueError(f"values are {values.dtype} but the nodes of {tree.fingerprint} are {reference.torch_node_dtype(tree)}")
    if scatter and (values.dim() < 2 or values.shape[1] % ranks.size):
        raise ValueError(f"values of shape {tuple(values.shape)} cannot be scattered: {ranks.size} ranks must divide dimension 1")
    if values.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"values are on {values.device}; this collective works on a CPU and on CUDA")


def _signature(values: Tensor, tree: ReductionTree, out_dtype: torch.dtype) -> tuple:
    return ("tree", tree), ("shape", values.shape[1:]), ("out_dtype", out_dtype), ("chip", chip(values.device))


def _tree_reduce(values: Tensor, leaves: int, node_dtype: str, group: str, out_dtype: torch.dtype, scatter: bool) -> Tensor:
    tree, ranks = ReductionTree(leaves, node_dtype), resolve(_resolve_process_group(group))
    agree(ranks, _NAMES[scatter], _signature(values, tree, out_dtype), lambda: check_values(values, tree, ranks, scatter))
    return sum_over_ranks(values, tree, ranks, out_dtype, scatter)


@on_device_of_first
def _over_shared_memory(values: Tensor, workspace, tree: ReductionTree, out_dtype: torch.dtype, scatter: bool) -> Tensor:
    return nvlink.tree_reduce(workspace, values, tree, out_dtype, scatter)


def _tree_reduce_fake(values: Tensor, leaves: int, node_dtype: str, group: str, out_dtype: torch.dtype, scatter: bool) -> Tensor:
    shape = values.shape[1:]
    if scatter:
        shape = (shape[0] // _resolve_process_group(group).size(), *shape[1:])
    return values.new_empty(shape, dtype=out_dtype)


_library.impl("tree_reduce", _tree_reduce, "CompositeExplicitAutograd")
torch.library.register_fake("tpinv::tree_reduce", _tree_reduce_fake, lib=_library)
