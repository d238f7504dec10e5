"""The kernels' schedules, run on symbols: what a stack machine does with the contract's merge table must be the contract's tree.

``single`` is the schedule of gemm.py; ``pairs`` that of sm90 at up to 192 columns, where a left leaf waits in its accumulators for
its sibling; ``held`` that of sm90 at 256 columns, which keeps at hand what the next leaf is merged with. From 192 columns on the
producer brings parked values back: it knows the table and must foresee what the consumers do (``parking_after`` of the source).
That the compiled kernels follow them is shown by the order probe (test_kernels_gpu).
"""

import pytest

from tpinv.kernels.gemm.problem import most_pending, most_pending_pairs, splits
from tpinv.tree import Node, ReductionTree

TREES = [ReductionTree(n) for n in (*range(1, 34), 48, 64)]


def add(left, right):
    return (left, right)


def single(merges, first=0):
    """(value, most positions of the stack in use)."""
    stack, most = [], 0
    for leaf, count in enumerate(merges):
        value = first + leaf
        for _ in range(count):
            value = add(stack.pop(), value)
        if leaf + 1 == len(merges):
            assert not stack
            return value, most
        stack.append(value)
        most = max(most, len(stack))


def pairs(merges, first=0):
    stack, most, leaf = [], 0, 0
    while True:
        value, count = first + leaf, merges[leaf]
        if count == 0 and leaf + 1 < len(merges):  # the sibling follows
            leaf += 1
            value, count = add(value, first + leaf), merges[leaf] - 1
        for _ in range(count):
            value = add(stack.pop(), value)
        leaf += 1
        if leaf == len(merges):
            assert not stack
            return value, most
        stack.append(value)
        most = max(most, len(stack))


def held(merges, first=0):
    """One value at hand and the others parked, each step as ``parking_after`` foresees it at 256 columns."""
    at_hand, parked, most, last = None, [], 0, len(merges) - 1
    for leaf, count in enumerate(merges):
        value = first + leaf
        unpark, park = max(count - 1, 0), leaf != last and merges[leaf + 1] == 0
        if count > 0:
            value, at_hand = add(at_hand, value), None
        for _ in range(unpark):
            value = add(parked.pop(), value)
        assert at_hand is None
        if park:
            parked.append(value)
            most = max(most, len(parked))
        elif leaf != last:
            at_hand = value
    assert not parked and at_hand is None
    return value, most


def parking_of_pairs(merges):
    """What the producer foresees after every leaf up to 192 columns: (values to bring back, whether one is parked)."""
    last = len(merges) - 1
    for leaf, count in enumerate(merges):
        if count == 0 and leaf != last:
            yield 0, False
        else:
            yield count - (leaf > 0 and merges[leaf - 1] == 0), leaf != last


def parks_of_pairs(merges):
    """The same from what the consumers do: see ``pairs``."""
    leaf, last = 0, len(merges) - 1
    while leaf <= last:
        if merges[leaf] == 0 and leaf != last:
            yield 0, False
            leaf += 1
            yield merges[leaf] - 1, leaf != last
        else:
            yield merges[leaf], leaf != last
        leaf += 1


def expected(tree, node):
    return tree.reduce(range(*node), add, node)


@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.leaves))
def test_schedules_are_the_contract(tree):
    for ranks in (p for p in range(1, tree.leaves + 1) if tree.leaves % p == 0):
        for rank in range(ranks):
            for node in tree.subtrees(rank, ranks):
                merges = tree.merges(node)
                assert single(merges, node.start) == (expected(tree, node), most_pending(merges))
                assert pairs(merges, node.start) == (expected(tree, node), most_pending_pairs(merges))
                value, parked = held(merges, node.start)
                assert value == expected(tree, node) and parked <= most_pending(merges)
                assert list(parking_of_pairs(merges)) == list(parks_of_pairs(merges))


@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.leaves))
def test_splits_are_the_contract(tree):
    found = splits(tree, tree.root)
    assert found[1] == tree.merges()
    for parts, merges in found.items():
        share = tree.leaves // parts
        values = [single(merges, i * share)[0] for i in range(parts)]
        while len(values) > 1:
            values = [add(*values[i : i + 2]) for i in range(0, len(values), 2)]
        assert values == [expected(tree, tree.root)]
    if tree.leaves & (tree.leaves - 1) == 0:
        assert set(found) == {p for p in (1, 2, 4, 8) if p <= tree.leaves}


def test_twin_a_wrong_table_is_seen():
    """A chain of additions has the right number of merges and the wrong tree."""
    tree = ReductionTree(4)
    assert single((0, 1, 1, 1))[0] != expected(tree, tree.root)
    assert 2 not in splits(ReductionTree(6), Node(0, 6))  # three and three leaves are no subtrees of six
    with pytest.raises(ValueError, match="no sibling"):
        most_pending_pairs((0, 0, 1, 1))
    with pytest.raises(ValueError, match="not there"):
        most_pending((0, 2))
    with pytest.raises(ValueError, match="instead of one"):
        most_pending((0, 0))


def test_64_leaves_are_what_the_triton_kernel_holds():
    assert max(most_pending(ReductionTree(n).merges()) for n in range(1, 65)) == 6 < most_pending(ReductionTree(128).merges())
