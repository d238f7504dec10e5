"""Column-parallel linear: dx sums over out-features, which the ranks share (tree); y, dW and db are local sums."""

import functools

import pytest
import torch
from hostile import CASES, CASES_ON_RANKS, INEXACT, RANKS, Case, assert_as_alone, assert_twin_differs, join, one_call, poison, sum_of

from tpinv import ReductionTree, column_parallel_linear, reference
from tpinv.collectives import resolve
from tpinv.layers import shard
from tpinv.testing import assert_bitwise_equal, run_ranks

M, B, N, K = 24, 2, 96, 20


def strides(case: Case) -> tuple[int, ...]:
    """Stride 2 is [gate; up] with 48 out-features each."""
    return (1, 2) if case.kind == "exponents" else (1,)


def layout(case: Case, stride: int) -> dict:
    """Which dimension of each result is sharded."""
    return {f"y{stride}": (2, stride), f"dx{stride}": 0 if case.sp else None, f"dw{stride}": (0, stride), f"db{stride}": (0, stride)}


def inputs(case: Case, rank: int, ranks: int, stride: int = 1):
    x, w, b, dy = (case.make(name, *shape) for name, shape in {"x": (M, B, K), "w": (N, K), "b": (N,), "dy": (M, B, N)}.items())
    w, b, dy = (shard(t, dim, rank, ranks, stride) for t, dim in ((w, 0), (b, 0), (dy, 2)))
    return x, w, b, dy


def ours(case: Case, rank: int, ranks: int, stride: int) -> dict:
    x, w, b, dy = inputs(case, rank, ranks, stride)
    x = shard(x, 0, rank, ranks) if case.sp else x
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    y = column_parallel_linear(x, w, b, tree=case.tree, sequence_parallel=case.sp, stride=stride)
    y.backward(dy)
    return {f"y{stride}": y.detach(), f"dx{stride}": x.grad, f"dw{stride}": w.grad, f"db{stride}": b.grad}


def stock(case: Case, rank: int, ranks: int) -> dict:
    _, w, _, dy = inputs(case, rank, ranks)
    return {"stock dx": sum_of(dy @ w)}


def every_case():
    _, rank, ranks = resolve()
    with poison(ranks > 1):
        results = {}
        for case in CASES:
            if case.leaves % ranks == 0:
                results[case] = stock(case, rank, ranks)
                for stride in strides(case):
                    results[case] |= ours(case, rank, ranks, stride)
        return results


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize(("case", "p"), CASES_ON_RANKS, ids=str)
def test_same_bytes_as_one_rank(case, p):
    for stride in strides(case):
        assert_as_alone(run(p), run(1), case, layout(case, stride))
    if p >= 4 and case.kind in INEXACT:
        assert_twin_differs(run(p), run(1), case, "stock dx")


def test_sequence_parallel_alone_changes_nothing():
    for case in CASES:
        for stride in strides(case):
            assert_as_alone(run(1), run(1), case, layout(case, stride))


