"""The kernels of a training step beside the products, under Triton's interpreter, on a CPU. Run by test_kernels_interpreter.py.

exp and rsqrt are NumPy's here, so the references below use those; everything else is the arithmetic of tpinv/functional, byte for byte.
"""

import functools
import itertools
import math

import fast_interpreter  # noqa: F401
import numpy as np
import pytest
import torch

from tpinv import functional, reference
from tpinv.kernels.attention import backward as attention_backward
from tpinv.kernels.attention import forward as attention
from tpinv.kernels.rows import activation, cross_entropy, embedding, gelu, norm, squares, sums
from tpinv.ops import attention as functional_attention
from tpinv.ops import products
from tpinv.optim import norm_of
from tpinv.reference import embedding as reference_embedding
from tpinv.reference import gelu as reference_gelu
from tpinv.testing import assert_bitwise_equal
from tpinv.tree import ReductionTree


def wild(*shape, seed=0, dtype=torch.float32, spread=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-spread, spread + 1, shape, generator=g).float())
    x.view(-1)[::7] = -0.0
    return x.to(dtype)


def through_numpy(function):
    return lambda x: torch.from_numpy(np.asarray(function(x.numpy())))


exp = through_numpy(np.exp)
rsqrt = through_numpy(lambda x: np.float32(1) / np.sqrt(x))


# -- norms -------------------------------------------------------------------------------------------------------------------------


def mean(x, inverse):
    return (reference.row_sum(x) * inverse).unsqueeze(-1)


def norm_oracle(x, w, b, dy, eps, center):
    inverse = (1.0 / torch.tensor(float(x.shape[1]))).item()
    wide, g = x.float(), dy.float() * w.float()
    wide = wide - mean(wide, inverse) if center else wide
    scale = rsqrt(mean(wide * wide, inverse) + eps)
    normalised = wide * scale
    y = normalised * w.float() if b is None else normalised * w.float() + b.float()
    dx = g - normalised * mean(g * normalised, inverse)
    dx = dx - mean(g, inverse) if center else dx
    return y.to(x.dtype), (dx * scale).to(x.dtype), dy.float() * normalised


