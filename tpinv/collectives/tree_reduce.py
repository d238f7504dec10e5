"""tree_all_reduce and tree_reduce_scatter: the rank part of the tree.

Where every rank can map every other rank's memory (the GPUs of one NVLink domain) it runs in one kernel (nvlink.py), elsewhere
over the ProcessGroup (process_group.py). The order of additions comes from the tree alone; no path, message size or slice
boundary changes a bit. Both are one torch operator, opaque to torch.compile and with a shape that it can trace.
"""

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from tpinv import reference
from tpinv.collectives import nvlink, process_group, symmetric
from tpinv.collectives.group import Ranks, resolve
from tpinv.runtime.device import on_device_of_first
from tpinv.tree import ReductionTree

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
    ranks = _check(values, tree, group)
    return _reduce(values, tree, ranks, out_dtype, False)


def tree_reduce_scatter(values: Tensor, *, tree: ReductionTree, group=None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Sums like :func:`tree_all_reduce`, bit for bit; rank r gets rows [r M/p, (r+1) M/p) of the sum.

    Args and errors as there. values: [S, M, ...] with p dividing M. Returns [M/p, ...] in out_dtype.
    """
    ranks = _check(values, tree, group)
    if values.dim() < 2 or values.shape[1] % ranks.size:
        raise ValueError(f"values of shape {tuple(values.shape)} cannot be scattered: {ranks.size} ranks must divide dimension 1")
    return _reduce(values, tree, ranks, out_dtype, True)


def all_reduce_add_norm(
    values: Tensor, residual: Tensor, weight: Tensor, eps: float, *, tree: ReductionTree, group=None
) -> tuple[Tensor, Tensor] | None:
    """hidden = residual + tree_all_reduce(values) and its RMSNorm in one kernel, for reduce_add_rms_norm; None, on all ranks alike,
    where there is no such kernel. values [S, ..., H], residual [..., H], weight [H]."""
    ranks = _check(values, tree, group)
    if not values.is_cuda or ranks.size == 1 or nvlink.refuses(tree, ranks.size, residual.dtype):
        return None
    workspace = symmetric.workspace(ranks, values.device)
    if workspace is None:
        return None
    width = residual.shape[-1]
    with torch.cuda.device(values.device):
        fused = nvlink.add_norm(workspace, values.reshape(len(values), -1, width), residual.reshape(-1, width), weight, eps, tree)
    return fused and (fused[0].view(residual.shape), fused[1].view(residual.shape))


def _check(values: Tensor, tree: ReductionTree, group) -> Ranks:
    if torch.is_grad_enabled() and values.requires_grad:
        raise ValueError(
            f"values {tuple(values.shape)} require a gradient, which this collective does not have; use row_parallel_linear, "
            "or call it under torch.no_grad()"
        )
    ranks = resolve(group)
    mine = tree.subtrees(ranks.rank, ranks.size)
    if values.dim() < 1 or values.shape[0] != len(mine):
        raise ValueError(
            f"values of shape {tuple(values.shape)} must hold one value for each of this rank's {len(mine)} subtrees "
            f"{[str(node) for node in mine]} in dimension 0 (rank {ranks.rank} of {ranks.size}, {tree.fingerprint})"
        )
    if values.dtype != reference.torch_node_dtype(tree):
        raise ValueError(f"values are {values.dtype} but the nodes of {tree.fingerprint} are {reference.torch_node_dtype(tree)}")
    return ranks


def _reduce(values: Tensor, tree: ReductionTree, ranks: Ranks, out_dtype: torch.dtype | None, scatter: bool) -> Tensor:
    out_dtype = out_dtype or values.dtype
    if ranks.size == 1:
        return reference.finish(values, tree, tree.subtrees(0, 1), out_dtype)
    return torch.ops.tpinv.tree_reduce(values, tree.leaves, tree.node_dtype, ranks.group.group_name, out_dtype, scatter)


def _tree_reduce(values: Tensor, leaves: int, node_dtype: str, group: str, out_dtype: torch.dtype, scatter: bool) -> Tensor:
    tree, ranks = ReductionTree(leaves, node_dtype), resolve(_resolve_process_group(group))
    if values.is_cuda and not nvlink.refuses(tree, ranks.size, out_dtype):
        if workspace := symmetric.workspace(ranks, values.device):
            return _over_shared_memory(values, workspace, tree, out_dtype, scatter)
    path = process_group.reduce_scatter if scatter else process_group.all_reduce
    return path(values, tree, ranks, out_dtype)


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
