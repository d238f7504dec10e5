"""Gradient norm and clipping that do not depend on how parameters are sharded.

The sum of squares is exact (reference/squares.py), so no tree is needed: any sharding, any order and an integer all-reduce of 41
numbers give the same limbs, hence the same norm. Distributed optimizers that cut tensors in the middle of a row are served too.
The limbs become one float64, its square root one float32.

What is counted where follows from what modules say about their parameters (sharding.py) and from the placements of DTensors, asked for
at every call. Gradients fall into classes by the groups that they are cut over: those of a class are added up over these groups, one
after the other, and every rank adds the classes. So each element counts once, whatever groups a model has: tensor parallelism, FSDP2
over another dimension of the mesh, two tensor-parallel groups of different sizes. What is whole on every rank is added to nothing; that it
is the same there is compared.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpinv import reference
from tpinv.collectives import Ranks, agree, all_max, all_reduce_integers, ranks_for, resolve
from tpinv.replicas import Replicas, newly_seen
from tpinv.sharding import Holder, find_shardings, global_ranks, local, placed_over

Gradients = nn.Module | Tensor | Iterable[nn.Module | Tensor]


@torch.no_grad()
def grad_norm(x: Gradients, *, group=None, norm_type: float = 2.0, compare_replicas: bool | None = None) -> Tensor:
    """Norm of all gradients of a model, each element counted once.

    Args:
        x: a module, a parameter, or modules and parameters; those with ``grad`` None are skipped, what occurs twice counts once.
            Parameters that tpinv's layers hold are parts or whole as the layer says, over the layer's group; DTensors (FSDP2, tensor
            parallelism by DTensor) are what their placements say, on top of it; any other is whole and the same on every rank.
        group: ProcessGroup, one-dimensional DeviceMesh, or None for the groups that the parameters are sharded over. Where it is given it
            must be the layers' own; a group of one rank, where they have none, asks no other rank.
        norm_type: 2.0 or inf.
        compare_replicas: whether to compare, byte by byte, values and gradients of what is whole on several ranks. The host waits for
            it. None: at every call on a CPU; on a GPU at the first one with these parameters.

    Returns:
        float32 scalar, the same bytes on every rank and for every group size. NaN if any gradient is NaN, else inf if any is inf.

    Raises:
        ValueError, on every rank of the groups: another norm_type; gradients that are not float32, bfloat16 or float16, or are sparse;
            a gradient on some ranks only; a DTensor that is not reduced (Partial); a group that is not the layers'; parameters that a
            layer does not know; replicas that differ.
    """
    return _Gradients(x, group, norm_type).norm(compare_replicas)


@torch.no_grad()
def clip_grad_norm_(
    x: Gradients, max_norm: float, *, group=None, norm_type: float = 2.0, error_if_nonfinite: bool = False, compare_replicas=None
) -> Tensor:
    """Scales all gradients in place by min(1, max_norm / (norm + 1e-6)) and returns the norm before.

    Arguments as in :func:`grad_norm`; the coefficient is computed in float32 and is the same on every rank and for every group size.

    Raises:
        ValueError: max_norm not above 0, or as in :func:`grad_norm`.
        RuntimeError: ``error_if_nonfinite`` and the norm is inf or NaN (as torch.nn.utils.clip_grad_norm_ does).
    """
    gradients = _Gradients(x, group, norm_type, clip=(max_norm,))
    norm = gradients.norm(compare_replicas)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the total norm of the gradients is {norm.item()}, so it cannot be clipped")
    scale_to_norm_(gradients.locals(), max_norm, norm)
    return norm


def norm_of(tensors: Iterable[Tensor], *, group=None, norm_type: float = 2.0, device: torch.device | None = None) -> Tensor:
    """Norm of all elements held by all ranks of ``group`` together. ``tensors`` are those that this rank counts: pass a replicated
    tensor on one rank only. Result and errors as in :func:`grad_norm`. ``device`` is that of the result if there are no tensors."""
    ranks = ranks_for("norm_of", group)
    tensors = list(tensors) if isinstance(tensors, Iterable) else [tensors]

    def check():
        _check_norm_type(norm_type)
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise ValueError(f"tensors[{i}] is a {type(t).__name__}; pass tensors")
            if isinstance(t, DTensor):
                raise ValueError(f"tensors[{i}] is a DTensor, which knows its own sharding; pass its parameter to grad_norm")
            _check_gradient(f"tensors[{i}]", t)

    agree(ranks, "norm_of", {"norm_type": norm_type}, check)
    device = tensors[0].device if tensors else device or _device_of(ranks)
    measure = _Largest if norm_type == math.inf else _Squares
    return measure.norm(measure.add_up([measure.of(tensors, device)], ranks))


def scale_to_norm_(grads: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Multiplies ``grads`` in place by min(1, max_norm / (norm + 1e-6)), computed in float32 from their float32 ``norm``. Torch rounds it
    to the dtype of a bfloat16 or float16 gradient first, here as in its own clipping."""
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    alike = defaultdict(list)
    for grad in grads:
        alike[grad.device, grad.dtype].append(grad)
    for (device, dtype), tensors in alike.items():
        torch._foreach_mul_(tensors, coefficient.to(device, dtype))


