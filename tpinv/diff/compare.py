"""Compares two recorded runs, tensor by tensor, in the order of the first; shards.py says how parts are put together."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tpinv.diff.runs import Key, Part, Run
from tpinv.diff.shards import all_ways
from tpinv.testing.bits import Difference, compare, scaled_distance, ulp_of


@dataclass(frozen=True)
class Comparison:
    """``rule`` says how the parts were put together, or why they were not compared (``compared`` is False).

    ``unlike``: the dtypes are, which nothing forgives. ``difference`` is None when nothing differs, or when the digests differ and nothing else was kept. ``histogram`` counts the
    elements that differ by at most 1 ulp of the tensor's largest value (Difference.max_ulp), by 1 to 2, by 2 to 4, by 4 to 8, and so on.
    """

    key: Key
    rule: str
    compared: bool = True
    differs: bool = False
    unlike: bool = False
    difference: Difference | None = None
    histogram: tuple[int, ...] = ()

    @property
    def same(self) -> bool:
        return self.compared and not self.differs


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
            found.append(compare_parts(key, a[key], b[key]))
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


def compare_parts(key: Key, a: list[Part], b: list[Part]) -> Comparison:
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
    ways = [way for way in all_ways(a, b) if way.fits(a, b)]
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
    unit = ulp_of(*(tensor for pair in pairs for tensor in pair))
    wrong = [(difference, left, right) for left, right in pairs if (difference := compare(right, left, unit=unit))]
    if not wrong:
        return Comparison(key, rule)
    found = [difference for difference, _, _ in wrong]
    total = dataclasses.replace(
        found[0], count=sum(d.count for d in found), total=sum(d.total for d in found),
        max_ulp=max(d.max_ulp for d in found), nonfinite=sum(d.nonfinite for d in found),
    )  # fmt: skip
    return Comparison(key, rule, differs=True, difference=total, histogram=_histogram([pair for _, *pair in wrong], unit))


def _histogram(pairs: list[tuple[Tensor, Tensor]], unit: float) -> tuple[int, ...]:
    """Counts of elements by the power of two above their distance; none for integers, and none of elements that are NaN or infinite."""
    if not pairs[0][0].is_floating_point():
        return ()
    distances = torch.cat([scaled_distance(left, right, unit).flatten()[_unlike(left, right)] for left, right in pairs])
    powers = distances[distances.isfinite()].clamp(min=1.0).log2().ceil().long()
    return tuple(torch.bincount(powers).tolist()) if powers.numel() else ()


def _unlike(left: Tensor, right: Tensor) -> Tensor:
    """Which elements' bytes differ, flat."""
    size = left.element_size()
    return (left.contiguous().view(-1, 1).view(torch.uint8) != right.contiguous().view(-1, 1).view(torch.uint8)).view(-1, size).any(1)


def _distance(comparison: Comparison) -> float:
    """How far apart two ways of putting shards together leave the runs: the sum of the logarithms, roughly."""
    if not comparison.differs:
        return 0.0
    if comparison.difference is None:
        return float("inf")
    return sum((power + 1) * count for power, count in enumerate(comparison.histogram)) + 64.0 * comparison.difference.nonfinite or float(
        comparison.difference.count
    )
