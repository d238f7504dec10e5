"""Cross-entropy over a sharded vocabulary: the denominator is a tree over the vocabulary, maximum and target logit are exact."""

import functools

import pytest
import torch
from hostile import DTYPES, RANKS, assert_as_alone, assert_twin_differs, hostile, join, poison, same_nan, sum_of

from tpinv import ReductionTree, vocab_parallel_cross_entropy, vocab_parallel_log_probs
from tpinv.collectives import all_max, resolve
from tpinv.layers import shard
from tpinv.reference import log_sum_exp
from tpinv.testing import assert_bitwise_equal, run_ranks

M, B, V = 12, 2, 240
IGNORED = -100


class Case(tuple):
    """(dtype, kind, smoothing, leaves)"""

    def __str__(self) -> str:
        return "-".join(map(str, self))

    def _replace(self, **_) -> "Case":  # there is no SP here: the logits of all tokens are on every rank
        return self


KINDS = ("normal", "spread", "masked", "specials", "nonfinite")
CASES = [
    *(Case((dtype, kind, smoothing, 24)) for dtype in DTYPES for kind in KINDS for smoothing in (0.0, 0.1)),
    *(Case(("fp32", "spread", 0.1, leaves)) for leaves in RANKS),
]
LAYOUT = {"loss": None, "dx": 2, "log_probs": None}


def inputs(case: Case):
    """spread: logits over +-40; masked: a third of the vocabulary is -inf (padding), never the target."""
    dtype, kind, _, _ = case
    logits = hostile(kind if kind in ("specials", "nonfinite") else "normal", (M, B, V), torch.float32, seed=1)
    target = torch.randint(0, V, (M, B), generator=torch.Generator().manual_seed(2))
    if kind == "spread":
        logits *= 20
    if kind == "masked":
        target = target // 3 * 3
        logits[..., 1::3] = -float("inf")
    target[3, 1] = target[5, 0] = IGNORED
    return logits.to(DTYPES[dtype]), target, hostile("exponents", (M, B), torch.float32, seed=3)


def ours(case: Case, rank: int, ranks: int) -> dict:
    _, _, smoothing, leaves = case
    logits, target, dloss = inputs(case)
    x, tree = shard(logits, 2, rank, ranks).clone().requires_grad_(), ReductionTree(leaves)
    before = x.detach().clone()
    loss = vocab_parallel_cross_entropy(x, target, tree=tree, label_smoothing=smoothing)
    loss.backward(dloss)
    assert_bitwise_equal(x, before, "the logits are not modified")
    return {"loss": loss.detach(), "dx": x.grad, "log_probs": vocab_parallel_log_probs(x.detach(), target, tree=tree)}


def stock(case: Case, rank: int, ranks: int) -> dict:
    """Megatron's denominator: a local torch.sum, added by gloo."""
    logits, _, _ = inputs(case)
    x = shard(logits, 2, rank, ranks).float()
    top = all_max(x.amax(-1), resolve())
    total = (x - top.unsqueeze(-1)).exp().sum(-1)
    return {"stock lse": (sum_of(total) if ranks > 1 else total).log()}


def every_case():
    _, rank, ranks = resolve()
    with poison(ranks > 1):
        return {case: {**ours(case, rank, ranks), **stock(case, rank, ranks)} for case in CASES if case[3] % ranks == 0}


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize(("case", "p"), [(c, p) for c in CASES for p in RANKS if c[3] % p == 0], ids=str)
def test_same_bytes_as_one_rank(case, p):
    assert_as_alone(run(p), run(1), case, LAYOUT)
    if p >= 4 and case[1] == "normal":
        assert_twin_differs(run(p), run(1), case, "stock lse")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["normal", "spread"])
def test_torch_agrees(kind, smoothing):
    """Against fp64, with torch.nn.functional's definition. Megatron's smoothing s gives every class s / (V - 1) and the target
    1 - s: torch's label_smoothing = s V / (V - 1)."""
    case = Case(("fp32", kind, smoothing, 24))
    logits, target, dloss = inputs(case)

    def torch_loss(dtype):
        x = logits.to(dtype).requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            x.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=smoothing * V / (V - 1), ignore_index=IGNORED
        ).view(M, B)
        loss.backward(dloss.to(dtype))
        return loss.detach().double(), x.grad.double()

    exact, stock_error = torch_loss(torch.float64), torch_loss(torch.float32)
    for actual, right, stock in zip((run(4)[0][case]["loss"], join(run(4), case, "dx", 2)[0]), exact, stock_error, strict=True):
        assert (actual - right).abs().max() <= 2 * (stock - right).abs().max() + 1e-7 * right.abs().max()


