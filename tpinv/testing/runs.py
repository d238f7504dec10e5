"""Compares two recorded runs (:mod:`tpinv.testing.record`), at different tensor-parallel sizes or in different frameworks.

The same tensor has other shapes at other sizes. How the parts are put together is told by a mark (a parameter's own, or the one that
the recording was given), else by the shapes, in this order:

    rank by rank     both runs have as many ranks, and the same shapes on each
    replicated       the same shape everywhere: every rank of one run is compared with rank 0 of the other
    shards           one dimension differs, and the parts' lengths add up to the other run's: joined in rank order. Two blocks side by
                     side (SwiGLU's gate and up) leave the same shapes as one: then the way that brings the runs closer is taken
    layout           the same elements as [s, b, h], [b, s, h] or [tokens, h], as frameworks differ

Each comparison says which it was. What fits none of these is counted as not compared, never as equal.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tpinv.reference import join_leaves
from tpinv.testing.bits import Difference, compare, ulp_distance
from tpinv.testing.record import FORMAT


class Key(NamedTuple):
    """Which tensor: the ``call``-th that was recorded under this name in this phase of this step."""

    step: int
    phase: str
    module: str
    tensor: str
    call: int

    def __str__(self) -> str:
        call = f", call {self.call + 1}" if self.call else ""
        return f"step {self.step}, {self.phase}: {self.module or '(model)'} {self.tensor}{call}"


@dataclass(frozen=True)
class Part:
    """One rank's tensor. ``value`` is None when only its digest was kept."""

    digest: str
    shape: tuple[int, ...]
    dtype: str
    mark: tuple[int, int] | None
    stride: int
    value: Tensor | None


@dataclass(frozen=True)
class Comparison:
    """``rule`` says how the parts were put together, or why they were not compared (``compared`` is False).

    ``difference`` is None when nothing differs, or when the digests differ and nothing else was kept. ``histogram[i]`` counts the
    elements that are 2**i to 2**(i+1) - 1 ulp apart.
    """

    key: Key
    rule: str
    compared: bool = True
    differs: bool = False
    difference: Difference | None = None
    histogram: tuple[int, ...] = ()


