"""The contract, proved with symbols: ``add = lambda a, b: (a, b)`` records the order of additions, floats do not take part."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpinv.tree import Node, ReductionTree


def pair(left, right):
    return (left, right)


def divisors(n: int) -> list[int]:
    return [p for p in range(1, n + 1) if n % p == 0]


def rfc6962(start: int, stop: int):
    """Section 2.1 of the RFC, word for word: k is the largest power of two smaller than n."""
    n = stop - start
    if n == 1:
        return start
    k = max(2**i for i in range(n.bit_length()) if 2**i < n)
    return (rfc6962(start, start + k), rfc6962(start + k, stop))


leaves_and_ranks = st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(divisors(n))))


@given(leaves_and_ranks)
def test_the_law(leaves_and_ranks):
    """reduce(leaves) == finish(the values of every rank's maximal subtrees), for every number of leaves and ranks."""
    leaves, ranks = leaves_and_ranks
    tree = ReductionTree(leaves)
    values = {node: tree.reduce(range(*node), pair, node) for rank in range(ranks) for node in tree.subtrees(rank, ranks)}
    assert tree.finish(values, pair) == tree.reduce(range(leaves), pair)


@pytest.mark.parametrize("leaves", [*range(1, 70), 127, 128, 129, 255, 256])
def test_shape_is_rfc6962(leaves):
    tree = ReductionTree(leaves)
    assert tree.reduce(range(leaves), pair) == rfc6962(0, leaves)
    assert tree.finish({Node(i, i + 1): i for i in range(leaves)}, pair) == rfc6962(0, leaves)


@given(leaves_and_ranks)
def test_subtrees_cover_what_a_rank_owns_and_are_maximal(leaves_and_ranks):
    leaves, ranks = leaves_and_ranks
    tree = ReductionTree(leaves)
    for rank in range(ranks):
        nodes, owned = tree.subtrees(rank, ranks), tree.owned(rank, ranks)
        assert [leaf for node in nodes for leaf in range(*node)] == list(owned)
        for node in nodes:
            parent = _parent(tree, node)
            assert parent is None or parent.start < owned.start or owned.stop < parent.stop


def _parent(tree: ReductionTree, node: Node) -> Node | None:
    parent, here = None, tree.root
    while here != node:
        parent = here
        left, right = tree.children(here)
        here = left if node.start < left.stop else right
    return parent


@pytest.mark.parametrize("leaves, most", [(8, {1: 1, 2: 1, 4: 1, 8: 1}), (24, {1: 1, 2: 2, 3: 1, 4: 2, 6: 1, 8: 2, 12: 1, 24: 1})])
def test_values_sent_per_rank(leaves, most):
    tree = ReductionTree(leaves)
    assert {p: max(len(tree.subtrees(rank, p)) for rank in range(p)) for p in divisors(leaves)} == most


@given(st.integers(1, 2000))
def test_streaming_order(leaves):
    """The stack holds at most one pending value per level, and running the schedule is the recursive definition."""
    tree = ReductionTree(leaves)
    merges = tree.merges()
    assert len(merges) == leaves
    depth = deepest = 0
    for count in merges:
        depth += 1  # the leaf itself
        deepest = max(deepest, depth)
        depth -= count
        assert depth >= 1
    assert depth == 1
    assert deepest <= (leaves - 1).bit_length() + 1


def test_reduce_is_lazy_and_takes_exactly_the_leaves():
    tree = ReductionTree(6)
    taken = []
    tree.reduce((taken.append(i) or i for i in range(6)), lambda left, right: taken.append("+") or 0)
    assert taken == [0, 1, "+", 2, 3, "+", "+", 4, 5, "+", "+"]
    for wrong in (5, 7):
        with pytest.raises(ValueError):
            tree.reduce(range(wrong), pair)


@given(leaves_and_ranks, st.integers(0, 50))
def test_spans_meet_rank_boundaries(leaves_and_ranks, multiple):
    """A dimension that p divides is cut at every rank boundary, equal leaves or not; nothing is lost or taken twice."""
    leaves, ranks = leaves_and_ranks
    tree, length = ReductionTree(leaves), multiple * ranks
    elements = [i for leaf in range(leaves) for i in tree.span(Node(leaf, leaf + 1), length)]
    assert elements == list(range(length))
    for rank in range(ranks):
        owned = tree.owned(rank, ranks)
        assert tree.span(Node(owned.start, owned.stop), length) == range(rank * multiple, (rank + 1) * multiple)


def test_equal_leaves_of_a_linear():
    assert ReductionTree(24).leaf_length(576, "in_features") == 24
    with pytest.raises(
        ValueError,
        match=r"in_features=20 has no 8 equal leaves; use a tree with leaves in \[1, 2, 4, 5, 10, 20\], or pad in_features to 24",
    ):
        ReductionTree(8).leaf_length(20, "in_features")
    with pytest.raises(ValueError, match="in_features=0 must be at least 1"):
        ReductionTree(8).leaf_length(0, "in_features")


@pytest.mark.parametrize("leaves", [0, -1, 2.0, True, "8", None])
def test_leaves_must_be_a_positive_int(leaves):
    with pytest.raises(ValueError, match="must be an int of at least 1; use 8, or 24"):
        ReductionTree(leaves)


def test_other_errors():
    tree = ReductionTree(24)
    with pytest.raises(ValueError, match="node_dtype='fp32' is unknown; use one of 'float32', 'bfloat16'"):
        ReductionTree(8, "fp32")
    with pytest.raises(ValueError, match=r"5 ranks do not divide leaves=24 \(its divisors: \[1, 2, 3, 4, 6, 8, 12, 24\]\)"):
        tree.subtrees(0, 5)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=rf"rank={rank} must be in \[0, 4\)"):
            tree.owned(rank, 4)
    with pytest.raises(ValueError, match="0 ranks"):
        tree.owned(0, 0)
    with pytest.raises(ValueError, match="node 3 is a leaf"):
        tree.children(Node(3, 4))
    with pytest.raises(ValueError, match="leaf 8 lies under none of the given subtrees"):
        tree.finish({Node(0, 8): 0}, pair)


def test_a_tree_is_a_value():
    tree = ReductionTree(8)
    assert tree == ReductionTree(8, "float32") and hash(tree) == hash(ReductionTree(8))
    assert tree != ReductionTree(8, "bfloat16") and tree != ReductionTree(24)
    assert {tree: 1}[ReductionTree(8)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.leaves = 4
    assert ReductionTree(24, "bfloat16").with_float32_nodes() == ReductionTree(24)
    assert tree.with_float32_nodes() is tree


def test_fingerprint():
    assert ReductionTree(8).fingerprint == "tpinv1-rfc6962-L8-float32"
    assert ReductionTree(24, "bfloat16").fingerprint == "tpinv1-rfc6962-L24-bfloat16"


def test_nodes_print_as_in_the_docs():
    assert [str(node) for node in ReductionTree(6).subtrees(0, 2)] == ["[0,2)", "2"]
    assert [str(node) for node in ReductionTree(6).subtrees(1, 2)] == ["3", "[4,6)"]


def test_the_contract_runs_without_torch():
    """The file alone, in a process where torch cannot be imported."""
    import tpinv.tree

    script = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path(sys.argv[1])['ReductionTree'](24).subtrees(1, 8)"
    subprocess.run([sys.executable, "-c", script, tpinv.tree.__file__], check=True, timeout=60)
