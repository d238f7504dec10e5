"""Who takes part: a process group, this process's rank in it, its size, and what this process knows about the group.

Everything that is kept per group is one object, :class:`GroupState`. It lives as long as the group does.
"""

import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tpinv.collectives.board import Board
from tpinv.collectives.line import Line
from tpinv.runtime.state import Memo


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


class Agreed:
    """A (name, signature) that all ranks have had; ``remembered`` until it is dropped from ``GroupState.known``."""

    __slots__ = ("call", "digest", "remembered")

    def __init__(self, call: tuple[str, tuple], digest: bytes):
        self.call, self.digest, self.remembered = call, digest, True


class GroupState:
    """What one process knows about one of its process groups.

    Attributes:
        group: a weak reference to it.
        rank, size: this process's rank in it, and its number of ranks.
        board: what the ranks tell each other through the group's store; None where there is none to tell (the fake backend).
        calls, call: number of the current call, counted alike on every rank, and its (name, signature); see agreement.py.
        known: what all ranks were found to agree on, oldest first, by its (name, signature).
        keys: the same by what decides the signature on this rank alone.
        line, offered: where every call is announced, if the ranks have one (line.py); and this rank's end before it is connected.
        refused: numbers of the calls that ended in an error here.
        strays: what this rank refused without a number, in order, as long as nobody is known to have claimed it; see strays.py.
        suspect: whether the last call ended in an error here, so that the next one is compared even if it is known.
        introduced: whether what is compared once for a group has been compared.
        broken: why the group's connections were given up, or None.
        workspaces: device -> what kernels keep for the group on it.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int):
        self.group = weakref.ref(group)
        self.rank, self.size = rank, size
        self.calls = 0
        self.call: tuple[str, tuple] = ("", ())
        self.known: dict[tuple, Agreed] = {}
        self.keys: dict[tuple, Agreed] = Memo(1 << 14)
        self.line: Line | None = None
        self.offered: Line | None = None
        self.refused: set[int] = set()
        self.strays: list[dict] = []
        self.suspect = False
        self.introduced = False
        self.broken: str | None = None
        self.workspaces: dict = {}
        self.backend, store = c10d._world.pg_map.get(group, ("", None))
        self.board = None if size == 1 or store is None or "fake" in self.backend else Board(store, rank, size)


def resolve(group=None) -> Ranks:
    """``group`` is a ProcessGroup, a one-dimensional DeviceMesh, an already resolved ``Ranks``, or None.

    None means what it means in torch.distributed: the default process group; without one, a single rank.

    Raises:
        ValueError: a mesh of more than one dimension, a group that has been destroyed, one that this process is not in, or no group at all.
    """
    if isinstance(group, Ranks):
        if group.group is not None and not torch.compiler.is_compiling() and group.group not in c10d._world.pg_group_ranks:
            raise ValueError(_DESTROYED)
        return group
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Ranks(None, 0, 1)
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"a mesh of dimensions {group.mesh_dim_names or group.ndim} is not one group; pass mesh['tp']")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of the given group; pass the group it belongs to")
    group = group if group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is a {type(group).__name__}, {group!r}; pass a ProcessGroup, a one-dimensional DeviceMesh, or None")
    if torch.compiler.is_compiling():  # Dynamo would compile anew whenever the table of states has grown
        size = dist.get_world_size(group)
        return Ranks(group if size > 1 else None, dist.get_rank(group), size)
    return ranks_in(group)


def ranks_in(group: dist.ProcessGroup) -> Ranks:
    """:func:`resolve` for what is known to be a ProcessGroup. ValueError when it has been destroyed."""
    state = _state(group)
    return Ranks(group if state.size > 1 else None, state.rank, state.size)


def state_of(ranks: Ranks) -> GroupState:
    """The state of a resolved group of more than one rank. ValueError when the group has been destroyed."""
    return _state(ranks.group)


def states() -> list[GroupState]:
    """Of all groups that live and have not been destroyed."""
    return [state for group, state in list(_states.items()) if group in c10d._world.pg_group_ranks]


def _state(group: dist.ProcessGroup) -> GroupState:
    if group not in c10d._world.pg_group_ranks:  # another group may have its name by now
        raise ValueError(_DESTROYED)
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState(group, dist.get_rank(group), dist.get_world_size(group))
    return state


_states: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # group -> GroupState
_DESTROYED = (
    "this process group has been destroyed (destroy_process_group); layers and functions that were given it cannot communicate any more. "
    "Pass a group that exists, and make layers anew or set their group again after init_process_group"
)