def test_ignored_tokens():
    for case in CASES:
        result = run(1)[0][case]
        for name in ("loss", "dx", "log_probs"):
            assert not result[name][3, 1].any() and not result[name][5, 0].any()


def test_nan_and_inf_reach_loss_and_gradient_of_their_token_alone():
    case = Case(("fp32", "nonfinite", 0.0, 24))
    logits, target, _ = inputs(case)
    bad = (logits.isnan() | (logits == float("inf"))).any(-1) & (target != IGNORED)
    assert bad.any()
    result = run(8)[0][case]
    assert_bitwise_equal(result["loss"].isnan(), bad)
    assert_bitwise_equal(result["dx"].isnan().any(-1), bad)


def test_log_probs_is_the_negative_loss_and_log_sum_exp_its_reference():
    case = Case(("fp32", "normal", 0.0, 24))
    result, (logits, target, _) = run(1)[0][case], inputs(case)
    assert_bitwise_equal(same_nan(result["log_probs"]), -result["loss"])
    by_hand = log_sum_exp(logits, ReductionTree(24)) - logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert ((by_hand - result["loss"]).abs() * (target >= 0)).max() < 1e-5


def corners():
    _, rank, ranks = resolve()
    tree, out = ReductionTree(24), {}
    logits, target, dloss = inputs(Case(("bf16", "spread", 0.0, 24)))

    def case_of(name, logits, target, dloss, **options):
        x = shard(logits, -1, rank, ranks).detach().requires_grad_()
        loss = vocab_parallel_cross_entropy(x, target, tree=tree, **options)
        loss.backward(dloss)
        out[name] = {"loss": loss.detach(), "dx": x.grad}

    with poison(ranks > 1):
        case_of("base", logits, target, dloss)
        case_of("no tokens", logits[:0], target[:0], dloss[:0], label_smoothing=0.1)
        case_of("one token", logits[0, 0], target[0, 0], dloss[0, 0])
        case_of("int32 target", logits, target.int(), dloss)
        case_of("strided", logits.transpose(0, 1).contiguous().transpose(0, 1), target.t().contiguous().t(), dloss.t().contiguous().t())
        case_of("constant dloss", logits, target, torch.ones(()).expand(M, B))
        case_of("another ignore_index", logits, target.masked_fill(target == IGNORED, 7), dloss, ignore_index=7)
        case_of("zeros of both signs", torch.zeros(4, V).index_fill_(1, torch.arange(0, V, 7), -0.0), torch.arange(4) * 31, torch.ones(4))
        case_of("fewer classes than leaves", torch.eye(24)[:5, :24] * 9, torch.arange(5), torch.ones(5))
        with torch.autocast("cpu", torch.bfloat16):
            case_of("autocast", logits, target, dloss)
    return out


@pytest.mark.parametrize("p", RANKS)
def test_corners(p):
    results, alone = run_ranks(corners, p), run_ranks(corners, 1)[0]
    for corner, tensors in alone.items():
        for name, expected in tensors.items():
            for actual in join(results, corner, name, -1 if name == "dx" else None):
                assert_bitwise_equal(actual, expected, f"{corner}: {name}")
    for corner in ("int32 target", "strided", "autocast"):
        for name, actual in alone[corner].items():
            assert_bitwise_equal(actual, alone["base"][name], f"{corner}: {name}")
    assert_bitwise_equal(alone["one token"]["loss"], alone["base"]["loss"][0, 0])


@pytest.mark.parametrize(
    "logits, target, options, message",
    [
        ((2, 3, 8), (3, 2), {}, "must be the shape of target"),
        ((2, 8), (2,), {"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
        ((2, 1), (2,), {"label_smoothing": 0.1}, "over a vocabulary of at least 2"),
        ((2, 1), (2,), {"ignore_index": 3}, r"target must be in \[0, 1\), the global vocabulary; got 1"),
    ],
)
def test_errors(logits, target, options, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(torch.zeros(logits), torch.ones(target, dtype=torch.int64), tree=ReductionTree(8), **options)
