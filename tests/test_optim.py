"""The grad norm is a correctly rounded function of an exact integer: nothing to do with order, ranks or shards."""

import functools
import math
from fractions import Fraction

import pytest
import torch
from hostile import DTYPES, RANKS, hostile, poison, same_nan, sum_of

from tpinv import clip_grad_norm_, grad_norm, optim
from tpinv.collectives import Ranks, resolve
from tpinv.reference import squares
from tpinv.sharding import shard
from tpinv.state_dict import ShardedModule
from tpinv.testing import assert_bitwise_equal, compare, run_ranks

KINDS = ("normal", "exponents", "cancellation", "specials")


def exact_square_sum(*tensors: torch.Tensor) -> Fraction:
    return sum((Fraction(v) ** 2 for t in tensors for v in t.double().flatten().tolist()), Fraction(0))


def limbs_of(*tensors: torch.Tensor) -> torch.Tensor:
    limbs = squares.counters(torch.device("cpu"))
    for t in tensors:
        squares.add_squares(limbs, t)
    return limbs


def value(limbs: torch.Tensor) -> Fraction:
    return sum(
        (n * Fraction(2) ** (squares.LOWEST_EXPONENT + squares.LIMB_BITS * i) for i, n in enumerate(limbs[: squares.LIMBS].tolist())),
        Fraction(0),
    )