def first_part(t, heads, share, ranks, by_head=False):
    """Rank 0's rows of t [tokens * heads, H]: its heads of every token, or the first tokens."""
    if not share:
        return t[: len(t) // ranks]
    part = t.view(-1, heads, t.shape[1])[:, :share]
    return (part.transpose(0, 1) if by_head else part).reshape(-1, t.shape[1])


@pytest.mark.parametrize("rows, cols, heads", [(37, 64, 1), (5, 18, 1), (2, 300, 1), (30, 16, 6), (0, 8, 1), (2, 2, 1)])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm(rows, cols, heads, center, dtype):
    tree, spread = ReductionTree(6), 2 if dtype == torch.float16 else 8
    x, dy = wild(rows, cols, seed=1, dtype=dtype, spread=spread), wild(rows, cols, seed=2, dtype=dtype, spread=spread)
    w, b = wild(cols, seed=3, dtype=dtype, spread=1), wild(cols, seed=4, dtype=dtype, spread=1) if center else None
    y, dx, terms = norm_oracle(x, w, b, dy, 1e-5, center)
    assert_bitwise_equal(norm.norm(x, w, b, 1e-5, center), y, "y")
    for ranks in (1, 2, 3):
        if rows % ranks or heads % ranks:
            continue
        share = heads // ranks if heads > 1 else 0  # of heads, if those are what is sharded, else of rows
        mine = functools.partial(first_part, heads=heads, share=share, ranks=ranks)
        in_order = functools.partial(first_part, heads=heads, share=share, ranks=ranks, by_head=True)
        got_dx, values = norm.norm_backward(mine(x), w, mine(dy), 1e-5, center, tree, 0, ranks, heads=max(1, share), bias=center)
        assert_bitwise_equal(got_dx, mine(dx), "dx")
        expected = reference.tree_sum(in_order(terms), tree, 0, ranks, dim=0)
        if center:
            expected = torch.cat([expected, reference.tree_sum(in_order(dy).float(), tree, 0, ranks, dim=0)], dim=1)
        assert_bitwise_equal(values, expected, f"terms, {ranks} ranks")


# -- cross-entropy -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab, leaves", [(48, 8), (24, 24), (5000, 1), (17, 3), (5, 8)])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_cross_entropy(vocab, leaves, smooth):
    tree, rows = ReductionTree(leaves), 3
    x = wild(rows, vocab, seed=5, spread=3).half()
    top = x.float().amax(-1)
    assert_bitwise_equal(cross_entropy.row_max(x), top, "maximum")
    shifted = x.float() - top.unsqueeze(-1)
    for ranks in (p for p in (1, 3, 8) if leaves % p == 0 and vocab % p == 0 and not smooth):
        for rank in {0, ranks - 1}:
            part = slice(rank * vocab // ranks, (rank + 1) * vocab // ranks)
            values = cross_entropy.vocab_sums(x[:, part], top, tree, rank, ranks, shifted=True)
            assert_bitwise_equal(values[0], reference.tree_sum(shifted[:, part], tree, rank, ranks, dim=-1), "sum of shifted")
            assert_bitwise_equal(values[1], reference.tree_sum(exp(shifted[:, part]), tree, rank, ranks, dim=-1), "sum of exp")
            (alone,) = cross_entropy.vocab_sums(x[:, part], top, tree, rank, ranks, shifted=False)
            assert_bitwise_equal(alone, values[1], "sum of exp alone")
    total, dloss = exp(shifted).sum(-1), wild(rows, seed=6)
    index = torch.tensor([vocab // 2, -1, -2])
    dx = exp(shifted) / total.unsqueeze(-1)
    dx[0, vocab // 2] -= 1.0 - smooth
    dx = dx - smooth / vocab if smooth else dx
    dx = (dx * dloss.unsqueeze(-1)).half()
    dx[2] = 0.0
    got = cross_entropy.vocab_grad(x, top, total, index, dloss, 1.0 - smooth, smooth / vocab)
    assert_bitwise_equal(got, dx, "gradient")


def test_maximum_keeps_nan():
    x = torch.tensor([[1.0, float("nan"), 2.0], [float("-inf")] * 3, [3.0, float("inf"), 0.0]])
    top = cross_entropy.row_max(x)
    assert top[0].isnan() and top[1] == float("-inf") and top[2] == float("inf")


def test_a_new_number_of_rows_copies_nothing_to_the_device(monkeypatch):
    """Which rows a leaf holds is arithmetic in the kernel: no table to make, keep, or invalidate a captured graph with."""
    tree = ReductionTree(24)
    monkeypatch.setattr(torch, "tensor", None)
    for rows in (35, 36, 37):
        x = wild(rows, 5, seed=rows)
        for ranks in (1, 8):
            assert sums.column_sum(x, tree, ranks - 1, ranks).shape == (len(tree.subtrees(ranks - 1, ranks)), 5)
        cross_entropy.vocab_sums(x.t().contiguous(), x.amax(0), tree, 0, 1, shifted=False)
    assert sums._plan.cache_info().maxsize and cross_entropy._plan.cache_info().maxsize


# -- embedding, activation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, rows, cols", [(40, 5, 20), (1, 3, 4), (0, 3, 4), (25, 1, 520)])
def test_embedding(tokens, rows, cols):
    ids = torch.randint(-2, rows + 2, (tokens,), generator=torch.Generator().manual_seed(7))
    dy = wild(tokens, cols, seed=8, spread=3).half()
    got = embedding.sum_by_id(ids, dy, rows, torch.float16)
    assert_bitwise_equal(got, reference_embedding.sum_by_id(ids, dy, rows, torch.float16), "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu_has_the_bits_of_its_two_steps(dtype, monkeypatch):
    monkeypatch.setattr(torch, "exp", exp)
    x, dy = wild(5, 46, seed=9, dtype=dtype, spread=3), wild(5, 23, seed=10, dtype=dtype, spread=3)
    leaf = x.clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    active = functional.silu(gate)
    y = active * up
    y.backward(dy)
    assert_bitwise_equal(activation.swiglu(x), y.detach(), "y")
    assert_bitwise_equal(activation.swiglu_backward(x, dy), leaf.grad, "dx")
    assert_bitwise_equal(activation.silu(x[:, :23]), active.detach(), "silu")
    gate = x[:, :23].clone().requires_grad_()
    functional.silu(gate).backward(dy)
    assert_bitwise_equal(activation.silu_backward(x[:, :23], dy), gate.grad, "silu's gradient")


def scalar(function):
    """math's function, in float64, on every element: what the interpreter computes."""
    return lambda x: torch.from_numpy(np.vectorize(function, otypes=[np.float64])(x.numpy()).astype(np.float32)) if x.numel() else x


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu(tanh, dtype, monkeypatch):
    """tanh is made of exp here, since the interpreter has none."""
    monkeypatch.setattr(torch, "exp", exp)
    monkeypatch.setattr(torch, "erf", scalar(math.erf))
    monkeypatch.setattr(torch, "tanh", lambda x: 1.0 - 2.0 / (exp(2.0 * x) + 1.0))
    x, dy = wild(5, 213, seed=14, dtype=dtype, spread=3), wild(5, 213, seed=15, dtype=dtype, spread=3)
    y, dx = reference_gelu.gelu(x, tanh), reference_gelu.gelu_backward(x, dy, tanh)
    assert_bitwise_equal(gelu.gelu(x, tanh), y, "y")
    assert_bitwise_equal(gelu.gelu_backward(x, dy, tanh), dx, "dx")
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)  # another address, and a part of it
    assert_bitwise_equal(gelu.gelu(shifted[:, 3:100], tanh), y[:, 3:100], "a part at an odd address")
    assert gelu.gelu(x[:0], tanh).shape == (0, 213) == gelu.gelu_backward(x[:0], dy[:0], tanh).shape


# -- sum of squares ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spread, dtype", [*((n, torch.float32) for n in (0, 9, 140)), (0, torch.bfloat16), (140, torch.bfloat16), (9, torch.float16)]
)
def test_squares_are_exact(spread, dtype):
    """140: some numbers are so small beside others that passes which end when nothing is left add them up; 9: the anchors move up."""
    g = torch.Generator().manual_seed(spread)
    x = torch.randn(30_000, generator=g) * torch.exp2(torch.randint(-spread, min(spread, 126) + 1, (30_000,), generator=g).float())
    x[:9] = torch.tensor(
        [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38 if spread > 100 else 1.0, 1.0, 1 + 2**-23, 3.0]
    )
    if dtype != torch.float32:
        x = x.to(dtype).nan_to_num_(posinf=1.0, neginf=-1.0)
        x[x.abs() < torch.finfo(dtype).tiny] = 0.0  # the interpreter misreads subnormal bfloat16
    once = squares.counters(x.device)
    squares.add_squares(once, x)
    exact = sum(int(v * 2**149) ** 2 for v in x.double().tolist())
    assert sum(int(c) << (20 * i) for i, c in enumerate(once[:29].tolist())) == exact
    parts = squares.counters(x.device)
    for part in x.flip(0).split(9_999):
        squares.add_squares(parts, part)
    total = squares.total(once)
    assert_bitwise_equal(squares.total(parts), total, "another grouping")
    assert total.sqrt().float() == norm_of([x])
    assert abs(total.item() - exact / 4**149) <= 2**-50 * exact / 4**149


def test_squares_of_infinity_and_nan():
    for values, check in (([1.0, float("-inf")], torch.isinf), ([float("inf"), float("nan")], torch.isnan)):
        bins = squares.counters(torch.device("cpu"))
        squares.add_squares(bins, torch.tensor(values))
        assert check(squares.total(bins))
    bins = squares.counters(torch.device("cpu"))
    bins[27] = 1 << 50  # 2^26 elements next to float32's largest would be as much
    assert torch.isinf(squares.total(bins))


# -- attention ---------------------------------------------------------------------------------------------------------------------


def attention_inputs(sq, sk, batch, heads, groups, width, dtype=torch.float32):
    q, k, v, dout = (
        torch.randn(s, batch, h, width, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (s, h) in enumerate(((sq, heads), (sk, groups), (sk, groups), (sq, heads)))
    )
    return q, k, v, dout


def run_attention(q, k, v, dout, causal):
    out, lse = attention.forward(q, k, v, q.shape[-1] ** -0.5, causal)
    return out, *attention_backward.backward(q, k, v, out, lse, dout, q.shape[-1] ** -0.5, causal)


def attention_oracle(q, k, v, dout, causal):
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    expand = lambda t: t.repeat_interleave(q.shape[2] // t.shape[2], 2).permute(1, 2, 0, 3)  # noqa: E731
    scores = q.permute(1, 2, 0, 3) @ expand(k).mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1 + k.shape[0] - q.shape[0]), float("-inf"))
    out = (scores.softmax(-1) @ expand(v)).permute(2, 0, 1, 3)
    out.backward(dout.double())
    return out, q.grad, k.grad, v.grad


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sq, sk, width", [(70, 70, 16), (33, 33, 40), (1, 45, 16), (20, 50, 8), (40, 40, 130)])
def test_attention_is_right(sq, sk, width, causal):
    inputs = attention_inputs(sq, sk, 1, 4, 2, width)
    for name, got, expected in zip(
        ("out", "dq", "dk", "dv"), run_attention(*inputs, causal), attention_oracle(*inputs, causal), strict=True
    ):
        assert got.isfinite().all()
        assert (got.double() - expected).norm() <= 3e-6 * expected.norm(), name


def test_attention_ignores_other_heads_batches_and_later_tokens():
    inputs = attention_inputs(50, 50, 2, 4, 2, 16)
    whole = run_attention(*inputs, True)
    part = run_attention(*(t[:, 1:, -t.shape[2] // 2 :] for t in inputs), True)  # the last group of the second sequence, strided
    for name, a, b in zip(("out", "dq", "dk", "dv"), part, whole, strict=True):
        assert_bitwise_equal(a, b[:, 1:, -a.shape[2] :], name)
    assert_bitwise_equal(run_attention(*(t[:41] for t in inputs), True)[0], whole[0][:41], "a shorter sequence")


def cumulative(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("starts, causal", [([0, 33, 33, 34, 46], True), ([2, 36, 39, 40, 50], False)])
def test_sequences_of_a_pack_have_the_bytes_they_have_alone(starts, causal, on_kernels):
    """Empty ones and gaps between them included; what is in the gaps, NaN here, is not read and gives zeros."""
    lengths, first = [33, 0, 1, 10], cumulative(starts)
    own = [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    gaps = torch.tensor([all(not rows.start <= t < rows.stop for rows in own) for t in range(50)])
    inputs = [t.masked_fill(gaps.view(-1, 1, 1, 1), float("nan")) for t in attention_inputs(50, 50, 1, 2, 1, 16)]
    q, k, v, dout = (t[:, 0] for t in inputs)
    cu = cumulative([0, *itertools.accumulate(lengths)])
    padded = {"cu_seqlens_q_padded": first, "cu_seqlens_kv_padded": first} if gaps[0] else {}
    packed = functools.partial(
        functional.packed_attention, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=33, max_seqlen_kv=40, causal=causal, **padded
    )
    whole = results(packed, dout, q, k, v)
    for t in whole:
        assert_bitwise_equal(t[gaps], torch.zeros_like(t[gaps]), "in gaps")
    for rows in own:
        for name, a, b in zip(("out", "dq", "dk", "dv"), whole, run_attention(*(t[rows] for t in inputs), causal), strict=True):
            assert_bitwise_equal(a[rows], b[:, 0], f"{name} of {rows}")


def test_keys_may_be_more_than_queries_in_a_pack(on_kernels):
    q, k, v, dout = attention_inputs(9, 45, 1, 2, 1, 16)
    cu_q, cu_k = cumulative([0, 5, 9]), cumulative([0, 35, 45])
    packed = functools.partial(functional.packed_attention, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k)
    whole = results(packed, dout[:, 0], *(t[:, 0] for t in (q, k, v)))
    operator = lambda *t: torch.ops.tpinv.packed_attention(*t, cu_q, cu_k, cu_q, cu_k, 5, 35, 0.25, True)[0]  # noqa: E731
    for a, b in zip(results(operator, dout[:, 0], *(t[:, 0] for t in (q, k, v))), whole, strict=True):
        assert_bitwise_equal(a, b, "the operator")
    for n in range(2):
        queries, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = run_attention(q[queries], k[keys], v[keys], dout[queries], True)
        for a, b, rows in zip(whole, alone, (queries, queries, keys, keys), strict=True):
            assert_bitwise_equal(a[rows], b[:, 0])


@pytest.mark.parametrize(
    "cu, settings",
    [
        ([0, 6, 5, 9], {}),
        ([0, 6, 10], {}),
        ([-1, 6], {}),
        ([0, 4, 9], {"max_seqlen_q": 4}),
        ([0, 4, 9], {"cu_seqlens_q_padded": cumulative([0, 3, 9])}),
        ([0, 4, 9], {"cu_seqlens_kv": cumulative([0, 3, 9])}),
        ([0, 4, 9], {"cu_seqlens_kv": cumulative([0, 0, 9]), "causal": False}),
    ],
)
def test_lengths_that_do_not_fit_fail_on_the_device(cu, settings, on_kernels):
    cu = cumulative(cu)
    with pytest.raises(ValueError, match="cu_seqlens overlap"):
        functional.packed_attention(*[torch.zeros(9, 2, 8)] * 3, **{"cu_seqlens_q": cu, "cu_seqlens_kv": cu, **settings})


def test_more_batches_than_a_grid_has_places(monkeypatch):
    inputs = attention_inputs(4, 4, 5, 2, 1, 16)
    whole = run_attention(*inputs, True)
    monkeypatch.setattr(attention, "GRID_LIMIT", 2)
    for a, b in zip(run_attention(*inputs, True), whole, strict=True):
        assert_bitwise_equal(a, b)


def test_head_strides_whose_multiples_pass_int32():
    memory = torch.empty(2**31 + 256, dtype=torch.float16)  # of which three pages are touched
    apart = memory.as_strided((4, 1, 3, 16), (16, 0, 2**30, 1))
    apart.copy_(torch.randn(4, 1, 3, 16, generator=torch.Generator().manual_seed(11)))
    for got, expected in zip(run_attention(*[apart] * 4, True), run_attention(*[apart.contiguous()] * 4, True), strict=True):
        assert_bitwise_equal(got, expected)


@pytest.mark.parametrize("width", [72, 16])
def test_sums_over_a_head_are_trees_whatever_the_strides(width):
    out, dout = wild(5, 1, 2, width, seed=12), wild(5, 1, 2, width + 9, seed=13)[..., :width]
    expected = reference.row_sum(out * dout).permute(1, 2, 0)
    assert_bitwise_equal(attention_backward.row_dots(out, dout), expected)
    assert_bitwise_equal(attention_backward.row_dots(out, dout.contiguous()), expected)


def test_heads_wider_than_the_blocks_are_refused():
    with pytest.raises(ValueError, match="width 300"):
        attention.forward(*attention_inputs(4, 4, 1, 1, 1, 300)[:3], 1.0, True)


# -- what kernels ask of strides, the functions see to -----------------------------------------------------------------------------


@pytest.fixture
def on_kernels(monkeypatch):
    monkeypatch.setattr(products, "on_gpu", lambda x: True)
    monkeypatch.setattr(functional_attention, "require_invariant", lambda *_: None)


def scattered(t):
    """The same numbers, no two of them side by side."""
    wide = torch.full((*t.shape, 3), float("nan"), dtype=t.dtype)
    wide[..., 1] = t
    return wide[..., 1]


def results(function, dy, *inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("name", ["loss", "rms", "layer", "attention", "operator", "pack", "operator of packs"])
def test_any_strides(name, on_kernels):
    tree, target, heads = ReductionTree(2), torch.tensor([3, -100, 0, 11]), ((5, 1, 2, 8), (5, 1, 2, 8), (6, 1, 1, 8), (6, 1, 1, 8))
    rows, (cu_q, cu_k) = [shape[::2] + shape[3:] for shape in heads], (cumulative([0, 2, 5]), cumulative([0, 3, 6]))
    function, *shapes = {
        "loss": (lambda x: functional.vocab_parallel_cross_entropy(x, target, tree=tree), (4,), (4, 12)),
        "rms": (lambda x, w: functional.rms_norm(x, w, tree=tree), (4, 12), (4, 12), (12,)),
        "layer": (lambda x, w, b: functional.layer_norm(x, w, b, tree=tree), (4, 12), (4, 12), (12,), (12,)),
        "attention": (functional.core_attention, *heads),
        "operator": (lambda q, k, v: torch.ops.tpinv.core_attention(q, k, v, 0.25, True)[0], *heads),
        "pack": (lambda *t: functional.packed_attention(*t, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k), *rows),
        "operator of packs": (lambda *t: torch.ops.tpinv.packed_attention(*t, cu_q, cu_k, cu_q, cu_k, 3, 3, 8**-0.5, True)[0], *rows),
    }[name]
    inputs = [wild(*shape, seed=20 + i, spread=2) for i, shape in enumerate(shapes)]
    for got, expected in zip(results(function, *map(scattered, inputs)), results(function, *inputs), strict=True):
        assert_bitwise_equal(got, expected, name)


def test_a_weight_that_is_one_number_expanded(on_kernels):
    x, one = wild(4, 12, seed=30), torch.ones(1)
    norm_with = lambda w: functional.rms_norm(x, w, tree=ReductionTree(2))  # noqa: E731
    assert_bitwise_equal(norm_with(one.expand(12)), norm_with(torch.ones(12)))


@pytest.mark.parametrize(
    "heads, keys, scale, message", [(3, 5, 0.25, "g dividing h"), (2, 4, 0.25, "pass all keys"), (2, 5, -0.25, "negate the query")]
)
def test_the_operator_refuses_what_the_function_refuses(heads, keys, scale, message, on_kernels):
    with pytest.raises(ValueError, match=message):
        torch.ops.tpinv.core_attention(torch.zeros(5, 1, heads, 8), *[torch.zeros(keys, 1, 2, 8)] * 2, scale, True)
