"""Row-parallel linear: y sums over in-features, which the ranks share (tree); dx, dW and db are local sums."""

import functools

import pytest
import torch
import torch.distributed as dist
from hostile import CASES, CASES_ON_RANKS, INEXACT, RANKS, Case, assert_as_alone, assert_twin_differs, one_call, poison, sum_of

from tpinv import ReductionTree, reference, row_parallel_linear
from tpinv.collectives import resolve
from tpinv.layers import shard
from tpinv.testing import RankError, assert_bitwise_equal, run_ranks

M, B, N, K = 24, 2, 20, 96


def layout(case: Case) -> dict:
    """Which dimension of each result is sharded."""
    return {"y": 0 if case.sp else None, "dx": 2, "dw": 1, "db": None}


def inputs(case: Case, rank: int, ranks: int):
    x, w, b, dy = (case.make(name, *shape) for name, shape in {"x": (M, B, K), "w": (N, K), "b": (N,), "dy": (M, B, N)}.items())
    return shard(x, 2, rank, ranks), shard(w, 1, rank, ranks), b, dy


def ours(case: Case, rank: int, ranks: int) -> dict:
    x, w, b, dy = inputs(case, rank, ranks)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    y = row_parallel_linear(x, w, b, tree=case.tree, sequence_parallel=case.sp)
    y.backward(shard(dy, 0, rank, ranks) if case.sp else dy)
    return {"y": y.detach(), "dx": x.grad, "dw": w.grad, "db": b.grad}


def stock(case: Case, rank: int, ranks: int) -> dict:
    x, w, b, dy = inputs(case, rank, ranks)
    y = sum_of(x @ w.t()) + b
    partial = shard(dy, 0, rank, ranks).sum((0, 1)) if case.sp else dy.sum((0, 1))  # under SP Megatron adds partial sums of tokens
    return {"stock y": y, "stock db": sum_of(partial) if case.sp else partial}


def every_case():
    _, rank, ranks = resolve()
    with poison(ranks > 1):
        return {case: {**ours(case, rank, ranks), **stock(case, rank, ranks)} for case in CASES if case.leaves % ranks == 0}


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize(("case", "p"), CASES_ON_RANKS, ids=str)
def test_same_bytes_as_one_rank(case, p):
    assert_as_alone(run(p), run(1), case, layout(case))
    if p >= 4 and case.kind in INEXACT:
        assert_twin_differs(run(p), run(1), case, "stock y")
    if p >= 4 and case.kind in INEXACT and case.sp:
        assert_twin_differs(run(p), run(1), case, "stock db")


def test_sequence_parallel_alone_changes_nothing():
    for case in CASES:
        assert_as_alone(run(1), run(1), case, layout(case))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_order_is_the_reference(dtype):
    """Not any invariant order but the contract's: the tree over K, a chain and a tree over tokens."""
    case = Case(dtype, "exponents")
    x, w, b, dy = (t.flatten(0, 1) if t.dim() == 3 else t for t in inputs(case, 0, 1))
    result = {name: t.flatten(0, 1) if t.dim() == 3 else t for name, t in run(1)[0][case].items()}
    assert_bitwise_equal(result["y"], reference.linear(x, w, b, case.tree), "y")
    assert_bitwise_equal(result["dw"], reference.linear_wgrad(dy, x, case.tree, sharded=1), "dw")
    assert_bitwise_equal(result["db"], reference.bias_grad(dy, case.tree), "db")


def test_accuracy_is_that_of_stock():
    """Against fp64: the only place with a tolerance."""
    for case in (Case("fp32"), Case("bf16")):
        x, w, b, _ = (t.double() for t in inputs(case, 0, 1))
        exact = x @ w.t() + b
        error, stock_error = ((run(4)[0][case][name].double() - exact).square().mean().sqrt() for name in ("y", "stock y"))
        assert error <= 1.1 * stock_error


def corners():
    """{corner: {name: this rank's part}}: shapes, views, frozen inputs, and groups that are not the world."""
    _, rank, ranks = resolve()
    case, tree = Case("fp32", "exponents"), ReductionTree(24)
    x, w, b, dy = inputs(case, rank, ranks)
    out = {}

    def case_of(name, *tensors, needs=(True, True, True), **options):
        out[name] = one_call(functools.partial(row_parallel_linear, tree=tree, **options), *tensors, needs=needs)

    with poison(ranks > 1):
        case_of("base", x, w, b, dy)
        case_of("no tokens", x[:0], w, b, dy[:0])
        case_of("no tokens, sequence parallel", x[:0], w, b, dy[:0], sequence_parallel=True)
        case_of("one-dimensional x", x[0, 0], w, b, dy[0, 0])
        case_of("strided views", x.transpose(0, 1).contiguous().transpose(0, 1), w.t().contiguous().t(), b, dy.expand(M, B, N))
        flat = torch.zeros(1 + w.numel())  # parameters of a flat buffer start at any address
        flat[1:] = w.flatten()
        case_of("unaligned weight", x, flat[1:].view_as(w), b, dy)
        case_of("constant dy", x, w, b, torch.ones(()).expand(M, B, N))
        case_of("frozen weight", x, w, b, dy, needs=(True, False, False))
        case_of("frozen x", x, w, b, dy, needs=(False, True, False))
        case_of("bias alone", x, w, b, dy, needs=(False, False, True))
        case_of("nothing", x, w, b, dy, needs=(False, False, False))
        with torch.autocast("cpu", torch.bfloat16):
            case_of("autocast", x, w, b, dy)
        with torch.inference_mode():
            out["inference mode"] = {"y": row_parallel_linear(x, w, b, tree=tree)}
        weight = w.clone().requires_grad_()
        twice = row_parallel_linear(x, weight, tree=tree) * 3 + row_parallel_linear(2 * x, weight, tree=tree)
        twice.backward(dy)
        out["weight used twice"] = {"y": twice.detach(), "dw": weight.grad}
        out["bias added by the caller"] = {"y": row_parallel_linear(x, w, tree=tree) + b}
    return out


