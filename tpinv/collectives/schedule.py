"""What every rank must decide alike, without a tensor or a GPU: the rank part of the tree as a table, who owns which value, and
which of two algorithms moves the bytes. The table alone fixes the order of additions; the rest moves work."""

import functools
from dataclasses import dataclass

from tpinv.tree import Node, ReductionTree

PACK = 16  # bytes of a value that one thread moves at once
WORD_BYTES = 2  # a pack travels in words that are half flag
INBOX_BYTES = 4 << 20  # a slot for words
BULK_BYTES = 64 << 20  # a slot for packs, at most; larger messages take several launches
MAX_VALUES = 21  # a table of merges is 64 bits, three a value
MAX_RANKS = 16
# One-shot sends more bytes, and saves a fence, a flag and (all-reduce) a way back. By timing two H200: about what this many take.
_EXTRA_BYTES = {False: 768 << 10, True: 384 << 10}


@functools.cache
def first_values(tree: ReductionTree, ranks: int) -> tuple[int, ...]:
    """Index of each rank's first subtree value among the values of all ranks from left to right, and their number: [p + 1]."""
    first = [0]
    for rank in range(ranks):
        first.append(first[-1] + len(tree.subtrees(rank, ranks)))
    return tuple(first)


@functools.cache
def finish_merges(tree: ReductionTree, ranks: int) -> tuple[int, ...]:
    """The tree above the ranks' subtrees in streaming order, as ReductionTree.merges: after value t merge so many pending ones."""
    given = {node for rank in range(ranks) for node in tree.subtrees(rank, ranks)}

    def walk(node: Node) -> list[int]:
        if node in given:
            return [0]
        left, right = tree.children(node)
        *head, last = walk(right)
        return [*walk(left), *head, last + 1]

    return tuple(walk(tree.root))


def octal(merges: tuple[int, ...]) -> int:
    """The table as one number whose octal digit t is entry t."""
    return sum(count << 3 * t for t, count in enumerate(merges))


@dataclass(frozen=True)
class Plan:
    """One collective: ``launches`` are (start, count) in packs of a slice. ``slice`` is 0 when everybody finishes everything."""

    algorithm: str  # "one_shot" or "two_shot"
    slice: int
    launches: tuple[tuple[int, int], ...]
    slot_bytes: int  # a slot must hold the values of one launch ...
    gathered_bytes: int  # ... and this area the finished slices of it


@functools.lru_cache(maxsize=4096)
def plan(
    packs: int, ranks: int, values: int, out_pack: int, scatter: bool, algorithm: str | None = None, bulk_bytes: int = BULK_BYTES
) -> Plan:
    """``packs`` of one value (p must divide them for ``scatter``), ``values`` of all ranks, ``out_pack`` bytes of the sum of a pack.

    ``algorithm`` overrides the choice, which is one of speed: the bits are the same.
    """
    part = packs // ranks if scatter else packs
    words = values * part * PACK * WORD_BYTES
    own = values * packs * PACK // ranks  # bytes a rank holds, on average: ranks may hold different numbers of values
    one_shot = own * WORD_BYTES if scatter else own * WORD_BYTES * ranks
    two_shot = own if scatter else own + packs * out_pack
    if algorithm is None:
        extra = (one_shot - two_shot) * (ranks - 1) // ranks
        algorithm = "one_shot" if words <= INBOX_BYTES and extra <= _EXTRA_BYTES[scatter] else "two_shot"
    if algorithm == "one_shot":
        if words > INBOX_BYTES:
            raise ValueError(f"{words} bytes of words do not fit in a slot of {INBOX_BYTES}; use two_shot")
        return Plan("one_shot", part if scatter else 0, ((0, part),), INBOX_BYTES, 0)
    part = -(-packs // ranks)
    most = max(1, bulk_bytes // (values * PACK))
    launches = tuple((start, min(most, part - start)) for start in range(0, part, most))
    longest = launches[0][1]
    return Plan("two_shot", part, launches, longest * values * PACK, 0 if scatter else longest * ranks * out_pack)