EXTREMES = [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38, -3.4028234663852886e38, 1.1754942e-38, 1.0, 1 + 2.0**-23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_squares_is_exact(kind, dtype):
    x = hostile(kind, (50, 21), torch.float32, seed=5).clamp(-6e4, 6e4).to(dtype)
    assert value(limbs_of(x)) == exact_square_sum(x)


def test_the_ends_of_the_range_are_exact():
    x = torch.tensor(EXTREMES)
    assert value(limbs_of(x)) == exact_square_sum(x)
    assert value(limbs_of(*[x] * 1000)) == 1000 * exact_square_sum(x)
    for one in x:
        assert_bitwise_equal(optim.norm_of([one]), one.abs())


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_the_rounded_square_root(kind):
    x = hostile(kind, (1000,), torch.float32, seed=6)
    exact = exact_square_sum(x)
    scale = 4**200  # isqrt wants an integer
    root = Fraction(math.isqrt(math.floor(exact * scale)), 2**200)
    assert optim.norm_of([x]).item() == torch.tensor(float(root), dtype=torch.float64).float().item()


def test_order_and_cuts_do_not_matter(monkeypatch):
    x = hostile("normal", (5000,), torch.float32, seed=7)
    expected = limbs_of(x)
    assert_bitwise_equal(limbs_of(x.flip(0)), expected)
    assert_bitwise_equal(limbs_of(*x.split(7)), expected)
    assert_bitwise_equal(limbs_of(x.view(50, 100).t()), expected)
    norm = optim.norm_of([x])
    monkeypatch.setattr(squares, "PIECE", 13)
    assert_bitwise_equal(optim.norm_of([x]), norm)
    stock = torch.stack([piece.norm() for piece in x.split(7)]).norm()
    assert compare(stock, x.norm()), "torch's norm notices, so the input can tell"


class Parts(ShardedModule, torch.nn.Module):
    """Two sharded weights, a replicated one, one without gradient; the gradients are hostile."""

    shards = {"rows": 0, "columns": 1, "whole": None, "idle": None}

    def __init__(self, dtype: torch.dtype, kind: str, ranks: Ranks):
        super().__init__()
        self.ranks = ranks
        for i, ((name, dim), shape) in enumerate(zip(self.shards.items(), [(48, 10), (10, 48), (30,), (24,)], strict=True)):
            grad = hostile(kind, shape, dtype, seed=10 + i)
            grad = grad.clone() if dim is None else shard(grad, dim, ranks.rank, ranks.size)
            parameter = torch.nn.Parameter(torch.zeros_like(grad))
            parameter.grad = None if name == "idle" else grad
            self.register_parameter(name, parameter)

    def grads(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]


def every_case():
    ranks = resolve()
    results = {}
    with poison(ranks.size > 1):
        for name, dtype in DTYPES.items():
            for kind in (*KINDS, "nonfinite"):
                ours, clipped = (Parts(dtype, kind, ranks) for _ in range(2))
                result = {"norm": grad_norm(iter(ours.parameters())), "inf norm": grad_norm(ours, norm_type=float("inf"))}
                result["before clipping"] = clip_grad_norm_(clipped.parameters(), 0.37)
                result["clipped"] = clipped.grads()
                squares = torch.stack([grad.float().square().sum() for grad in ours.grads()[: 3 if ranks.rank == 0 else 2]]).sum()
                result["stock"] = (sum_of(squares) if ranks.size > 1 else squares).sqrt()
                results[name, kind] = result
    return results


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("kind", (*KINDS, "nonfinite"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_as_one_rank(dtype, kind, p):
    results, alone = [r[dtype, kind] for r in run(p)], run(1)[0][dtype, kind]
    for result in results:
        for name in ("norm", "inf norm", "before clipping"):
            assert_bitwise_equal(same_nan(result[name]), same_nan(alone[name]), name)
    for i, dim in enumerate((0, 1, None)):
        parts = [result["clipped"][i] for result in results]
        for actual in [torch.cat(parts, dim)] if dim is not None else parts:
            assert_bitwise_equal(same_nan(actual), same_nan(alone["clipped"][i]), f"clipped {i}")


@pytest.mark.parametrize("p", [4, 6, 8])
def test_stock_norm_depends_on_the_number_of_ranks(p):
    differing = [kind for kind in KINDS if compare(run(p)[0]["fp32", kind]["stock"], run(1)[0]["fp32", kind]["stock"])]
    assert differing


def test_replicated_parameters_count_once():
    for kind in KINDS:
        grads = Parts(torch.float32, kind, Ranks(None, 0, 1)).grads()
        assert_bitwise_equal(run(4)[2]["fp32", kind]["norm"], optim.norm_of(grads))
        assert_bitwise_equal(run(4)[2]["fp32", kind]["inf norm"], torch.cat([g.flatten() for g in grads]).abs().amax())


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize(
    "values, expected",
    [([1, math.inf], math.inf), ([-math.inf, 2], math.inf), ([math.inf, math.nan], math.nan), ([math.nan], math.nan), ([], 0.0)],
)
def test_not_finite(values, expected, norm_type):
    p = torch.nn.Parameter(torch.zeros(len(values)))
    p.grad = torch.tensor(values, dtype=torch.float32)
    norm = grad_norm(p, norm_type=norm_type).item()
    assert norm == expected or (math.isnan(norm) and math.isnan(expected))


def test_no_gradients_at_all():
    assert grad_norm([]).item() == 0.0
    assert clip_grad_norm_([torch.nn.Parameter(torch.zeros(3))], 1.0).item() == 0.0


def test_clipping_follows_torch():
    for max_norm in (1e-3, 1.0, 1e6):
        ours, stock = (torch.nn.Parameter(torch.zeros(1000)) for _ in range(2))
        ours.grad, stock.grad = (hostile("normal", (1000,), torch.float32, seed=8) for _ in range(2))
        norm, stock_norm = clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(stock, max_norm)
        torch.testing.assert_close(norm, stock_norm)
        torch.testing.assert_close(ours.grad, stock.grad)


def test_errors():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad[0] == 1.0
    with pytest.raises(ValueError, match="max_norm=0.0 must be above 0"):
        clip_grad_norm_(p, 0.0)
    with pytest.raises(ValueError, match="norm_type=1.0 must be 2.0 or inf"):
        grad_norm(p, norm_type=1.0)
    with pytest.raises(ValueError, match="float64"):
        optim.norm_of([torch.zeros(2, dtype=torch.float64)])