@functools.cache
def run_corners(p: int):
    return run_ranks(corners, p)


@pytest.mark.parametrize("p", RANKS)
def test_corners(p):
    alone = run_corners(1)[0]
    for corner, tensors in alone.items():
        for name, expected in tensors.items():
            parts = [result[corner][name] for result in run_corners(p)]
            if corner == "no tokens, sequence parallel" and name == "y":
                assert all(part.shape == (0, B, N) for part in parts)
            elif name in ("dx", "dw"):
                assert_bitwise_equal(torch.cat(parts, -1), expected, f"{corner}: {name}")
            else:
                for part in parts:
                    assert_bitwise_equal(part, expected, f"{corner}: {name}")


def test_corners_that_change_no_bit():
    alone = run_corners(1)[0]
    for corner in ("strided views", "unaligned weight", "frozen weight", "frozen x", "bias alone", "nothing", "autocast", "inference mode"):
        for name, actual in alone[corner].items():
            assert_bitwise_equal(actual, alone["base"][name], f"{corner}: {name}")
    assert_bitwise_equal(alone["bias added by the caller"]["y"], alone["base"]["y"])
    assert_bitwise_equal(alone["one-dimensional x"]["y"], alone["base"]["y"][0, 0])
    assert not alone["no tokens"]["dw"].any() and not alone["no tokens"]["db"].any()


def groups():
    """p = 2 inside a world of four: strided subgroups, and a mesh."""
    mine = [dist.new_group([0, 2]), dist.new_group([1, 3])][dist.get_rank() % 2]
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    case, out = Case("fp32", "exponents", True), []
    for group in (mine, mesh["tp"], mesh["tp"].get_group()):
        _, rank, ranks = resolve(group)
        x, w, b, dy = inputs(case, rank, ranks)
        w.requires_grad_()
        y = row_parallel_linear(x, w, b, tree=case.tree, group=group, sequence_parallel=True)
        y.backward(shard(dy, 0, rank, ranks))
        out.append((rank, {"y": y.detach(), "dw": w.grad}))
    return out


def test_groups_that_are_not_the_world():
    case = Case("fp32", "exponents", True)
    results = run_ranks(groups, 4)
    for which, first in ((0, (0, 2)), (0, (1, 3)), (1, (0, 1)), (1, (2, 3)), (2, (2, 3))):
        members = [results[world_rank][which] for world_rank in first]
        assert [rank for rank, _ in members] == [0, 1]
        assert_as_alone([{case: tensors} for _, tensors in members], run(1), case, {"y": 0, "dw": 1})


@pytest.mark.parametrize(
    "x, weight, bias, options, message",
    [
        ((4, 20), (3, 20), None, {}, "in_features=20 has no 8 equal leaves"),
        ((4, 16), (3, 24), None, {}, "do not fit"),
        ((4, 16), (16,), None, {}, "do not fit"),
        ((4, 16), (3, 16), (16,), {}, "bias"),
        ((16,), (3, 16), None, {"sequence_parallel": True}, "sequence_parallel scatters dimension 0"),
    ],
)
def test_errors(x, weight, bias, options, message):
    with pytest.raises(ValueError, match=message):
        row_parallel_linear(
            torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), tree=ReductionTree(8), **options
        )


def test_dtypes_must_agree():
    with pytest.raises(ValueError, match="dtypes must agree"):
        row_parallel_linear(torch.zeros(4, 16), torch.zeros(3, 16, dtype=torch.bfloat16), tree=ReductionTree(8))
    with pytest.raises(ValueError, match="float64"):
        row_parallel_linear(torch.zeros(4, 16).double(), torch.zeros(3, 16).double(), tree=ReductionTree(8))


def odd_tokens():
    row_parallel_linear(torch.zeros(5, 12), torch.zeros(3, 12), tree=ReductionTree(8), sequence_parallel=True)


def odd_ranks():
    row_parallel_linear(torch.zeros(6, 8), torch.zeros(3, 8), tree=ReductionTree(8))


def test_errors_on_ranks():
    with pytest.raises(RankError, match="2 ranks must divide; pad the sequence"):
        run_ranks(odd_tokens, 2)
    with pytest.raises(RankError, match="3 ranks do not divide leaves=8"):
        run_ranks(odd_ranks, 3)
