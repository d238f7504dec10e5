"""The contract on tensors: rows do not see each other, threads and shards change nothing, and the probe finds the tree."""

import contextlib

import pytest
import torch
from hostile import INEXACT, KINDS, hostile, same_nan

from tpinv import ReductionTree, reference
from tpinv.layers import shard
from tpinv.testing import assert_bitwise_equal, compare, order_probe, tree_shape
from tpinv.tree import Node

K, N = 96, 40
SIZES = (1, 2, 3, 7, 16, 63, 64, 65, 100, 127, 128, 129, 200)  # M


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def data(kind: str, *shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return hostile(kind, shape, dtype, seed)


@pytest.mark.parametrize("dtype", reference.SUPPORTED_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(kind, dtype):
    x, weight, tree = data(kind, max(SIZES), K, dtype=dtype), data(kind, N, K, seed=1, dtype=dtype), ReductionTree(8)
    whole = reference.linear(x, weight, None, tree)
    for m in SIZES:
        for rows in (slice(0, m), slice(max(SIZES) - m, None)):
            assert_bitwise_equal(same_nan(reference.linear(x[rows], weight, None, tree)), same_nan(whole[rows]), f"rows {rows}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert_bitwise_equal(same_nan(reference.linear(x[order], weight, None, tree)), same_nan(whole[order]), "permuted rows")


def test_every_row_alone():
    x, b = data("exponents", 200, 300), data("exponents", 300, N, seed=1)
    whole = reference.chain_matmul(x, b)
    assert_bitwise_equal(torch.cat([reference.chain_matmul(x[i : i + 1], b) for i in range(200)]), whole)


def test_stock_matmul_sees_the_batch():
    """The twin: on this machine some M gives a row other bits than another."""
    x, b = data("exponents", 200, 300), data("exponents", 300, N, seed=1)
    whole = x @ b
    assert any(compare(x[:m] @ b, whole[:m]) for m in (1, 2, 3, 7, 16, 65))


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 13, 40, 96, 257])
def test_address_and_threads_change_nothing(columns):
    a, b = data("exponents", 130, 300), data("exponents", 300, columns, seed=1)
    expected = reference.chain_matmul(a, b)
    for offset in (1, 2, 3, 5):
        shifted = [torch.zeros(t.numel() + offset)[offset:].view(t.shape).copy_(t) for t in (a, b)]
        assert_bitwise_equal(reference.chain_matmul(*shifted), expected, f"{offset} floats off alignment")
    assert_bitwise_equal(reference.chain_matmul(a.t().contiguous().t(), b.t().contiguous().t()), expected, "transposed in memory")
    with threads(2):
        assert_bitwise_equal(reference.chain_matmul(a, b), expected, "two threads")


def test_autocast_does_not_reach_in():
    a, b = data("normal", 4, 96), data("normal", 96, 8, seed=1)
    expected = reference.chain_matmul(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert_bitwise_equal(reference.chain_matmul(a, b), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("leaves, ranks", [(8, 2), (8, 4), (8, 8), (24, 3), (24, 6), (24, 8), (3, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_bytes_of_the_whole(kind, leaves, ranks, stride):
    """No process group: slice, compute every rank's values here, finish the tree."""
    tree = ReductionTree(leaves)
    a, b = data(kind, 10, K), data(kind, K, 12, seed=1)
    nodes = [node for rank in range(ranks) for node in tree.subtrees(rank, ranks)]
    parts = [(shard(a, 1, rank, ranks, stride), shard(b, 0, rank, ranks, stride)) for rank in range(ranks)]
    values = torch.cat([reference.tree_product(*part, tree, rank, ranks, stride=stride) for rank, part in enumerate(parts)])
    whole = reference.finish(reference.tree_product(a, b, tree, 0, 1, stride=stride), tree, [tree.root])
    assert_bitwise_equal(same_nan(reference.finish(values, tree, nodes)), same_nan(whole), "product, tree over k")

    columns = [reference.local_product(a.t(), shard(a, 1, r, ranks, stride), leaves // ranks, dim=1, stride=stride) for r in range(ranks)]
    whole = reference.local_product(a.t(), a, leaves, dim=1, stride=stride)
    assert_bitwise_equal(same_nan(reference.join_leaves(columns, 1, stride)), same_nan(whole), "product, columns cut")

    values = torch.cat([reference.tree_sum(shard(a, 1, rank, ranks), tree, rank, ranks, dim=1) for rank in range(ranks)])
    whole = reference.finish(reference.tree_sum(a, tree, 0, 1, dim=1), tree, [tree.root])
    assert_bitwise_equal(same_nan(reference.finish(values, tree, nodes)), same_nan(whole), "plain sum")


def test_local_products_down_to_one_column_per_rank():
    """Where nothing is summed across ranks the width of the shard still picks the BLAS kernel: a matrix of one column is another."""
    a, b = data("normal", 130, 300), data("normal", 300, 24, seed=1)
    whole = reference.local_product(a, b, 24, dim=1)
    for ranks in (2, 3, 8, 24):
        parts = [reference.local_product(a, shard(b, 1, rank, ranks), 24 // ranks, dim=1) for rank in range(ranks)]
        assert_bitwise_equal(torch.cat(parts, 1), whole, f"p={ranks}")
    assert compare(torch.cat([a @ b[:, j : j + 1] for j in range(24)], 1), a @ b), "the stock twin must differ"


def test_leaves_with_stride_pair_the_pieces():
    x = torch.arange(16.0)
    assert [leaf.tolist() for leaf in reference.split_leaves(x, 0, 4, 2)] == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    assert_bitwise_equal(reference.join_leaves(reference.split_leaves(x, 0, 4, 2), 0, 2), x)


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 100, 255])
def test_pairwise_sum_is_the_tree_over_single_elements(n):
    x = data("exponents", 3, n)
    expected = torch.stack([ReductionTree(n).reduce(row.unbind(), torch.add) for row in x])
    assert_bitwise_equal(reference.pairwise_sum(x, 1), expected)
    if n <= 40:
        probed = order_probe(lambda v: reference.pairwise_sum(v, -1), n, batched=True)
        assert probed == tree_shape(ReductionTree(n))


def test_sums_of_nothing():
    tree = ReductionTree(8)
    assert reference.pairwise_sum(torch.zeros(3, 0), 1).tolist() == [0.0, 0.0, 0.0]
    assert reference.bias_grad(torch.zeros(0, 5), tree).tolist() == [0.0] * 5
    assert reference.linear(torch.zeros(0, 16), torch.zeros(4, 16), None, tree).shape == (0, 4)
    assert reference.tree_sum(torch.ones(3, 2), tree, 0, 1, dim=0).tolist() == [[3.0, 3.0]]  # fewer elements than leaves


@pytest.mark.parametrize("node_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 8, 24])
def test_probe_finds_the_tree(leaves, node_dtype):
    tree = ReductionTree(leaves, node_dtype)

    def linear(values):  # one value per leaf, times ones
        x = torch.zeros(len(values), leaves * 4)
        x[:, ::4] = values
        return reference.linear(x, torch.ones(1, leaves * 4), None, tree)[:, 0]

    def dgrad(values):
        return reference.linear_dgrad(values, torch.ones(leaves, 3), tree)[:, 1]

    def bias_grad(values):
        return reference.bias_grad(values.t(), tree)

    for total in (linear, dgrad, bias_grad):
        assert order_probe(total, leaves, batched=True) == tree_shape(tree)


def test_probe_finds_the_chain():
    """Leaves of one step each come in increasing k: ((0, 1), 2)."""

    def chain(values):
        a = torch.zeros(len(values), 5 * reference.STEP)
        a[:, :: reference.STEP] = values
        return reference.chain_matmul(a, torch.ones(5 * reference.STEP, 7))[:, 3]

    assert order_probe(chain, 5, batched=True) == ((((0, 1), 2), 3), 4)


def test_a_node_is_rounded_once():
    tree = ReductionTree(2, "bfloat16")
    values = torch.tensor([1.0, 2.0**-8], dtype=torch.bfloat16)
    total = reference.node_add(tree)(values[0], values[1])
    assert total.dtype == torch.bfloat16 and total == 1.0  # ties to even
    nodes = [Node(0, 1), Node(1, 2)]
    assert reference.finish(values, tree, nodes, torch.float32).dtype == torch.float32
    assert reference.finish(values, tree, nodes).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", INEXACT)
def test_log_sum_exp_and_row_sums_against_fp64(kind):
    x = data(kind, 50, 1000).clamp(-50, 50)
    tree = ReductionTree(8)
    for ours, stock, exact in (
        (reference.log_sum_exp(x, tree), x.logsumexp(-1), x.double().logsumexp(-1)),
        (reference.row_sum(x), x.sum(-1), x.double().sum(-1)),
    ):
        error, stock_error = ((t.double() - exact).square().mean().sqrt() for t in (ours, stock))
        assert error <= 1.5 * stock_error + 1e-7 * exact.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_against_fp64(dtype):
    x, weight, dy = (
        data("normal", 200, 768, dtype=dtype),
        data("normal", 96, 768, seed=1, dtype=dtype),
        data("normal", 200, 96, seed=2, dtype=dtype),
    )
    tree = ReductionTree(8)
    for ours, stock, exact in (
        (reference.linear(x, weight, None, tree), x @ weight.t(), x.double() @ weight.double().t()),
        (reference.linear_dgrad(dy, weight, tree), dy @ weight, dy.double() @ weight.double()),
        (reference.linear_wgrad(dy, x, tree, sharded=0), dy.t() @ x, dy.double().t() @ x.double()),
    ):
        error, stock_error = ((t.double() - exact).square().mean().sqrt() for t in (ours, stock))
        assert error <= 1.2 * stock_error
