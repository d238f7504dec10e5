"""The order of the GEMMs on symbols: what a stack machine does with the contract's merge table must be the contract's tree.

csrc/include/schedule.h is what the sm90 kernel compiles; here g++ compiles it with machines that build strings
(schedule_on_symbols.cpp). ``single`` is the schedule of triton_gemm.py. That the compiled kernels follow them is shown by the order probe
(test_kernels_gpu).
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tpinv.kernels.gemm.problem import most_pending, most_pending_pairs, splits
from tpinv.tree import Node, ReductionTree

TREES = [ReductionTree(n) for n in (*range(1, 34), 48, 64)]
IN_STACK, PARKED, HELD_PARKED = range(3)


class Schedule(ctypes.Structure):
    """struct Schedule of the header."""

    _fields_ = [
        *((n, ctypes.c_int) for n in ("rows", "cols", "leaves", "pieces", "steps", "tiles_m", "tiles_n", "whole", "group")),
        ("merges", ctypes.c_ubyte * 64),
        ("part_merges", ctypes.c_ubyte * 64),
    ]


def schedule(merges, part_merges=(), *, tiles=(1, 1), whole=None, group=8, pieces=1, steps=2) -> Schedule:
    made = Schedule(
        leaves=len(merges), pieces=pieces, steps=steps, tiles_m=tiles[0], tiles_n=tiles[1], whole=tiles[0] * tiles[1] if whole is None else whole,
        group=group,
    )  # fmt: skip
    made.merges[: len(merges)], made.part_merges[: len(part_merges)] = merges, part_merges
    return made


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("schedule") / "schedule.so"
    source = Path(__file__).with_name("schedule_on_symbols.cpp")
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def run(compiled, made: Schedule, waiting: int, deep: bool, split: int = 1, block: int = 0, blocks: int = 1):
    """(what was put into the pipeline, what was taken out, most positions in use, {(m, n, part): root}) of a block."""
    lines = compiled.run(ctypes.byref(made), split, waiting, int(deep), block, blocks).decode().splitlines()
    assert len(lines) > 3, lines
    filled, taken, most, *roots = lines
    found = {}
    for line in roots:
        place, value = line.split(" ", 1)
        assert place not in found, "computed twice"
        found[tuple(map(int, place.split(",")))] = value
    return filled.split(), taken.split(), int(most), found


def add(left, right) -> str:
    return f"({left} {right})"


def expected(tree: ReductionTree, node: Node) -> str:
    return str(tree.reduce(range(node.stop - node.start), add, node))


def single(merges):
    """(value, most positions of the stack in use)."""
    stack, most = [], 0
    for leaf, count in enumerate(merges):
        value = leaf
        for _ in range(count):
            value = add(stack.pop(), value)
        if leaf + 1 == len(merges):
            assert not stack
            return str(value), most
        stack.append(value)
        most = max(most, len(stack))


def nodes(tree: ReductionTree) -> set[Node]:
    """Every subtree that some rank of some number of ranks computes."""
    ranks = [p for p in range(1, tree.leaves + 1) if tree.leaves % p == 0]
    return {node for p in ranks for rank in range(p) for node in tree.subtrees(rank, p)}


@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.leaves))
def test_schedules_are_the_contract(tree, compiled):
    for merges, value in {(tree.merges(node), expected(tree, node)) for node in nodes(tree)}:
        assert single(merges) == (value, most_pending(merges))
        pairs, held = most_pending_pairs(merges), most_pending(merges)
        for waiting, depth in ((IN_STACK, pairs), (PARKED, pairs), (HELD_PARKED, held)):
            filled, taken, most, roots = run(compiled, schedule(merges), waiting, depth > 0)
            assert roots == {(0, 0, 0): value}
            assert most <= depth and (waiting == HELD_PARKED or most == depth)
            assert filled == taken or waiting == IN_STACK, "producer and consumers wait for each other"
            assert [word for word in filled if word[0] == "k"] == [f"k{leaf}@0" for leaf in range(len(merges)) for _ in range(2)]


@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 8, 24, 64])
@pytest.mark.parametrize("blocks", [1, 2, 5, 132])
def test_every_tile_is_computed_once_by_some_block(leaves, blocks, compiled):
    tree = ReductionTree(leaves)
    value = expected(tree, tree.root)
    for split, part_merges in splits(tree, tree.root).items():
        share = leaves // split
        parts = [shifted(single(part_merges)[0], part * share) for part in range(split)]
        for tiles, group in (((1, 1), 8), ((3, 5), 2), ((9, 4), 8), ((7, 3), 4)):
            count = tiles[0] * tiles[1]
            whole = count if split == 1 else count // blocks * blocks
            made = schedule(tree.merges(), part_merges, tiles=tiles, whole=whole, group=group, pieces=2, steps=1)
            for waiting in (IN_STACK, PARKED, HELD_PARKED):
                found: dict = {}
                for block in range(min(blocks, whole + (count - whole) * split)):
                    deep = any(tree.merges())
                    filled, taken, _, roots = run(compiled, made, waiting, deep, split, block, blocks)
                    assert waiting == IN_STACK or filled == taken
                    assert not found.keys() & roots.keys()
                    found |= roots
                by_tile: dict = {}
                for (m, n, part), root in found.items():
                    by_tile.setdefault((m, n), {})[part] = root
                assert by_tile.keys() == {(m, n) for m in range(tiles[0]) for n in range(tiles[1])}
                several = [by_part for by_part in by_tile.values() if by_part != {0: value}]
                assert len(several) == count - whole and all(by_part == dict(enumerate(parts)) for by_part in several)


def shifted(value: str, by: int) -> str:
    """The same tree over leaves from ``by`` on."""
    return re.sub(r"\d+", lambda leaf: str(int(leaf[0]) + by), value)


@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.leaves))
def test_splits_are_the_contract(tree):
    found = splits(tree, tree.root)
    assert found[1] == tree.merges()
    for parts, merges in found.items():
        share = tree.leaves // parts
        values = [shifted(single(merges)[0], i * share) for i in range(parts)]
        while len(values) > 1:
            values = [add(*values[i : i + 2]) for i in range(0, len(values), 2)]
        assert values == [expected(tree, tree.root)]
    if tree.leaves & (tree.leaves - 1) == 0:
        assert set(found) == {p for p in (1, 2, 4, 8) if p <= tree.leaves}


def test_twin_a_wrong_table_is_seen(compiled):
    """A chain of additions has the right number of merges and the wrong tree."""
    tree, chain = ReductionTree(4), (0, 1, 1, 1)
    assert single(chain)[0] != expected(tree, tree.root)
    for waiting in (IN_STACK, PARKED, HELD_PARKED):
        assert run(compiled, schedule(chain), waiting, True)[3] == {(0, 0, 0): "(((0 1) 2) 3)"}
    assert 2 not in splits(ReductionTree(6), Node(0, 6))  # three and three leaves are no subtrees of six
    with pytest.raises(ValueError, match="no sibling"):
        most_pending_pairs((0, 0, 1, 1))
    with pytest.raises(ValueError, match="not there"):
        most_pending((0, 2))
    with pytest.raises(ValueError, match="instead of one"):
        most_pending((0, 0))


def test_64_leaves_are_what_the_triton_kernel_holds():
    assert max(most_pending(ReductionTree(n).merges()) for n in range(1, 65)) == 6 < most_pending(ReductionTree(128).merges())
