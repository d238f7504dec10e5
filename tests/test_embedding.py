"""Vocabulary-parallel embedding: the forward selects bits, the backward adds each row's tokens in token order."""

import functools

import pytest
import torch
from hostile import DTYPES, KINDS, RANKS, Case, assert_as_alone, assert_twin_differs, join, poison, sum_of

from tpinv import vocab_parallel_embedding
from tpinv.collectives import resolve
from tpinv.layers import shard
from tpinv.reference import embedding
from tpinv.testing import RankError, assert_bitwise_equal, run_ranks

V, H, M, B = 48, 5, 24, 3
CASES = [Case(dtype, kind, sp) for dtype in DTYPES for kind in KINDS for sp in (False, True)]


def layout(case: Case) -> dict:
    return {"y": 0 if case.sp else None, "dw": 0}


def ids() -> torch.Tensor:
    """Most ids occur several times, some never; row 0, which a rank's foreign ids alias to in stock layers, is among them."""
    return torch.randint(0, V - 4, (M, B), generator=torch.Generator().manual_seed(3))


def ours(case: Case, rank: int, ranks: int) -> dict:
    weight = shard(case.make("w", V, H), 0, rank, ranks).requires_grad_()
    dy = case.make("dy", M, B, H)
    y = vocab_parallel_embedding(ids(), weight, sequence_parallel=case.sp)
    y.backward(shard(dy, 0, rank, ranks) if case.sp else dy)
    return {"y": y.detach(), "dw": weight.grad}


def stock(case: Case, rank: int, ranks: int) -> dict:
    """Megatron's: look up, zero what another rank owns, add all ranks. 0 + -0 is +0, and NaN payloads may change too."""
    weight = shard(case.make("w", V, H), 0, rank, ranks)
    local = ids() - rank * len(weight)
    foreign = (local < 0) | (local >= len(weight))
    y = weight[local.masked_fill(foreign, 0)].masked_fill(foreign.unsqueeze(-1), 0.0)
    return {"stock y": sum_of(y) if ranks > 1 else y}


def every_case():
    _, rank, ranks = resolve()
    with poison(ranks > 1):
        return {case: {**ours(case, rank, ranks), **stock(case, rank, ranks)} for case in CASES}


@functools.cache
def run(p: int):
    return run_ranks(every_case, p)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bytes_as_one_rank(case, p):
    assert_as_alone(run(p), run(1), case, layout(case))
    if case.kind == "specials":
        assert_twin_differs(run(p), run(1), case, "stock y")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_row_itself(case):
    """Not even a NaN changes its bits."""
    for actual in join(run(4), case, "y", layout(case)["y"]):
        assert_bitwise_equal(actual, case.make("w", V, H)[ids()])


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_backward_is_a_chain_in_token_order(dtype):
    case = Case("fp32", "exponents")
    tokens, dy = ids().flatten(), case.make("dy", M * B, H).to(dtype)
    expected = torch.zeros(V, H)
    for token, row in zip(tokens.tolist(), dy, strict=True):
        expected[token] += row.float()
    assert_bitwise_equal(embedding.sum_by_id(tokens, dy, V, torch.float32), expected)


def test_reversing_the_tokens_shows():
    """Which proves that the inputs above can tell one order from another."""
    tokens, dy = ids().flatten(), Case("fp32", "exponents").make("dy", M * B, H)
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(
            embedding.sum_by_id(tokens.flip(0), dy.flip(0), V, torch.float32), embedding.sum_by_id(tokens, dy, V, torch.float32)
        )


def test_backward_against_fp64():
    tokens, dy = ids().flatten(), Case("fp32").make("dy", M * B, H)
    exact = torch.zeros(V, H, dtype=torch.float64).index_add_(0, tokens, dy.double())
    stock = torch.zeros(V, H).index_add_(0, tokens, dy)
    assert (embedding.sum_by_id(tokens, dy, V, torch.float32) - exact).abs().max() <= 1.1 * (stock - exact).abs().max() + 1e-12


def corners():
    _, rank, ranks = resolve()
    weight = shard(Case("bf16", "specials").make("w", V, H), 0, rank, ranks)
    out = {}

    def case_of(name, tokens, **options):
        w = weight.clone().requires_grad_()
        y = vocab_parallel_embedding(tokens, w, **options)
        (y * 3).sum().backward()  # an expanded dy
        out[name] = {"y": y.detach(), "dw": w.grad}

    with poison(ranks > 1):
        case_of("no tokens", torch.zeros(0, 2, dtype=torch.int64))
        case_of("no tokens, sequence parallel", torch.zeros(0, 2, dtype=torch.int64), sequence_parallel=True)
        case_of("scalar", torch.tensor(V - 1))
        for dtype in (torch.int32, torch.int16, torch.uint8):
            case_of(str(dtype), ids().to(dtype))
        case_of("strided", ids().t().contiguous().t())
        case_of("one id", torch.full((300,), 7))
        with torch.no_grad():
            out["frozen"] = {"y": vocab_parallel_embedding(ids(), weight)}
    return out


@pytest.mark.parametrize("p", RANKS)
def test_corners(p):
    results, alone = run_ranks(corners, p), run_ranks(corners, 1)[0]
    for corner, tensors in alone.items():
        for name, expected in tensors.items():
            for actual in join(results, corner, name, 0 if name == "dw" else None):
                assert_bitwise_equal(actual, expected, f"{corner}: {name}")
    assert_bitwise_equal(alone["torch.uint8"]["dw"], alone["strided"]["dw"])
    assert alone["one id"]["dw"][7].tolist() == [900.0] * H and not alone["one id"]["dw"][8:].any()


def odd_tokens():
    vocab_parallel_embedding(torch.zeros(5, dtype=torch.int64), torch.zeros(4, 3), sequence_parallel=True)


def test_errors():
    weight = torch.zeros(8, 3)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 8\), the global vocabulary; got 8 and 1 others"):
        vocab_parallel_embedding(torch.tensor([1, 8, -1]), weight)
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="ids must be integers"):
            vocab_parallel_embedding(wrong, weight)
    with pytest.raises(ValueError, match=r"must be \[V/p, H\]"):
        vocab_parallel_embedding(torch.tensor([1]), torch.zeros(8))
    with pytest.raises(RankError, match="which 2 ranks must divide"):
        run_ranks(odd_tokens, 2)