# -- which gradient is cut over which groups ------------------------------------------------------------------------------------------


@dataclass
class _Parameter:
    name: str
    parameter: Tensor
    cut: tuple[Ranks, ...] = ()  # the groups that its elements are divided between

    @property
    def grad(self) -> Tensor | None:
        return self.parameter.grad


class _Gradients:
    """All that a norm needs to know of its parameters, and the first reason to refuse them, which all ranks hear before any is added.

    Attributes:
        parameters: without repetitions, in the order in which they were given.
        groups: all that anything is cut over or whole over, each once, in the order of the parameters.
        refusal: a ValueError, or None.
    """

    def __init__(self, x: Gradients, group, norm_type: float, clip: tuple = ()):
        self.norm_type, self.max_norm, self.refusal = norm_type, *(clip or (None,)), None
        self._known: dict[tuple[int, ...], Ranks] = {}  # one group for all objects that stand for it
        self.parameters: list[_Parameter] = []
        given = None
        try:
            given = None if group is None else self._one(resolve(group))
            _check_norm_type(norm_type)
            for max_norm in clip:
                number = isinstance(max_norm, int | float) or (isinstance(max_norm, Tensor) and max_norm.numel() == 1)
                if not number or isinstance(max_norm, bool) or not max_norm > 0:
                    raise ValueError(f"max_norm={max_norm!r} must be above 0; leave the call out to not clip")
            holders = find_shardings(self._list(x))
        except ValueError as error:
            self.refusal, holders = error, [None] * len(self.parameters)
        for each, holder in zip(self.parameters, holders, strict=True):
            try:
                each.cut = self._cut_over(each, holder, given)
            except ValueError as error:
                self.refusal = self.refusal or error
        self.groups = list(self._known.values())
        if not self.groups and group is None and (world := resolve(None)).size > 1:
            self.groups = [world]  # nothing says who has copies of these: all ranks
        if self.refusal is not None and not self.groups:
            ranks_for("grad_norm", group)  # raises, and tells the peers, if that is what is wrong

    def _list(self, x: Gradients) -> Iterator[Tensor]:
        """Each parameter once, one by one: see find_shardings."""
        seen = set()
        for name, parameter in _listed(x):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                self.parameters.append(_Parameter(name, parameter))
                yield parameter

    def _one(self, ranks: Ranks) -> Ranks | None:
        return None if ranks.size == 1 else self._known.setdefault(global_ranks(ranks), ranks)

    def _cut_over(self, each: _Parameter, holder: Holder | None, given: Ranks | None) -> tuple[Ranks, ...]:
        """Also checks the parameter, its gradient and that the groups fit each other."""
        if holder is not None:
            each.name = f"{each.name} ({holder.name})" if each.name else holder.name
        grad = each.grad
        tensor = each.parameter if grad is None else grad
        cut = []
        for ranks, placement in placed_over(tensor):
            one = self._one(ranks)
            if placement.is_partial():
                raise ValueError(
                    f"the gradient of {each.name} is a DTensor of placements {tensor.placements}, not reduced yet; take the norm after its "
                    "reduction (redistribute, or set_requires_gradient_sync under FSDP2)"
                )
            if not placement.is_replicate():
                cut.append(one)
        placed = [self._one(ranks) for ranks, _ in placed_over(tensor)]
        if holder is not None:
            if holder.sharding is None:
                raise ValueError(f"{each.name} was registered on a layer that does not know it, so nobody can say what it is a part of; put "
                                 "it into a module around the layer, or name it in `shards` of a subclass")  # fmt: skip
            own = self._one(holder.sharding.ranks)
            if own is not None and own not in placed and holder.sharding.dim is not None:
                cut.append(own)
            if given is not None and holder.sharding.dim is not None and own is not None and own is not given:
                raise ValueError(
                    f"{each.name} is {holder.sharding}, but group= has the ranks {list(global_ranks(given))}; leave group out, or pass the "
                    "layers' own"
                )
        elif getattr(each.parameter, "tensor_model_parallel", False) and not cut:
            raise ValueError(
                f"{each.name or 'a parameter'} carries Megatron's mark tensor_model_parallel, which says that it is a part but not of which "
                "group, and no module that lives says more; use Megatron's own clipping, or derive its module from tpinv.ShardedModule"
            )
        for i, one in enumerate(cut):
            for other in cut[:i]:
                if len(common := sorted({*global_ranks(one)} & {*global_ranks(other)})) > 1:
                    raise ValueError(
                        f"{each.name} is cut over the ranks {list(global_ranks(other))} and again over {list(global_ranks(one))}, which have "
                        f"{common} in common; use two dimensions of one mesh"
                    )
        if grad is not None:
            _check_gradient(f"the gradient of {each.name or tuple(tensor.shape)}", grad)
        return tuple(cut)

    def locals(self) -> list[Tensor]:
        """This rank's gradients, or its parts of them, to be changed in place."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def norm(self, compare_replicas: bool | None) -> Tensor:
        grads = self.locals() if self.refusal is None else []
        tensors = grads or [local(p.parameter) for p in self.parameters]
        device = tensors[0].device if tensors else _device_of(*self.groups[:1])
        measure = _Largest if self.norm_type == math.inf else _Squares
        classes: dict[tuple[Ranks, ...], list[Tensor]] = {p.cut: [] for p in self.parameters}  # the same keys on every rank
        for p, grad in zip([p for p in self.parameters if p.grad is not None], grads, strict=self.refusal is None):
            classes[p.cut].append(grad)
        sums = {cut: measure.of(tensors, device) for cut, tensors in classes.items()}
        look = bool(self.groups) and self._looks(compare_replicas, device)
        replicas = Replicas(self.parameters if self.refusal is None else [], device) if look else None
        signature = self._signature(look)
        for ranks in self.groups:
            try:
                agree(ranks, "grad_norm", signature, self._check)
                if replicas is not None:
                    replicas.compare(ranks)
                if cuts := [cut for cut in sums if ranks in cut]:
                    sums.update(zip(cuts, measure.add_up([sums[cut] for cut in cuts], ranks), strict=True))
            except ValueError as error:  # to be said in the next group too: there are ranks that are in that one only
                self.refusal = self.refusal or error
        self._check()
        if replicas is not None:
            replicas.raise_for_differences(self.groups)
        return measure.norm(list(sums.values()) or [measure.of([], device)])

    def _check(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def _looks(self, compare_replicas: bool | None, device: torch.device) -> bool:
        """The same on every rank, as long as all ranks make their parameters anew together."""
        if compare_replicas is not None or device.type != "cuda":
            return compare_replicas is not False
        if torch.cuda.is_current_stream_capturing():
            return False
        return newly_seen([p.parameter for p in self.parameters])

    def _signature(self, look: bool) -> dict:
        """What must be the same on every rank of a group, and so on all."""
        index = {id(ranks): str(i) for i, ranks in enumerate(self.groups)}
        return {
            "parameters": len(self.parameters),
            "norm_type": self.norm_type,
            "max_norm": self.max_norm,
            "compare_replicas": look,
            "sizes of the groups": tuple(ranks.size for ranks in self.groups),
            "parameters with gradients": _runs([p.grad is not None for p in self.parameters]),
            "dtypes": ", ".join({str(p.grad.dtype): None for p in self.parameters if p.grad is not None}),
            "groups that cut a parameter": " ".join("+".join(index.get(id(ranks), "?") for ranks in p.cut) or "-" for p in self.parameters),
        }


def _listed(x: Gradients) -> Iterator[tuple[str, Tensor]]:
    """(name or "", parameter)."""
    if not isinstance(x, Tensor | nn.Module | Iterable):
        raise ValueError(f"gradients are those of modules and parameters, not of a {type(x).__name__}; pass model or model.parameters()")
    for each in [x] if isinstance(x, Tensor | nn.Module) else x:
        if isinstance(each, nn.Module):
            yield from each.named_parameters()
        elif isinstance(each, Tensor):
            yield "", each
        else:
            raise ValueError(
                f"gradients are those of modules and parameters, not of a {type(each).__name__}; pass model or model.parameters()"
            )


def _check_norm_type(norm_type: float) -> None:
    if not isinstance(norm_type, int | float) or norm_type not in (2.0, math.inf):
        raise ValueError(f"norm_type={norm_type!r} must be 2.0 or inf")


def _check_gradient(name: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"{name} is {grad.layout}; make it dense (an embedding without sparse=True)")
    reference.check_dtypes(**{name: grad})


def _runs(flags: list[bool]) -> str:
    """Which indices are set: "0-4, 7"."""
    out, start = [], None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            out.append(str(start) if start == i - 1 else f"{start}-{i - 1}")
            start = None
    return ", ".join(out) or "none"


def _device_of(ranks: Ranks | None = None) -> torch.device:
    """Where a rank that counts no tensor must take part in the all-reduce: where its peers do."""
    cuda = ranks is not None and ranks.group is not None and "nccl" in dist.get_backend(ranks.group)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


# -- what is added up: a class of gradients, its sum over a group, and the norm of all classes ------------------------------------------


class _Squares:
    """Exact sums of squares: counters, integers of whichever device counts."""

    @staticmethod
    def of(tensors: list[Tensor], device: torch.device) -> Tensor:
        squares = _counting(device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            counters = squares.counters(device)
            for t in tensors:
                squares.add_squares(counters, t.detach())
        return counters

    @staticmethod
    def add_up(sums: list[Tensor], ranks: Ranks) -> list[Tensor]:
        if ranks.size == 1:
            return sums
        rows = torch.stack(sums)
        all_reduce_integers(rows, ranks)
        return list(rows)

    @staticmethod
    def norm(sums: list[Tensor]) -> Tensor:
        counters = torch.stack(sums).sum(0)
        return _counting(counters.device).total(counters).sqrt().float()


def _counting(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from tpinv.kernels.rows import squares  # needs Triton
    else:
        from tpinv.reference import squares
    return squares


class _Largest:
    """float32: the largest magnitude, or NaN."""

    @staticmethod
    def of(tensors: list[Tensor], device: torch.device) -> Tensor:
        tops = [t.detach().abs().amax().float() for t in tensors if t.numel()]
        return torch.stack(tops).amax() if tops else torch.zeros((), device=device)

    @staticmethod
    def add_up(sums: list[Tensor], ranks: Ranks) -> list[Tensor]:
        return list(all_max(torch.stack(sums), ranks))

    @staticmethod
    def norm(sums: list[Tensor]) -> Tensor:
        return torch.stack(sums).amax()
