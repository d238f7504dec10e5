"""Compares two recorded runs (:mod:`tpinv.testing.record`), at different tensor-parallel sizes or in different frameworks.

The same tensor has other shapes at other sizes. How the parts are put together is told by a mark (a parameter's own, or the one that
the recording was given), else by the shapes, in this order:

    rank by rank     both runs have as many ranks, and the same shapes on each
    replicated       the same shape everywhere: every rank of one run is compared with rank 0 of the other
    shards           one dimension differs, and the parts' lengths add up to the other run's: joined in rank order. Two blocks side by
                     side (SwiGLU's gate and up) leave the same shapes as one: then the way that brings the runs closer is taken
    layout           the same elements as [s, b, h], [b, s, h] or [tokens, h], as frameworks differ
    calls            a module that is called once per head, or the like, is called p times as often on one rank as on each of p: the
                     calls are its shards

Each comparison says which it was, and covers every rank: where one rank's part is the whole, the other ranks' must be the same bytes.
What fits none of these, or is not on every rank of both runs, is counted as not compared, never as equal.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
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

    ``unlike``: the dtypes are, which nothing forgives. ``difference`` is None when nothing differs, or when the digests differ and nothing else was kept. ``histogram[i]`` counts the
    elements that are 2**i to 2**(i+1) - 1 ulp apart.
    """

    key: Key
    rule: str
    compared: bool = True
    differs: bool = False
    unlike: bool = False
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

    @property
    def any_keys(self) -> dict[Key, None]:
        """What any rank recorded, in the order of rank 0 and then of the others."""
        return dict.fromkeys(key for parts in self.parts for key in parts)


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
    """Renames the modules of ``run``: (regular expression, replacement), one after the other.

    ValueError when two become one, or when one is no regular expression.
    """
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
    calls_a, calls_b = _calls(a), _calls(b)
    any_a, any_b = a.any_keys, b.any_keys
    for key in any_a | any_b:
        mine, other = (calls.get(key._replace(call=0), []) for calls in (calls_a, calls_b))
        shards = mine and other and len(mine) != len(other) and len(mine) * a.ranks == len(other) * b.ranks
        if shards and (key in in_a or key in in_b):
            if key.call == 0:
                found.append(_compare_calls(key, [a[call] for call in mine], [b[call] for call in other]))
        elif key in in_a and key in in_b:
            found.append(_compare(key, a[key], b[key]))
        elif key in any_a and key in any_b:
            found.append(Comparison(key, "not on every rank", compared=False))
        elif key.phase != "recompute":
            found.append(Comparison(key, f"only in {(a if key in any_a else b).path}", compared=False))
    return found


def _calls(run: Run) -> dict[Key, list[Key]]:
    """All calls of a tensor, under the key of the first."""
    calls: dict[Key, list[Key]] = {}
    for key in run.keys:
        calls.setdefault(key._replace(call=0), []).append(key)
    return calls


# -- one tensor -----------------------------------------------------------------------------------------------------------


def _compare(key: Key, a: list[Part], b: list[Part]) -> Comparison:
    if len({part.dtype for part in (*a, *b)}) > 1:
        return Comparison(key, f"{a[0].dtype} against {b[0].dtype}", compared=False, unlike=True)
    shapes = {part.shape for part in (*a, *b)}
    marked = any(part.mark for part in (*a, *b))
    if len(a) == len(b) and [part.shape for part in a] == [part.shape for part in b]:
        return _pairs(key, "rank by rank" if len(a) > 1 else "", list(zip(a, b, strict=True)))
    if len(shapes) == 1 and not marked:
        return _pairs(key, "replicated", [(a[0], part) for part in b] + [(part, b[0]) for part in a[1:]])
    if any(part.value is None for part in (*a, *b)):
        return Comparison(key, f"only digests of {_shapes(a)} against {_shapes(b)}", compared=False)
    ways = [way for way in _ways(a, b) if way.fits(a, b)]
    if not ways:
        return Comparison(key, f"no way from {_shapes(a)} to {_shapes(b)}; name it in record(shards=)", compared=False)
    found, way = min(((_result(key, way.rule, way.pairs), way) for way in ways), key=lambda row: _distance(row[0]))
    for name, parts in way.replicas(a, b) if not found.differs else ():
        copies = _pairs(key, f"{found.rule}; replicas of {name}", [(parts[0], part) for part in parts[1:]])
        if copies.differs:
            return copies
    return found


