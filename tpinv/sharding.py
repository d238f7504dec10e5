"""How parameters are sharded: what modules know, asked for when it is needed.

A module that holds parts of parameters says so by a method, :meth:`Sharded.parameter_shardings`, from its constructor's arguments.
Nothing is written on tensors, where ``to_empty``, ``deepcopy``, ``load_state_dict(assign=True)``, a dtype's change, an assignment or FSDP
would lose it. Whoever needs the sharding of a parameter (the gradient norm) looks for the module that holds it at that moment, by
identity, among all modules that live.

A parameter that no module knows is taken as whole and the same on every rank (``nn.Linear``, ``nn.LayerNorm``). One that hangs on a
module that does not know it (an adapter's weight registered on a layer, a parametrization, a pruned layer's ``weight_orig``) is a
ValueError: what it is a part of, nobody can say, and a norm over a cut dimension would be another function at every number of ranks.
"""

import copyreg
import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from tpinv import reference
from tpinv.collectives import Ranks, resolve


def shard(whole: Tensor, dim: int, rank: int, ranks: int, stride: int = 1) -> Tensor:
    """Rank ``rank``'s part of a parameter that is sharded on ``dim`` in ``stride`` blocks, in memory of its own: a view would keep the whole
    alive. ValueError unless it divides evenly."""
    if whole.shape[dim] % (ranks * stride):
        raise ValueError(f"dimension {dim} of {tuple(whole.shape)} must be divisible by {ranks} ranks x stride {stride}")
    return reference.split_leaves(whole, dim, ranks, stride)[rank].clone(memory_format=torch.contiguous_format)


def unshard(parts: list[Tensor], dim: int, stride: int = 1) -> Tensor:
    """Inverse of :func:`shard`, given every rank's part."""
    return reference.join_leaves(parts, dim, stride)


@dataclass(frozen=True)
class Sharding:
    """Of one parameter, whose gradient leaves backward complete: a rank's part of the whole gradient, or all of it.

    Attributes:
        ranks: the group that shares the parameter.
        dim: the dimension it is cut on; None where every rank holds all of it.
        stride: the parameter is that many blocks side by side, each of them cut (SwiGLU's gate and up: 2).
    """

    ranks: Ranks
    dim: int | None = None
    stride: int = 1

    def __str__(self) -> str:
        how = "whole" if self.dim is None else f"cut on dimension {self.dim}" + (f", stride {self.stride}" if self.stride > 1 else "")
        return f"{how} over {self.ranks.size} ranks {list(global_ranks(self.ranks))}"


class Sharded:
    """What integrations mix in; tpinv.ShardedModule (state_dict.py) is this and checkpoints. ``ranks`` is the module's group.

    ``shards`` names every parameter that may be registered on the module and the dimension it is cut on, None for a whole one. A subclass
    with parameters of its own extends it. Every instance is found by :func:`find_shardings` as long as it lives.
    """

    ranks: Ranks
    shards: Mapping[str, int | None] = {}
    stride = 1
    guarded = False  # whether guards.py looks after it

    def __new__(cls, *args, **kwargs):  # not __init__, which copies and pickles do not call
        module = super().__new__(cls)
        _living.add(module)
        return module

    def parameter_shardings(self) -> dict[str, Sharding]:
        """Name -> sharding, of the parameters that the module holds now. ValueError for a dimension that one has not."""
        held = {name: (self._parameters[name], dim) for name, dim in self.shards.items() if self._parameters.get(name) is not None}
        for name, (parameter, dim) in held.items():
            if dim is not None and not (type(dim) is int and 0 <= dim < parameter.dim()):
                raise ValueError(
                    f"shards of {type(self).__name__} says {name}: {dim!r}; {tuple(parameter.shape)} is cut on a dimension from 0 to "
                    f"{parameter.dim() - 1}, or None where every rank holds all of it"
                )
        return {name: Sharding(self.ranks, dim, 1 if dim is None else self.stride) for name, (_, dim) in held.items()}

    def refuse_unknown_parameters(self) -> None:
        """ValueError if something was registered on the module that ``shards`` does not name: parameters, or modules that hold some."""
        if not self._modules and self._parameters.keys() <= self.shards.keys():
            return
        if names := [name for name, _ in unknown_parameters(self)]:
            raise ValueError(
                f"{type(self).__name__} does not know the parameters {names} that were registered on it (a parametrization, pruning, an "
                f"adapter): it holds parts of parameters, and what these are parts of nobody says. Put them into a module around the layer, "
                f"or name them in `shards` of a subclass; it knows {list(self.shards)}"
            )


def register(module: nn.Module) -> None:
    """For a module that became a :class:`Sharded` one by an assignment to ``__class__``, which calls no constructor."""
    _living.add(module)