def test_stride_two_is_a_permutation_of_the_tree():
    """Forward and weight gradient do not know the stride, dx does: leaf j holds piece j of gate and of up."""
    case, alone = Case("fp32", "exponents"), run(1)[0]
    for name in ("y", "dw", "db"):
        assert_bitwise_equal(alone[case][f"{name}2"], alone[case][f"{name}1"])
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(alone[case]["dx2"], alone[case]["dx1"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_order_is_the_reference(stride, dtype):
    """Not any invariant order but the contract's: the tree over N, a chain and a tree over tokens."""
    case = Case(dtype, "exponents")
    x, w, _, dy = (t.flatten(0, 1) if t.dim() == 3 else t for t in inputs(case, 0, 1))
    result = {name: t.flatten(0, 1) if t.dim() == 3 else t for name, t in run(1)[0][case].items()}
    assert_bitwise_equal(result[f"dx{stride}"], reference.linear_dgrad(dy, w, case.tree, stride=stride), "dx")
    assert_bitwise_equal(result[f"dw{stride}"], reference.linear_wgrad(dy, x, case.tree, sharded=0, stride=stride), "dw")
    assert_bitwise_equal(result[f"db{stride}"], reference.bias_grad(dy, case.tree), "db")


def test_accuracy_is_that_of_stock():
    """Against fp64: the only place with a tolerance."""
    for case in (Case("fp32"), Case("bf16")):
        _, w, _, dy = (t.double() for t in inputs(case, 0, 1))
        error, stock_error = ((run(4)[0][case][name].double() - dy @ w).square().mean().sqrt() for name in ("dx1", "stock dx"))
        assert error <= 1.1 * stock_error


def corners():
    """{corner: {name: this rank's part}}: gathered output, shapes, views, frozen inputs."""
    _, rank, ranks = resolve()
    case, tree = Case("fp32", "exponents"), ReductionTree(24)
    x, w, b, dy = inputs(case, rank, ranks)
    whole_dy = case.make("dy", M, B, N)
    out = {}

    def case_of(name, *tensors, needs=(True, True, True), **options):
        out[name] = one_call(functools.partial(column_parallel_linear, tree=tree, **options), *tensors, needs=needs)

    with poison(ranks > 1):
        case_of("base", x, w, b, dy)
        case_of("gathered", x, w, b, whole_dy, gather_output=True)
        case_of("no tokens", x[:0], w, b, dy[:0])
        case_of("one-dimensional x", x[0, 0], w, b, dy[0, 0])
        case_of(
            "strided views",
            x.transpose(0, 1).contiguous().transpose(0, 1),
            w.t().contiguous().t(),
            b,
            dy.transpose(0, 2).contiguous().transpose(0, 2),
        )
        flat = torch.zeros(1 + w.numel())  # parameters of a flat buffer start at any address
        flat[1:] = w.flatten()
        case_of("unaligned weight", x, flat[1:].view_as(w), b, dy)
        case_of("constant dy", x, w, b, torch.ones(()).expand_as(dy))
        case_of("frozen weight", x, w, b, dy, needs=(True, False, False))
        case_of("frozen x", x, w, b, dy, needs=(False, True, True))
        case_of("nothing", x, w, b, dy, needs=(False, False, False))
        with torch.autocast("cpu", torch.bfloat16):
            case_of("autocast", x, w, b, dy)
        twice = x.clone().requires_grad_()
        (column_parallel_linear(twice, w, b, tree=tree) * column_parallel_linear(twice, 2 * w, tree=tree)).backward(dy)
        out["x used twice"] = {"dx": twice.grad}
        y = column_parallel_linear(x, w, b, tree=tree, gather_output=True)
        out["gathered"]["y"] = y.div_(2).mul_(2)  # callers may write into it, as stock cross-entropy does
    return out


@functools.cache
def run_corners(p: int):
    return run_ranks(corners, p)


@pytest.mark.parametrize("p", RANKS)
def test_corners(p):
    alone = run_corners(1)[0]
    for corner, tensors in alone.items():
        for name, expected in tensors.items():
            dim = {"y": None if corner == "gathered" else -1, "dx": None, "dw": 0, "db": 0}[name]
            for actual in join(run_corners(p), corner, name, dim):
                assert_bitwise_equal(actual, expected, f"{corner}: {name}")


def test_corners_that_change_no_bit():
    alone = run_corners(1)[0]
    for corner in ("gathered", "strided views", "unaligned weight", "frozen weight", "frozen x", "nothing", "autocast"):
        for name, actual in alone[corner].items():
            assert_bitwise_equal(actual, alone["base"][name], f"{corner}: {name}")
    assert_bitwise_equal(alone["one-dimensional x"]["y"], alone["base"]["y"][0, 0])
    assert_bitwise_equal(alone["one-dimensional x"]["dx"], alone["base"]["dx"][0, 0])
    assert not alone["no tokens"]["dw"].any() and not alone["no tokens"]["db"].any()


@pytest.mark.parametrize(
    "x, weight, options, message",
    [
        ((4, 20), (12, 20), {}, "has no 8 equal leaves"),
        ((4, 20), (24, 20), {"stride": 2}, "out_features / stride 2=12 has no 8 equal leaves"),
        ((4, 20), (24, 20), {"stride": 0}, "stride=0 must be at least 1"),
        ((4, 20), (16, 20), {"stride": 2, "gather_output": True}, "would interleave the blocks"),
        ((4, 16), (16, 20), {}, "do not fit"),
        ((20,), (16, 20), {"sequence_parallel": True}, "must be tokens"),
    ],
)
def test_errors(x, weight, options, message):
    with pytest.raises(ValueError, match=message):
        column_parallel_linear(torch.zeros(x), torch.zeros(weight), tree=ReductionTree(8), **options)