def _compare_calls(key: Key, a: list[list[Part]], b: list[list[Part]]) -> Comparison:
    """``a[call][rank]`` and ``b[call][rank]``, as many parts in both. Which calls come before the ranks is taken from the bytes."""
    if key.phase == "backward":  # which visits the calls from the last to the first, but never the ranks
        a, b = a[::-1], b[::-1]
    divisors = [outer for outer in range(1, min(len(a), len(b)) + 1) if len(a) % outer == len(b) % outer == 0]
    pairs = [list(zip(_ordered(a, outer), _ordered(b, outer), strict=True)) for outer in divisors]
    pairs = [order for order in pairs if all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in order)]
    rule = f"{len(a)} calls on each of {len(a[0])} and {len(b)} on each of {len(b[0])}, as shards"
    if not pairs:
        return Comparison(key, f"{rule}, of other shapes", compared=False)
    return min((_pairs(key, rule, order) for order in pairs), key=_distance)


def _ordered(parts: list[list[Part]], outer: int) -> list[Part]:
    """The order on one rank, when a call is (one of ``outer``, head) and ranks hold consecutive heads."""
    inner, ranks = len(parts) // outer, range(len(parts[0]))
    return [parts[o * inner + i][rank] for o in range(outer) for rank in ranks for i in range(inner)]


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
    if comparison.difference is None:
        return float("inf")
    return sum((power + 1) * count for power, count in enumerate(comparison.histogram)) or float(comparison.difference.count)


class Way(NamedTuple):
    """One way to put the parts together so that both runs have the same shapes. ``first``: of A, of B, the pairs hold the first rank's
    part alone, whose replicas the other ranks' parts then have to be."""

    rule: str
    pairs: list[tuple[Tensor, Tensor]]
    first: tuple[bool, bool] = (False, False)

    def replicas(self, a: list[Part], b: list[Part]) -> list[tuple[str, list[Part]]]:
        return [(name, parts) for name, parts, first in zip("AB", (a, b), self.first, strict=True) if first]

    def fits(self, a: list[Part], b: list[Part]) -> bool:
        whole = all(len({part.shape for part in parts}) == 1 for _, parts in self.replicas(a, b))
        return whole and all(left.shape == right.shape for left, right in self.pairs)


def _ways(a: list[Part], b: list[Part]) -> Iterator[Way]:
    if a[0].mark or b[0].mark:
        rule = _shard_rule(*(a[0].mark or b[0].mark), "as marked")
        yield Way(rule, [(_marked(a), _marked(b))], (not a[0].mark, not b[0].mark))
        return
    left, right = [part.value for part in a], [part.value for part in b]
    told = max(part.stride for part in (*a, *b))
    found = False
    swapped = [t.transpose(0, 1) if t.dim() > 1 else t for t in left]
    for moved, name in ((left, ""), (swapped, "dimensions 0 and 1 swapped")):
        if name and moved[0].shape == right[0].shape:
            yield _layout(name, moved, right)
        for way in () if found else _shards(moved, right, told):
            found = True
            yield way._replace(rule=", ".join(filter(None, (name, way.rule))))
    if not found and left[0].numel() == right[0].numel() and left[0].shape[-1:] == right[0].shape[-1:]:
        for moved, name in ((left, "reshaped"), (swapped, "reshaped, dimensions 0 and 1 swapped"))[: left[0].dim()]:
            if all(t.numel() == right[0].numel() for t in moved):
                yield _layout(name, [t.reshape(right[0].shape) for t in moved], right)


def _layout(rule: str, a: list[Tensor], b: list[Tensor]) -> Way:
    """Rank by rank; runs of unlike numbers of ranks hold replicas."""
    return Way(rule, list(zip(a, b, strict=True))) if len(a) == len(b) else Way(rule, [(a[0], b[0])], (True, True))


def _shards(a: list[Tensor], b: list[Tensor], told: int) -> Iterator[Way]:
    """The ways along the one dimension in which the shapes differ. ``told``: the stride that a module has for its last dimension."""
    unlike = [d for d in range(a[0].dim()) if a[0].shape[d] != b[0].shape[d]] if a[0].dim() == b[0].dim() else []
    if len(unlike) != 1:
        return
    dim = unlike[0]
    told = told if dim == a[0].dim() - 1 else 1
    for left, right in ((a[:1], b), (a, b[:1]), (a, b)):  # a single part is the whole, be it of one rank or of replicas
        if sum(t.shape[dim] for t in left) == sum(t.shape[dim] for t in right):
            for stride in (told,) if told > 1 else (1, 2):
                if all(t.shape[dim] % stride == 0 for t in (*left, *right)):
                    rule = _shard_rule(dim, stride, "as its module says" if told > 1 else "by the shapes")
                    pair = join_leaves(left, dim, stride), join_leaves(right, dim, stride)
                    yield Way(rule, [pair], (len(left) < len(a), len(right) < len(b)))
            return


def _shard_rule(dim: int, stride: int, why: str) -> str:
    return f"shards of dimension {dim}{f' in {stride} blocks' if stride > 1 else ''}, {why}"


def _marked(parts: list[Part]) -> Tensor:
    return join_leaves([part.value for part in parts], *parts[0].mark) if parts[0].mark else parts[0].value
