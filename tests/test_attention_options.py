"""Sliding windows, capped scores and sinks on a CPU: right, and with all that attention promises without them."""

import functools
import itertools

import pytest
import torch

from tpinv import contract, functional
from tpinv.reference import attention
from tpinv.testing import assert_bitwise_equal

BLOCK, LEAF, NODE = contract.ATTENTION_BLOCK, contract.ATTENTION_LEAF, contract.ATTENTION_LEAF * contract.ATTENTION_NODE
HEADS, GROUPS, WIDTH = 8, 4, 16
SINKS = torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, -1.0, 6.0, 2.0])
KINDS = {
    "window": {"sliding_window": 100},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": SINKS},
    "all": {"sliding_window": 130, "softcap": 4.0, "sinks": SINKS},
}


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(length, queries=None, batch=1, dtype=torch.float32, heads=HEADS, groups=GROUPS):
    """query, key, value, gradient of the output; [s, b, heads, d]"""
    q, dout = (randn(queries or length, batch, heads, WIDTH, seed=seed, dtype=dtype) for seed in (0, 3))
    k, v = (randn(length, batch, groups, WIDTH, seed=seed, dtype=dtype) for seed in (1, 2))
    return q * 2, k, v, dout


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def of_heads(settings, heads):
    """``settings`` of some heads: a slice."""
    return {name: value[heads] if name == "sinks" else value for name, value in settings.items()}


