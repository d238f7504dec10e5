"""RMSNorm and LayerNorm: rows are local; the parameters' gradients sum over rows, which SP (tokens) and q/k norms (heads) share."""

import functools

import pytest
import torch
from hostile import DTYPES, INEXACT, KINDS, RANKS, Case, assert_as_alone, assert_twin_differs, join, one_call, poison, sum_of

from tpinv import ReductionTree, layer_norm, rms_norm
from tpinv.collectives import resolve
from tpinv.layers import shard
from tpinv.testing import assert_bitwise_equal, run_ranks

M, B, HEADS, H = 24, 2, 24, 18
SHARDED = {"whole": None, "tokens": 0, "heads": 2}  # which dimension of x [M, B, HEADS, H] the ranks share
CASES = [
    *(Case(dtype, kind) for dtype in DTYPES for kind in KINDS),
    Case("fp32", "exponents", node_dtype="bfloat16"),
    *(Case("fp32", "exponents", leaves=leaves) for leaves in RANKS),
]


def apply(norm: str, case: Case, rows: str, x, w, b):
    flags = {"sequence_parallel": rows == "tokens", "heads_parallel": rows == "heads"}
    if norm == "rms":
        return rms_norm(x, w, tree=case.tree, **flags)
    return layer_norm(x, w, b, tree=case.tree, **flags)


def inputs(case: Case):
    return (case.make("x", M, B, HEADS, H), case.make("w", H), case.make("b", H), case.make("dy", M, B, HEADS, H))


def ours(case: Case, norm: str, rows: str, rank: int, ranks: int) -> dict:
    x, w, b, dy = inputs(case)
    if SHARDED[rows] is not None:
        x, dy = (shard(t, SHARDED[rows], rank, ranks) for t in (x, dy))
    x, w, b = (t.clone().requires_grad_() for t in (x, w, b))
    y = apply(norm, case, rows, x, w, b)
    y.backward(dy)
    grads = {"dx": x.grad, "dw": w.grad} | ({"db": b.grad} if norm == "layer" else {})
    return {f"{norm} {rows} {name}": t for name, t in ({"y": y.detach()} | grads).items()}


def stock(case: Case, rank: int, ranks: int) -> dict:
    """Partial sums over this rank's tokens in fp32, added by gloo, rounded once: what Megatron does when main grads are fp32."""
    x, w, _, dy = (shard(t, 0, rank, ranks) if t.dim() > 1 else t for t in inputs(case))
    w = w.float().requires_grad_()
    torch.nn.functional.rms_norm(x.float(), (H,), w, 1e-5).backward(dy.float())
    return {"stock dw": sum_of(w.grad) if ranks > 1 else w.grad}


def every_case():
    _, rank, ranks = resolve()
    results = {}
    with poison(ranks > 1):
        for case in (c for c in CASES if c.leaves % ranks == 0):
            results[case] = stock(case, rank, ranks)
            for norm in ("rms", "layer"):
                for rows in SHARDED:
                    results[case] |= ours(case, norm, rows, rank, ranks)
    return results


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize("rows", SHARDED)
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("case", "p"), [(c, p) for c in CASES for p in RANKS if c.leaves % p == 0], ids=str)
def test_same_bytes_as_one_rank(case, p, norm, rows):
    dims = {"y": SHARDED[rows], "dx": SHARDED[rows], "dw": None} | ({"db": None} if norm == "layer" else {})
    assert_as_alone(run(p), run(1), case, {f"{norm} {rows} {name}": dim for name, dim in dims.items()})
    if p >= 4 and case.kind in INEXACT:
        assert_twin_differs(run(p), run(1), case, "stock dw")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sequence_parallel_alone_changes_nothing(case):
    alone = run(1)[0][case]
    for name in ("rms {} dw", "layer {} dw", "layer {} db", "rms {} y"):
        assert_bitwise_equal(alone[name.format("tokens")], alone[name.format("whole")])


def test_rows_do_not_see_each_other():
    case = Case("fp32", "exponents")
    x, w, b, _ = inputs(case)
    for norm in ("rms", "layer"):
        whole = apply(norm, case, "whole", x, w, b)
        for i in range(M):
            assert_bitwise_equal(apply(norm, case, "whole", x[i, 0, 1], w, b), whole[i, 0, 1])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_accuracy_is_that_of_stock(norm):
    """Against fp64: the only place with a tolerance."""

    def stock_norm(x, w, b):
        f = torch.nn.functional
        return f.rms_norm(x, (H,), w, 1e-5) if norm == "rms" else f.layer_norm(x, (H,), w, b, 1e-5)

    case = Case("fp32")
    *tensors, dy = inputs(case)
    runs = []
    for dtype, f in ((torch.float64, stock_norm), (torch.float32, lambda *t: apply(norm, case, "whole", *t)), (torch.float32, stock_norm)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        y = f(*leaves)
        y.backward(dy.to(dtype))
        runs.append([y.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for exact, actual, reference in zip(*runs, strict=True):
        error, stock_error = ((t.double() - exact).square().mean().sqrt() for t in (actual, reference))
        assert error <= 1.5 * stock_error


def corners():
    _, rank, ranks = resolve()
    tree, case = ReductionTree(24), Case("bf16", "exponents")
    x, w, b, dy = inputs(case)
    x, dy = shard(x, 0, rank, ranks), shard(dy, 0, rank, ranks)
    out = {}

    def case_of(name, *tensors, needs=(True, True, True)):
        out[name] = one_call(functools.partial(layer_norm, tree=tree, sequence_parallel=True), *tensors, needs=needs)

    with poison(ranks > 1):
        case_of("base", x, w, b, dy)
        case_of("no tokens", x[:0], w, b, dy[:0])
        case_of("fp32 parameters", x, w.float(), b.float(), dy)
        case_of("strided", x.transpose(0, 2).contiguous().transpose(0, 2), w, b, dy.transpose(1, 3).contiguous().transpose(1, 3))
        case_of("constant dy", x, w, b, torch.ones((), dtype=dy.dtype).expand_as(dy))
        case_of("frozen weight", x, w, b, dy, needs=(True, False, True))
        case_of("frozen parameters", x, w, b, dy, needs=(True, False, False))
        case_of("frozen x", x, w, b, dy, needs=(False, True, False))
        case_of("fewer tokens than leaves", x[:1], w, b, dy[:1])
    return out


@pytest.mark.parametrize("p", RANKS)
def test_corners(p):
    results, alone = run_ranks(corners, p), run_ranks(corners, 1)[0]
    for corner, tensors in alone.items():
        if corner != "fewer tokens than leaves":  # one per rank: not the same tokens at another p
            for name, expected in tensors.items():
                for actual in join(results, corner, name, 0 if name in ("y", "dx") else None):
                    assert_bitwise_equal(actual, expected, f"{corner}: {name}")
    for corner in ("strided", "frozen weight", "frozen parameters", "frozen x"):
        for name, actual in alone[corner].items():
            assert_bitwise_equal(actual, alone["base"][name], f"{corner}: {name}")
    assert not alone["no tokens"]["dw"].any() and not alone["no tokens"]["db"].any()


@pytest.mark.parametrize(
    "x, options, message",
    [
        ((4, 7), {}, "must end in the length of weight"),
        ((4, 8), {"sequence_parallel": True, "heads_parallel": True}, "set one of"),
        ((8,), {"heads_parallel": True}, "heads_parallel needs x"),
        ((8,), {"sequence_parallel": True}, "sequence_parallel needs x"),
    ],
)
def test_errors(x, options, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.zeros(x), torch.ones(8), tree=ReductionTree(8), **options)
