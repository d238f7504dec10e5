"""How the parts of one tensor, a part a rank, are put together, so that runs at different tensor-parallel sizes or in different
frameworks can be compared.

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

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from tpinv.diff.runs import Part
from tpinv.reference import join_leaves


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


def all_ways(a: list[Part], b: list[Part]) -> Iterator[Way]:
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