def unknown_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those on ``module``, or below it and on no other module that says how it is sharded, that it does not know."""
    known = module.parameter_shardings()
    found = [(name, p) for name, p in module._parameters.items() if p is not None and name not in known]
    stack = [(f"{name}.", child) for name, child in module.named_children()]
    while stack:
        prefix, child = stack.pop()
        if not isinstance(child, Sharded):
            found += [(prefix + name, p) for name, p in child._parameters.items() if p is not None]
            stack += [(f"{prefix}{name}.", grandchild) for name, grandchild in child.named_children()]
    return found


class Holder(NamedTuple):
    """What :func:`find_shardings` finds: the parameter's name for messages, and its sharding; None where the module does not know it."""

    name: str
    sharding: Sharding | None


def find_shardings(parameters: Iterable[Tensor]) -> list[Holder | None]:
    """For each parameter what the module says that holds it, or said last: under FSDP2 a module holds its gathered parameters for a while,
    and the optimizer their shards. None where no module did.

    Raises:
        ValueError: two modules hold a parameter (tied weights) and say different things.
    """
    iterator = iter(parameters)
    wanted = list(itertools.islice(iterator, 1))  # while it is not at its end, build().parameters() keeps alive the module, and alone does
    said = defaultdict(list)
    for module in list(_living):
        if not hasattr(module, "_parameters"):  # under construction
            continue
        shardings = module.parameter_shardings()
        kind = type(module).__name__
        for name, sharding in shardings.items():
            said[id(module._parameters[name])].append(Holder(f"{kind}.{name}", sharding))
        if module._modules or len(shardings) < len(module._parameters):
            for name, p in unknown_parameters(module):
                said[id(p)].append(Holder(f"{kind}.{name}", None))
    wanted += iterator
    for p in wanted:
        if holders := said.get(id(p)):
            first = _last_said[p] = holders[0]
            if other := next((other for other in holders if other.sharding != first.sharding), None):
                raise ValueError(f"one parameter is {first.name} ({first.sharding}) and {other.name} ({other.sharding}); tie equal parts")
    return [_last_said.get(p) for p in wanted]


def grads_of_parts() -> set[int]:
    """The ids of the gradients, as they are now, of parameters that modules cut over several ranks; not those of integrations, which have
    guards of their own."""
    return {
        id(module._parameters[name].grad)
        for module in list(_living)
        if hasattr(module, "_parameters") and module.guarded
        for name, sharding in module.parameter_shardings().items()
        if sharding.dim is not None and sharding.ranks.size > 1 and module._parameters[name].grad is not None
    }


def global_ranks(ranks: Ranks) -> tuple[int, ...]:
    """The default group's ranks that ``ranks`` consists of: what one group is known by, whatever object stands for it."""
    if ranks.group is None:
        return (dist.get_rank() if dist.is_available() and dist.is_initialized() else 0,)
    return tuple(dist.get_process_group_ranks(ranks.group))


def _reduce_ranks(ranks: Ranks) -> tuple:
    return _ranks_again, (global_ranks(ranks) if ranks.size > 1 else (), ranks.rank, ranks.size)


def _ranks_again(members: tuple[int, ...], rank: int, size: int) -> Ranks:
    """Of a pickle: the group of the same ranks, of which this process is the same one. The default group before others."""
    if size == 1:
        return Ranks(None, 0, 1)
    if dist.is_available() and dist.is_initialized():
        groups = [dist.group.WORLD, *dist.distributed_c10d._world.pg_map]
        for group in groups:
            if tuple(dist.get_process_group_ranks(group)) == members and dist.get_rank(group) == rank:
                return resolve(group)
    here = (
        f"rank {dist.get_rank()} of {dist.get_world_size()}"
        if dist.is_available() and dist.is_initialized()
        else "a process without a group"
    )
    raise ValueError(
        f"a layer was pickled on rank {rank} of {size} ranks {list(members)}, whose parts it holds, and this is {here}, without such a group: make "
        "the groups first, load each rank's own file, or move between sizes by state dicts and torch.distributed.checkpoint"
    )


copyreg.pickle(Ranks, _reduce_ranks)  # a ProcessGroup is a connection: its members are what can be written down


def placed_over(tensor: Tensor) -> list[tuple[Ranks, object]]:
    """(group, placement) for each dimension of a DTensor's mesh with more than one rank; [] for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return []
    mesh = tensor.device_mesh
    return [(resolve(mesh.get_group(i)), placement) for i, placement in enumerate(tensor.placements) if mesh.size(i) > 1]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without a copy; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def digest(x: Tensor) -> Tensor:
    """int64 scalar of the bytes of ``x`` in their places, for comparisons. Computed where ``x`` is."""
    bits = x.detach().contiguous().view(-1).view(_INTEGERS[x.element_size()] if not x.is_complex() else torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for piece in bits.split(1 << 22):
        place = torch.arange(1, len(piece) + 1, device=x.device) * 0x1E3779B97F4A7C15  # integers wrap around
        place = ((place ^ (place >> 29)) * 0x3F58476D1CE4E5B9) | 1
        total = total * 0x14D049BB133111EB + (piece.long() * place).sum()
    return total


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_living: weakref.WeakSet = weakref.WeakSet()
_last_said = WeakIdKeyDictionary()  # parameter -> Holder
