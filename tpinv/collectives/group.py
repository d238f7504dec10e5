"""Who takes part: a process group, this process's rank in it, and its size."""

import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    """A resolved group: ``group`` is None when there is one rank and nothing to communicate.

    A copy is the same object, deep or not: a ProcessGroup is a connection, which cannot be copied, and layers that hold one can.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def __copy__(self) -> "Ranks":
        return self

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self


def resolve(group=None) -> Ranks:
    """``group`` is a ProcessGroup, a one-dimensional DeviceMesh, an already resolved ``Ranks``, or None.

    None means what it means in torch.distributed: the default process group; without one, a single rank.

    Raises:
        ValueError: a mesh of more than one dimension, or a group that this process is not in.
    """
    if isinstance(group, Ranks):
        return group
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Ranks(None, 0, 1)
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"a mesh of dimensions {group.mesh_dim_names or group.ndim} is not one group; pass mesh['tp']")
        group = group.get_group()
    group = group if group is not None else dist.group.WORLD
    # Dynamo would compile anew whenever the dictionary has grown, and a group may have been destroyed.
    keep = isinstance(group, dist.ProcessGroup) and not torch.compiler.is_compiling()
    known = _known.get(group) if keep and group in dist.distributed_c10d._world.pg_group_ranks else None
    if known is None:
        known = rank, _ = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:  # then it is no ProcessGroup either
            raise ValueError("this process is not a member of the given group; pass the group it belongs to")
        if keep:
            _known[group] = known
    return Ranks(group if known[1] > 1 else None, *known)


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # group -> rank, size: torch asks several tables for each


# torch 2.13 renamed them (same arguments) and warns at each use of the old names; older versions know only those.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