class Run:
    """A directory of recordings, one file per rank. ValueError when it is not that, or not complete."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        names = sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        if "rank0.pt" not in names:
            raise ValueError(
                f"{self.path} is no recording: there is no {os.path.join(self.path, 'rank0.pt')}; tpinv.testing.record writes one"
            )
        first = _load(os.path.join(self.path, "rank0.pt"))
        self.ranks = first["ranks"]
        if set(names) != {f"rank{rank}.pt" for rank in range(self.ranks)}:
            raise ValueError(f"{self.path} holds {names}, but rank 0 was one of {self.ranks} ranks; record every rank into one directory")
        files = [first, *(_load(os.path.join(self.path, f"rank{rank}.pt")) for rank in range(1, self.ranks))]
        self.parts: list[dict[Key, Part]] = [dict(_parts(file)) for file in files]

    def __getitem__(self, key: Key) -> list[Part]:
        return [parts[key] for parts in self.parts]

    @property
    def keys(self) -> list[Key]:
        """What every rank recorded, in the order of rank 0."""
        return [key for key in self.parts[0] if all(key in parts for parts in self.parts)]


def _load(path: str) -> dict:
    try:
        file = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch.load raises half a dozen types for a file that is not its own
        raise ValueError(f"{path} cannot be read as a recording: {error}") from error
    if not isinstance(file, dict) or file.get("format") != FORMAT:
        raise ValueError(f"{path} is not a {FORMAT!r}")
    return file


def _parts(file: dict) -> Iterator[tuple[Key, Part]]:
    for event in file["events"]:
        mark = event["mark"] and tuple(event["mark"])
        value = file["tensors"].get(event["digest"])
        key = Key(*(event[field] for field in Key._fields))
        yield key, Part(event["digest"], tuple(event["shape"]), event["dtype"], mark, event["stride"], value)


def renamed(run: Run, rules: Sequence[tuple[str, str]]) -> None:
    """Renames the modules of ``run``: (regular expression, replacement), one after the other. ValueError when two become one, or one is no expression."""
    if not rules:
        return
    for rank, parts in enumerate(run.parts):
        new = {}
        for key, part in parts.items():
            module = key.module
            for pattern, replacement in rules:
                try:
                    module = re.sub(pattern, replacement, module)
                except re.error as error:
                    raise ValueError(f"map {pattern!r} to {replacement!r} is no regular expression with its replacement: {error}") from None
            renamed_key = key._replace(module=module)
            if renamed_key in new:
                raise ValueError(f"two modules of {run.path} become {module!r} by the map; make its patterns tell them apart")
            new[renamed_key] = part
        run.parts[rank] = new


def compare_runs(a: Run, b: Run) -> list[Comparison]:
    """Every tensor of ``a`` in the order of its recording, then what only ``b`` has. ValueError when they have no tensor in common.

    What one run alone has of phase ``recompute`` is left out: there only one of them checkpoints its activations.
    """
    in_a, in_b = set(a.keys), set(b.keys)
    if not in_a & in_b:
        only = [str(next(iter(run.parts[0]), "nothing")) for run in (a, b)]
        raise ValueError(f"{a.path} and {b.path} have no tensor in common ({only[0]!r}, {only[1]!r}); name the modules' map with --map")
    found = []
    for key in [*a.parts[0], *(key for key in b.parts[0] if key not in a.parts[0])]:
        if key in in_a and key in in_b:
            found.append(_compare(key, a[key], b[key]))
        elif key.phase != "recompute" or (key in a.parts[0] and key in b.parts[0]):
            where = [run.path for run, keys in ((a, in_a), (b, in_b)) if key in keys]
            found.append(Comparison(key, f"only in {where[0]}" if where else "not on every rank", compared=False))
    return found


# -- one tensor -----------------------------------------------------------------------------------------------------------


def _compare(key: Key, a: list[Part], b: list[Part]) -> Comparison:
    if len({part.dtype for part in (*a, *b)}) > 1:
        return Comparison(key, f"{a[0].dtype} against {b[0].dtype}", compared=False)
    shapes = {part.shape for part in (*a, *b)}
    marked = any(part.mark for part in (*a, *b))
    if len(a) == len(b) and [part.shape for part in a] == [part.shape for part in b]:
        return _pairs(key, "rank by rank" if len(a) > 1 else "", list(zip(a, b, strict=True)))
    if len(shapes) == 1 and not marked:
        return _pairs(key, "replicated", [(a[0], part) for part in b] + [(part, b[0]) for part in a[1:]])
    if any(part.value is None for part in (*a, *b)):
        return Comparison(key, f"only digests of {_shapes(a)} against {_shapes(b)}", compared=False)
    ways = list(_ways(a, b))
    if not ways:
        return Comparison(key, f"no way from {_shapes(a)} to {_shapes(b)}; name it in record(shards=)", compared=False)
    return min((_result(key, rule, [pair]) for rule, pair in ways), key=_distance)


def _shapes(parts: list[Part]) -> str:
    return f"{len(parts)} x {list(parts[0].shape)}"


def _pairs(key: Key, rule: str, pairs: list[tuple[Part, Part]]) -> Comparison:
    """Parts that correspond one to one; replicas with the same bytes are compared once."""
    distinct = {(left.digest, right.digest): (left, right) for left, right in pairs}
    wrong = [(left, right) for left, right in distinct.values() if left.digest != right.digest]
    if not wrong:
        return Comparison(key, rule)
    if any(part.value is None for pair in wrong for part in pair):
        return Comparison(key, f"{rule}, digests only".removeprefix(", "), differs=True)
    return _result(key, rule, [(left.value, right.value) for left, right in wrong])


def _result(key: Key, rule: str, pairs: list[tuple[Tensor, Tensor]]) -> Comparison:
    differences = [(compare(right, left), left, right) for left, right in pairs]
    wrong = [row for row in differences if row[0]]
    if not wrong:
        return Comparison(key, rule)
    found = [difference for difference, _, _ in wrong]
    total = dataclasses.replace(
        found[0], count=sum(d.count for d in found), total=sum(d.total for d in found), max_ulp=max(d.max_ulp for d in found)
    )
    return Comparison(key, rule, differs=True, difference=total, histogram=_histogram([pair for _, *pair in wrong]))


def _histogram(pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
    """Counts of elements by floor(log2(ulp distance)); none for integers."""
    if not pairs[0][0].is_floating_point():
        return ()
    distances = torch.cat([ulp_distance(left, right).flatten() for left, right in pairs])
    distances = distances[distances > 0]
    return tuple(torch.bincount(torch.frexp(distances.double()).exponent.long() - 1).tolist())


def _distance(comparison: Comparison) -> float:
    """How far apart two ways of putting shards together leave the runs: the sum of the logarithms, roughly."""
    if not comparison.differs:
        return 0.0
    return sum((power + 1) * count for power, count in enumerate(comparison.histogram)) or float(comparison.difference.count)


def _ways(a: list[Part], b: list[Part]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Every way to put the parts together so that both runs have one shape, with the rule's name."""
    if a[0].mark or b[0].mark:
        left, right = _marked(a), _marked(b)
        if left.shape == right.shape:
            dim, stride = a[0].mark or b[0].mark
            yield f"shards on dimension {dim}, stride {stride}, as marked", (left, right)
        return
    one, other = a[0].value, b[0].value
    unlike = [d for d in range(one.dim()) if one.shape[d] != other.shape[d]] if one.dim() == other.dim() else []
    if len(unlike) == 1:
        dim = unlike[0]
        told = max(part.stride for part in (*a, *b)) if dim == one.dim() - 1 else 1
        whole = lambda parts: [parts[0].value]  # noqa: E731
        every = lambda parts: [part.value for part in parts]  # noqa: E731
        for left, right in ((whole, every), (every, whole), (every, every)):
            if _length(left(a), dim) != _length(right(b), dim):
                continue
            for stride in (told,) if told > 1 else (1, 2):
                if all(part.shape[dim] % stride == 0 for part in (*left(a), *right(b))):
                    rule = f"shards on dimension {dim}, stride {stride}, by {'its module' if told > 1 else 'the shapes'}"
                    yield rule, (join_leaves(left(a), dim, stride), join_leaves(right(b), dim, stride))
            return
    for rule, layout in _LAYOUTS.items():
        moved = layout(one)
        if moved.shape == other.shape or (
            moved.dim() and other.dim() and moved.numel() == other.numel() and moved.shape[-1] == other.shape[-1]
        ):
            yield rule, (moved.reshape(other.shape), other)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "layout: reshaped": lambda t: t,
    "layout: dimensions 0 and 1 swapped": lambda t: t.transpose(0, 1) if t.dim() > 1 else t,
}


def _length(values: list[Tensor], dim: int) -> int:
    return sum(value.shape[dim] for value in values)


def _marked(parts: list[Part]) -> Tensor:
    dim, stride = parts[0].mark or (0, 1)
    return join_leaves([part.value for part in parts], dim, stride) if parts[0].mark else parts[0].value