def exact(q, k, v, scale, sliding_window=None, softcap=None, sinks=None, causal=True):
    """The definition, in the inputs' dtype. [s, b, h, d]"""
    (n, batch, heads, _), m = q.shape, len(k)
    k, v = (t.repeat_interleave(heads // k.shape[2], 2) for t in (k, v))
    scores = torch.einsum("nbhd,mbhd->bhnm", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(n)[:, None] + m - n, torch.arange(m)
    seen = (j <= i) if causal else torch.ones(n, m, dtype=torch.bool)
    if sliding_window is not None:
        seen = seen & (j > i - sliding_window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(batch, -1, n, 1)], -1)
    return torch.einsum("bhnm,mbhd->nbhd", scores.softmax(-1)[..., :m], v)


def gradients(function, q, k, v, dout, sinks=None, **settings):
    """out, dq, dk, dv, and dsinks if there are sinks."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)] + ([] if sinks is None else [sinks.clone().requires_grad_()])
    out = function(*leaves[:3], **settings, **({} if sinks is None else {"sinks": leaves[3]}))
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


# -- what it computes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 63, 64, 130])
@pytest.mark.parametrize(
    "softcap, sinks, causal", [(None, None, True), (2.0, None, True), (None, SINKS, True), (3.0, SINKS, True), (3.0, SINKS, False)]
)
def test_right(window, softcap, sinks, causal):
    causal = causal or window is not None  # which a window needs
    settings = {"sliding_window": window, "softcap": softcap, "sinks": sinks, "causal": causal, "scale": 0.3}
    for queries, keys in ((70, 70), (3, 600)):
        q, k, v, dout = inputs(keys, queries)
        found = gradients(functional.core_attention, q, k, v, dout, **settings)
        doubles = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
        expected = gradients(exact, *(t.double() for t in (q, k, v, dout)), **doubles)
        for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=False):
            assert (a - b).norm() <= 3e-6 * (b.norm() + dout.norm()), name


def test_tanh_is_near_and_depends_on_the_number_alone():
    x = torch.linspace(-12, 12, 64 * 999)
    found = attention.tanh(x)
    assert (found.double() - x.double().tanh()).abs().max() < 4e-7
    assert found.abs().max() <= 1.0 and (found[1:] >= found[:-1] - 5e-7).all()
    assert_bitwise_equal(attention.tanh(x[7 : 7 + 64]), found[7 : 7 + 64])
    ends = attention.tanh(torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 1e-30]))
    assert ends[:2].tolist() == [1.0, -1.0] and ends[2].isnan() and ends[3:].tolist() == [0.0, torch.tensor(1e-30).item()]


def test_options_that_change_nothing_change_no_byte():
    """A window over all keys, and sinks of -inf: the bytes of none, gradients too."""
    tensors = inputs(LEAF + 70)
    plain = gradients(functional.core_attention, *tensors)
    for settings in ({"sliding_window": LEAF + 70}, {"sliding_window": 1 << 40}, {"sinks": torch.full((HEADS,), float("-inf"))}):
        found = gradients(functional.core_attention, *tensors, **settings)
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, plain, strict=False):
            assert_bitwise_equal(a, b, f"{name}, {settings}")
        assert not (found[4:] and found[4].any())


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_each_option_moves_every_row_that_it_should(settings):
    q, k, v, _ = inputs(300)
    plain, found = functional.core_attention(q, k, v), functional.core_attention(q, k, v, **settings)
    first = settings.get("sliding_window", 0) if set(settings) == {"sliding_window"} else 0
    moved = (plain != found).flatten(1).any(1)
    assert moved[max(first, 1) :].all() and not moved[:first].any()


def test_the_fingerprint_knows_the_options():
    assert contract.ATTENTION_SOME in contract.SUMS and contract.ATTENTION_DSINKS in contract.SUMS
    assert contract.TANH_P in contract.LEAVES_OF_SOME_KEYS.constants and contract.TANH_Q in contract.LEAVES_OF_SOME_KEYS.constants


# -- one row, however computed ------------------------------------------------------------------------------------------------------

EDGES = sorted({edge + d for edge in (BLOCK, LEAF, NODE, NODE + LEAF) for d in (-1, 0, 1)} | {1, 2, 2 * NODE + 1, 2 * NODE + 700})
LONG = {  # windows that begin at, before and behind the edges of blocks, leaves and nodes
    "one key": {"sliding_window": 1},
    "a block": {"sliding_window": BLOCK},
    "a leaf": {"sliding_window": LEAF, "sinks": SINKS},
    "a leaf and one": {"sliding_window": LEAF + 1},
    "a node": {"sliding_window": NODE, "softcap": 4.0, "sinks": SINKS},
    "no window": {"softcap": 4.0, "sinks": SINKS},
}


@functools.cache
def prefill(kind, dtype):
    """Two of the heads, rows around the edges and at the end, computed in chunks of many rows."""
    settings = of_heads(LONG[kind], slice(4, 6))
    q, k, v, _ = (t[:, :, 4:6] if t.shape[2] == HEADS else t[:, :, 2:3] for t in inputs(max(EDGES), dtype=dtype))
    rows = {}
    for stop in (LEAF + 200, NODE + LEAF + 70, max(EDGES)):
        start = stop - 700 if stop > 700 else 0
        out = functional.core_attention(q[start:stop], k[:stop], v[:stop], **settings)
        rows.update({start + i: row for i, row in enumerate(out)})
    return q, k, v, settings, rows


@pytest.mark.parametrize("kind", LONG)
def test_decode_is_prefill_around_every_boundary(kind):
    q, k, v, settings, rows = prefill(kind, torch.bfloat16)
    compared = 0
    for length in EDGES:
        if length - 1 in rows:
            assert_bitwise_equal(functional.core_attention(q[length - 1 : length], k[:length], v[:length], **settings)[0], rows[length - 1])
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("kind", ["a leaf", "a block", "no window"])
def test_chunks_are_prefill(kind, chunk):
    q, k, v, settings, rows = prefill(kind, torch.bfloat16)
    for start in (LEAF - 50, LEAF - chunk, LEAF, NODE + 100, NODE + LEAF - 30, 2 * NODE, 2 * NODE + 60):
        if start in rows and start + chunk - 1 in rows:
            found = functional.core_attention(q[start : start + chunk], k[: start + chunk], v[: start + chunk], **settings)
            assert_bitwise_equal(found, torch.stack([rows[start + i] for i in range(chunk)]), f"{start}, {chunk}")


@pytest.mark.parametrize("kind", ["window", "sinks"])
def test_twin_stock_attention_moves(kind):
    """torch's attention with the same mask on this CPU, and a softmax with one more column: a decode has other bytes than the prefill."""
    q, k, v, _ = (t[:, :, :1] for t in inputs(600, groups=1))
    settings = of_heads(KINDS[kind], slice(0, 1))

    def stock(q, k, v):
        i, j = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
        if kind == "sinks":
            return exact(q, k, v, 0.25, **settings)
        mask = (j <= i) & (j > i - settings["sliding_window"])
        heads = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).permute(2, 0, 1, 3)

    whole = stock(q, k, v)
    assert any(not torch.equal(stock(q[n - 1 : n], k[:n], v[:n])[0], whole[n - 1]) for n in range(70, 600, 37))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_and_batch(kind, dtype):
    """p = 4, 2 and 1: a rank's heads, with their sinks, and one sequence alone; the gradient of sinks over the whole batch."""
    tensors = inputs(LEAF + 77, batch=2, dtype=dtype)
    whole = gradients(functional.core_attention, *tensors, **KINDS[kind])
    for p, rank, b in ((4, 3, 1), (2, 0, 0)):
        mine = of_heads(KINDS[kind], slice(rank * HEADS // p, (rank + 1) * HEADS // p))
        part = gradients(functional.core_attention, *(t.chunk(p, 2)[rank][:, b : b + 1] for t in tensors), **mine)
        for name, a, full in zip(("out", "dq", "dk", "dv"), part, whole, strict=False):
            assert_bitwise_equal(a, full.chunk(p, 2)[rank][:, b : b + 1], f"{name}, sequence {b}, rank {rank} of {p}")
        if "sinks" in mine:
            both = gradients(functional.core_attention, *(t.chunk(p, 2)[rank] for t in tensors), **mine)
            assert_bitwise_equal(both[4], whole[4].chunk(p)[rank], f"dsinks, rank {rank} of {p}")


def test_twin_the_gradient_of_sinks_by_a_plain_sum_moves():
    """What a sum over the batch and the queries adds follows the heads beside it."""
    terms = randn(600, 2, HEADS, seed=5) * torch.exp2(randn(600, 2, HEADS, seed=6) * 4)
    assert any(not torch.equal(terms.sum((0, 1))[h : h + 1], terms[:, :, h : h + 1].contiguous().sum((0, 1))) for h in range(HEADS))


@pytest.mark.parametrize("kind", KINDS)
def test_packs(kind):
    lengths, gap, settings = [1, 200, 0, 64, 130], 3, KINDS[kind]
    firsts = list(itertools.accumulate([n + gap for n in lengths], initial=gap))[:-1]
    total = sum(lengths) + gap * (len(lengths) + 1)
    tensors = [t[:, 0] for t in inputs(total)]
    rows = [slice(a, a + n) for a, n in zip(firsts, lengths, strict=True)]
    outside = torch.ones(total, dtype=torch.bool)
    for own in rows:
        outside[own] = False
    q, k, v, dout = (t.masked_fill(outside.view(-1, 1, 1), float("nan")) for t in tensors)
    cu, padded = int32(*itertools.accumulate(lengths, initial=0)), int32(*firsts, total)
    packed = functools.partial(
        functional.packed_attention, cu_seqlens_q=cu, cu_seqlens_kv=cu, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded
    )
    whole = gradients(packed, q, k, v, dout, **settings)
    assert not any(t[outside].any() for t in whole[:4])
    for own in rows:
        if own.stop > own.start:
            alone = gradients(functional.core_attention, *(t[own].unsqueeze(1) for t in (q, k, v, dout)), **settings)
            for name, a, b in zip(("out", "dq", "dk", "dv"), whole, alone, strict=False):
                assert_bitwise_equal(a[own], b[:, 0], f"{name} of {own}")
    if "sinks" in settings:  # summed over the rows of all sequences
        doubles = {**settings, "sinks": SINKS.double()}
        parts = [gradients(exact, *(t[own].unsqueeze(1).double() for t in (q, k, v, dout)), scale=0.25, **doubles) for own in rows]
        expected = sum(part[4] for own, part in zip(rows, parts, strict=True) if own.stop > own.start)
        assert (whole[4] - expected).norm() <= 1e-5 * expected.norm()


# -- paged --------------------------------------------------------------------------------------------------------------------------


def paged(q, k, v, lengths, counts, size, settings, seed=0):
    """The last ``counts`` queries of requests of ``lengths``, in a cache that is NaN wherever no query may look, before a window too."""
    window = settings.get("sliding_window", 1 << 30)
    groups, dtype = k.shape[1], k.dtype
    needed = [-(-n // size) for n in lengths]
    pages = sum(needed) + 2
    caches = torch.full((2, pages, size, groups, WIDTH), float("nan"), dtype=dtype)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)  # -1: never to be looked at
    for i, (n, c) in enumerate(zip(lengths, counts, strict=True)):
        low = max(0, n - c + 1 - window)
        mine = order[sum(needed[:i]) : sum(needed[: i + 1])]
        table[i, low // size : needed[i]] = mine[low // size :]
        at = torch.arange(low, n)
        functional.append_kv(k[low:n], v[low:n], *caches, mine[at // size].long() * size + at % size)
    query = torch.cat([q[n - c : n] for n, c in zip(lengths, counts, strict=True)])
    starts = int32(*itertools.accumulate(counts, initial=0))
    out = functional.paged_attention(query, *caches, block_table=table, seq_lens=int32(*lengths), query_start_loc=starts, **settings)
    return out.split(counts)


@pytest.mark.parametrize("size", [16, 48, 256])
@pytest.mark.parametrize("kind", ["a leaf", "a leaf and one", "a block", "no window"])
def test_paged_is_prefill(kind, size):
    q, k, v, settings, rows = prefill(kind, torch.bfloat16)
    lengths, counts = [NODE + 1, LEAF, LEAF + 1, NODE + LEAF, 2 * NODE + 700], [1, 7, 1, 100, 3]
    found = paged(*(t[:, 0] for t in (q, k, v)), lengths, counts, size, settings)
    for out, n, c in zip(found, lengths, counts, strict=True):
        assert_bitwise_equal(out, torch.stack([rows[n - c + i][0] for i in range(c)]), f"{c} queries of {n}")


def test_a_window_reads_nothing_before_it_and_everything_in_it():
    """The helper above puts NaN and no page before the window; a key more, and the row is NaN."""
    q, k, v, _ = (t[:, 0] for t in inputs(300))
    (right,) = paged(q, k, v, [300], [1], 16, {"sliding_window": 100})
    assert right.isfinite().all()
    caches = torch.full((2, 20, 16, GROUPS, WIDTH), float("nan"))
    functional.append_kv(k[200:], v[200:], *caches, torch.arange(200, 300))
    table = torch.arange(20, dtype=torch.int32).unsqueeze(0)
    call = functools.partial(
        functional.paged_attention, q[-1:], *caches, block_table=table, seq_lens=int32(300), query_start_loc=int32(0, 1)
    )
    assert_bitwise_equal(call(sliding_window=100), right)
    assert call(sliding_window=101).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_paged_heads_of_a_rank_batch_and_padding(kind):
    q, k, v, _ = (t[:, 0] for t in inputs(LEAF + 90))
    whole = functional.core_attention(*(t.unsqueeze(1) for t in (q, k, v)), **KINDS[kind])[:, 0]
    lengths, counts = [LEAF + 90, 33, 200], [2, 2, 2]
    for p, rank in ((1, 0), (2, 1), (4, 2)):
        settings = of_heads(KINDS[kind], slice(rank * HEADS // p, (rank + 1) * HEADS // p))
        mine = [t.chunk(p, 1)[rank] for t in (q, k, v)]
        for i, (out, n) in enumerate(zip(paged(*mine, lengths, counts, 16, settings), lengths, strict=True)):
            assert_bitwise_equal(out, whole[n - 2 : n].chunk(p, 1)[rank], f"request {i}, rank {rank} of {p}")
            (alone,) = paged(*mine, [n], [1], 32, settings, seed=9)
            assert_bitwise_equal(alone, out[1:], "alone")


def test_no_keys_and_no_request_are_zero_with_sinks():
    caches = torch.full((2, 2, 16, GROUPS, WIDTH), float("nan"))
    numbers = {"block_table": torch.zeros(2, 1, dtype=torch.int32), "seq_lens": int32(0, 0), "query_start_loc": int32(0, 2, 3)}
    out = functional.paged_attention(torch.ones(5, HEADS, WIDTH), *caches, **numbers, **KINDS["all"])
    assert not out.any()


# -- refusals and operators ---------------------------------------------------------------------------------------------------------

x, xk = torch.zeros(5, 2, 6, 8), torch.zeros(5, 2, 3, 8)
CU = int32(0, 2, 5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sliding_window": 0}, "sliding_window=0 must be a whole number"),
        ({"sliding_window": -1}, "sliding_window=-1 must be"),
        ({"sliding_window": 2.0}, "sliding_window=2.0 must be a whole number"),
        ({"sliding_window": True}, "sliding_window=True must be a whole number"),
        ({"sliding_window": "3"}, "sliding_window='3' must be"),
        ({"sliding_window": 3, "causal": False}, "causal=False is not covered"),
        ({"softcap": 0.0}, "softcap=0.0 must be a number above 0"),
        ({"softcap": -1.0}, "softcap=-1.0 must be"),
        ({"softcap": float("nan")}, "softcap=nan must be"),
        ({"softcap": float("inf")}, "softcap=inf with scale=.* finite"),
        ({"softcap": 1e39}, "finite in float32"),
        ({"softcap": 1e-3, "scale": 1e37}, "so must scale / softcap"),
        ({"softcap": True}, "softcap=True must be"),
        ({"softcap": "big"}, "softcap='big' must be"),
        ({"sinks": torch.zeros(3)}, "one logit for each of the query's 6 heads"),
        ({"sinks": torch.zeros(6, 1)}, "one logit for each"),
        ({"sinks": torch.zeros(6, dtype=torch.float64)}, "torch.float64"),
        ({"sinks": [0.0] * 6}, "pass a dense torch.Tensor"),
        ({"sinks": torch.zeros(6), "softcap": 2.0, "scale": 0.0}, "scale=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        functional.core_attention(x, xk, xk, **settings)
    with pytest.raises(ValueError, match=message):
        functional.packed_attention(x[:, 0], xk[:, 0], xk[:, 0], cu_seqlens_q=CU, cu_seqlens_kv=CU, **settings)
    if not isinstance(settings.get("sinks"), list):
        with pytest.raises(ValueError, match=message):
            caches = torch.zeros(2, 4, 16, 3, 8)
            numbers = {"block_table": torch.zeros(1, 2, dtype=torch.int32), "seq_lens": int32(9), "query_start_loc": int32(0, 5)}
            functional.paged_attention(x[:, 0], *caches, **numbers, **settings)


@pytest.mark.parametrize(
    "numbers, message",
    [((1.0, True, -1, 0.0), "sliding_window=-1"), ((1.0, False, 3, 0.0), "not covered"), ((1.0, True, 0, -2.0), "softcap=-2.0"),
     ((1.0, True, 0, float("nan")), "softcap=nan")],
)  # fmt: skip
def test_operators_refuse_the_same(numbers, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.tpinv.core_attention_with_options(x, xk, xk, None, *numbers)
    with pytest.raises(ValueError, match=message):
        torch.ops.tpinv.packed_attention_with_options(x[:, 0], xk[:, 0], xk[:, 0], CU, CU, CU, CU, None, 5, 5, *numbers)


def test_operators():
    q, k, v, _ = inputs(9)
    leaves, sinks = [t.requires_grad_() for t in (q, k, v)], SINKS.clone().requires_grad_()
    torch.library.opcheck(torch.ops.tpinv.core_attention_with_options.default, (*leaves, sinks, 0.5, True, 4, 2.0))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tpinv.core_attention_with_options.default, (*leaves, None, 0.5, True, 4, 0.0), test_utils=quick)
    rows, cu = [t.detach()[:, 0].requires_grad_() for t in (q, k, v)], int32(0, 4, 9)
    packed = *rows, cu, cu, cu, cu, sinks, 9, 9, 0.5, True, 4, 2.0
    torch.library.opcheck(torch.ops.tpinv.packed_attention_with_options.default, packed, test_utils=quick)
    caches, table = randn(2, 3, 16, GROUPS, WIDTH, seed=4), torch.zeros(1, 2, dtype=torch.int32)
    arguments = rows[0].detach(), *caches, table, int32(20), int32(0, 9), 9, 20, 0.5, True
    torch.library.opcheck(torch.ops.tpinv.paged_attention.default, (*arguments, SINKS, 4, 2.0), test_utils=quick)
    torch.library.opcheck(
        torch.ops.tpinv.paged_attention_out.default, (*arguments, torch.zeros(9, HEADS, WIDTH), SINKS, 4, 2.0), test_utils=quick
    )


def test_compiled_is_eager():
    tensors = inputs(70)
    eager = gradients(functional.core_attention, *tensors, **KINDS["all"])
    compiled = gradients(torch.compile(functional.core_attention, backend="aot_eager", fullgraph=True), *tensors, **KINDS["all"])
    for a, b in zip(compiled, eager, strict=True):
        assert_bitwise_equal(a, b)


def test_a_second_derivative_is_refused():
    q, k, v, dout = inputs(9)
    sinks = SINKS.clone().requires_grad_()
    out = functional.core_attention(q, k, v, sinks=sinks)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(out, sinks, dout, create_graph=True)


def test_a_machine_whose_options_are_not_invariant_is_refused(monkeypatch):
    """The probes run with the options of the call: what only a window breaks is found by a call with one, and by no other."""
    import importlib

    core, pages = importlib.import_module("tpinv.ops.attention"), importlib.import_module("tpinv.ops.paged_attention")
    real = attention.attend

    def broken(q, k, v, seen, scale, inner=None, window=None, sinks=None):
        out, lse = real(q, k, v, seen, scale, inner, window, sinks)
        return (out * 1.5 if window is not None and q.shape[1] < 8 else out), lse

    monkeypatch.setattr(attention, "attend", broken)
    for probe in (core.require_invariant, pages.require_paged):
        probe.cache_clear()
    q, k, v, _ = inputs(5)
    functional.core_attention(q, k, v, softcap=2.0)
    with pytest.raises(ValueError, match="not invariant on this CPU.*output differs between chunks of queries"):
        functional.core_attention(q, k, v, sliding_window=3)
    with pytest.raises(ValueError, match="1 queries over pages of 16 differ from one prefill"):
        paged(*(t[:, 0] for t in (q, k, v)), [5], [1], 16, {"sliding_window": 3})
    for probe in (core.require_invariant, pages.require_paged):
        probe.cache_clear()
