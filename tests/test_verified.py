"""Verified decoding: what is committed has the bytes of plain invariant decoding, whatever drafted it."""

import random

import pytest
import torch

from tests.verified_jobs import VOCABULARY, decode
from tpinv import ReductionTree, inference
from tpinv.inference import verified
from tpinv.inference.verified import Request
from tpinv.testing import RankPool

DTYPES = [torch.bfloat16, torch.float32]


def specs(count: int = 5, limit: int = 24) -> list[dict]:
    draw = random.Random(1)
    sampling = [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "seed": 8, "top_k": 12, "top_p": 0.9}]
    found = []
    for i in range(count):
        prompt = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 40)))
        found.append({"prompt": prompt, "limit": draw.randint(limit // 2, limit)} | sampling[i % 3])
    return found


@pytest.fixture(scope="module")
def plain():
    """Every request alone, a token at a time, in one process."""
    return {dtype: decode(specs(), dtype, window=0, share=0.0, alone=True)[0] for dtype in DTYPES}


@pytest.mark.parametrize(
    ("dtype", "window", "share"), [(DTYPES[i % 2], *case) for i, case in enumerate([(8, 0.0), (5, 0.1), (16, 0.5), (3, 1.0), (64, 0.1)])]
)
def test_the_bytes_of_plain_decoding(plain, dtype, window, share):
    found, counts = decode(specs(), dtype, window, share)
    assert found == plain[dtype]
    assert counts["recomputed"] == counts["drafted"] - counts["accepted"]
    if share == 1.0:
        assert not counts["accepted"] or dtype == torch.bfloat16  # a spoiled token may be the target's where the draft had erred itself
        assert counts["passes"] >= max(spec["limit"] for spec in specs()) - 3  # one token a pass, as in plain decoding
    else:
        assert counts["accepted"] > (50 if share < 0.5 else 10)
        assert counts["passes"] < max(spec["limit"] for spec in specs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_the_targets_keys_and_values_it_is_something_else(plain, dtype):
    """The twin: every token is checked, but what the draft has written stays."""
    found, _ = decode(specs(), dtype, window=8, share=0.0, writes=False)
    assert all(a[2] != b[2] for a, b in zip(found, plain[dtype], strict=True))
    assert any(a[1] != b[1] for a, b in zip(found, plain[dtype], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_drafts(plain, dtype):
    assert decode(specs(), dtype, window=7, share=0.0, fixed=True)[0] == plain[dtype]


def test_on_four_ranks(plain):
    with RankPool() as pool:
        for found, _ in pool.run(decode, 4, specs(), torch.bfloat16, 8, 0.1, timeout=120):
            assert found == plain[torch.bfloat16]
        unverified = [spec | {"deterministic": False} for spec in specs()]
        four = pool.run(decode, 4, unverified, torch.bfloat16, 8, 0.0, timeout=120)[0][0]
    assert any(a[1] != b[1] for a, b in zip(four, plain[torch.bfloat16], strict=True))  # the stock draft itself


def test_requests_that_are_not_deterministic_stand_between_others(plain):
    mixed = [spec | {"deterministic": i % 2 == 0} for i, spec in enumerate(specs())]
    found, counts = decode(mixed, torch.bfloat16, window=8, share=0.1)
    assert found[::2] == plain[torch.bfloat16][::2]
    assert all(a[:2] != b[:2] for a, b in zip(found[1::2], plain[torch.bfloat16][1::2], strict=True))
    assert counts["unverified"] == sum(len(tokens) - 1 for tokens, *_ in found[1::2])


# -- the protocol, on a target that counts -------------------------------------------------------------------------------------------


def rule(context) -> int:
    """The next token of a sequence, as good as any."""
    return (31 * context[-1] + 7 * len(context)) % 50


def target(windows):
    answers = []
    for window in windows:
        sequence = [*window.request.context, *window.drafts]
        first = len(window.request.context)
        tokens = [rule(sequence[:i]) for i in range(first, len(sequence) + 1)]
        answers.append((tokens, [-float(t) for t in tokens]))
    return answers


def oracle(requests, counts):
    found = []
    for request, count in zip(requests, counts, strict=True):
        sequence = list(request.context)
        for _ in range(count):
            sequence.append(rule(sequence))
        tokens = sequence[len(request.context) :]
        found.append((tokens, [-float(t) for t in tokens]))
    return found


def answer(**given) -> Request:
    request = Request(prompt=(3, 4), **({"limit": 30} | given))
    verified.decode([request], None, target)
    return request


@pytest.mark.parametrize("window", [1, 2, 7, 8, 31, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_stops_are_checked_on_what_is_committed(window, share):
    """Single tokens, sequences across windows, and a stop among drafts that are dropped."""
    whole = answer().tokens
    for stop in ((), ((whole[11],),), ((whole[7], whole[8], whole[9]),), ((whole[5], 999),), ((999,), (whole[0],))):
        expected, found = answer(stop=stop), Request((3, 4), 30, stop)
        told = []
        counts = verified.decode(
            [found], verified.spoil(oracle, share, 50), target, window=window, committed=lambda r, n, told=told: told.extend(r.tokens[-n:])
        )
        assert (found.tokens, found.log_probs, found.finished) == (expected.tokens, expected.log_probs, expected.finished)
        assert told == found.tokens
        assert counts.drafted == counts.accepted + counts.recomputed
    assert answer(stop=((whole[0],),)).finished == "stop" and len(answer(stop=((whole[0],),)).tokens) == 1


def test_a_wrong_stop_in_the_draft_ends_nothing():
    whole = answer().tokens
    eager = lambda requests, counts: [([1][:count], [0.0][:count]) for count in counts]  # noqa: E731
    assert 1 not in whole
    found = Request((3, 4), 30, ((1,),))
    verified.decode([found], eager, target, window=8)
    assert found.tokens == whole and found.finished == "length"


def test_right_drafts_take_few_passes_and_wrong_ones_no_more_than_plain_decoding():
    right, wrong, plain = Request((3, 4), 33), Request((3, 4), 33), Request((3, 4), 33)
    few = verified.decode([right], oracle, target, window=7)
    many = verified.decode([wrong], verified.spoil(oracle, 1.0, 50), target, window=7)
    every = verified.decode([plain], None, target)
    assert few.passes == 5 and few.recomputed == 0 and few.accepted == 28
    assert many.passes == every.passes == 33 and many.accepted == 0
    assert right.tokens == wrong.tokens == plain.tokens


def test_a_limit_of_one_needs_no_draft():
    request = Request((3, 4), 1)
    verified.decode([request], lambda *_: pytest.fail("drafted"), target)
    assert len(request.tokens) == 1 and request.finished == "length"


def test_what_is_finished_stays():
    request = answer()
    before = list(request.tokens)
    assert verified.decode([request], oracle, target).passes == 0 and request.tokens == before


def test_count_equal():
    own = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 9], [5, 6, 7, 9], [1, 1, 1, 1]])
    drafts = torch.tensor([[1, 2, 3], [1, 0, 3], [5, 6, 7], [1, 1, 1]])
    assert inference.count_equal(own, drafts, torch.tensor([3, 3, 2, 0])).tolist() == [3, 1, 2, 0]
    assert inference.count_equal(own[:, :1], drafts[:, :0], torch.zeros(4, dtype=torch.int64)).tolist() == [0, 0, 0, 0]


def test_own_tokens_are_what_the_sampler_draws():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    tree = ReductionTree(8)
    request = Request((1,), 9, temperature=0.7, seed=3, top_k=10, top_p=0.8)
    tokens, log_probs = verified.own_tokens(logits, request, 17, tree)
    kept = inference.keep_top(logits.float() / 0.7, torch.full((5,), 10), torch.full((5,), 0.8))
    assert tokens == inference.sample(kept, [3] * 5, [17, 18, 19, 20, 21]).tolist()
    assert log_probs == [inference.log_softmax(logits, tree)[i, token].item() for i, token in enumerate(tokens)]
    assert verified.own_tokens(logits[2:3], request, 19, tree) == ([tokens[2]], [log_probs[2]])
    assert verified.own_tokens(logits, Request((1,), 9), 17, tree)[0] == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: Request((), 3), "at least one token"),
        (lambda: Request((1,), 0), "limit=0"),
        (lambda: Request((1,), 3, ((),)), "at least one token"),
        (lambda: Request((1,), 3, temperature=-1.0), "temperature=-1.0"),
        (lambda: Request((1,), 3, top_p=0.0), "top_p=0.0"),
        (lambda: verified.decode([], None, target, window=-1), "window=-1"),
        (lambda: verified.decode([Request((1,), 3)], lambda r, c: [], target), "0 of 1 requests"),
        (lambda: verified.decode([Request((1,), 3)], lambda r, c: [([1] * 9, ())], target), "9 tokens where 1"),
        (lambda: verified.decode([Request((1,), 9, deterministic=False)], None, target), "not deterministic"),
        (lambda: verified.decode([Request((1,), 9, deterministic=False)], lambda r, c: [([1], [])], target), "not deterministic"),
        (lambda: verified.decode([Request((1,), 9)], None, lambda w: []), "0 of 1 windows"),
        (lambda: verified.decode([Request((1,), 9)], None, lambda w: [((), ())]), "0 tokens and 0 log-prob"),
        (lambda: verified.decode([Request((1,), 9)], oracle, lambda w: [(t[:1], p[:1]) for t, p in target(w)]), "1 tokens and 1"),
    ],
)
def test_errors(change, match):
    with pytest.raises(ValueError, match=match):
        change()
