"""Sliding windows, capped scores and sinks on an NVIDIA GPU: one set of bytes for prefill, chunks, decode and pages. ``make test-gpu``."""

import functools

import pytest
import torch

from tpinv import contract, functional
from tpinv.testing import assert_bitwise_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BLOCK, LEAF, NODE = contract.ATTENTION_BLOCK, contract.ATTENTION_LEAF, contract.ATTENTION_LEAF * contract.ATTENTION_NODE
LONGEST = 5 * NODE + 300
EDGES = sorted(
    {edge + d for edge in (BLOCK, LEAF, NODE, NODE + LEAF, *(n * NODE for n in (2, 3, 4, 5))) for d in (-1, 0, 1)} | {1, 2, LONGEST}
)
WINDOWS = (1, BLOCK + 1, LEAF, 700, NODE, NODE + LEAF + 1, 3 * NODE, LONGEST)
KINDS = {"window": (True, None, False), "softcap": (False, 4.0, False), "sinks": (False, None, True), "all": (True, 4.0, True)}
FORMS = [  # width, dtype, page size
    ("window", 128, torch.bfloat16, 16), ("all", 128, torch.bfloat16, 256), ("all", 64, torch.float16, 16), ("all", 256, torch.bfloat16, 256),
]  # fmt: skip


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32, device="cuda")


def settings(kind, window=700, heads=slice(0, 4), dtype=torch.float32):
    has_window, softcap, sinks = KINDS[kind]
    logits = torch.tensor([0.5, -3.0, 6.0, 1.0], device="cuda", dtype=dtype)[heads]
    return {"sliding_window": window if has_window else None, "softcap": softcap, "sinks": logits if sinks else None}


@functools.lru_cache(maxsize=1)
def tensors(width, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(LONGEST, heads, width, device="cuda", generator=generator).to(dtype) for heads in (4, 2, 2))
    return q * 2, k, v


@functools.lru_cache(maxsize=2)
def prefill(kind, window, width, dtype):
    return functional.core_attention(*(t.unsqueeze(1) for t in tensors(width, dtype)), **settings(kind, window)).squeeze(1)


def cache_of(keys, values, size, first=0):
    """Shuffled pages and their table: NaN, and no page, before ``first``, and NaN behind the last position."""
    pages = -(-len(keys) // size)
    order = torch.randperm(pages + 2, device="cuda")[:pages]
    caches = [torch.full((pages + 2, size, *keys.shape[1:]), float("nan"), device="cuda", dtype=keys.dtype) for _ in range(2)]
    at = torch.arange(first, len(keys), device="cuda")
    functional.append_kv(keys[first:], values[first:], *caches, order[at // size] * size + at % size)
    table = order.int()
    table[: first // size] = -1
    return caches, table


@pytest.mark.parametrize("kind, width, dtype, size", FORMS)
def test_decodes_of_every_length_in_one_batch(kind, width, dtype, size):
    q, k, v = tensors(width, dtype)
    caches, order = cache_of(k, v, size)
    for window in WINDOWS if KINDS[kind][0] else (None,):
        whole = prefill(kind, window, width, dtype)
        for queries in (1, 3, 40):
            ends = [n for n in EDGES if n >= queries]
            rows = torch.cat([torch.arange(n - queries, n) for n in ends]).cuda()
            out = functional.paged_attention(
                q[rows], *caches, block_table=order.expand(len(ends), -1), seq_lens=int32(ends), max_query_len=queries, max_seq_len=LONGEST,
                query_start_loc=int32(range(0, queries * len(ends) + 1, queries)), **settings(kind, window),
            )  # fmt: skip
            assert_bitwise_equal(out, whole[rows], f"{queries} queries, window {window}")


@pytest.mark.parametrize("count", [1, 80])
@pytest.mark.parametrize("size", [16, 64])
def test_units_of_leaves_and_of_nodes_and_nothing_before_a_window(count, size):
    """Few requests are split by leaves, many by nodes; before the window NaN and no page; heads of a rank; a chunk by the other kernel."""
    for window in (1, 100, LEAF, 700, NODE + 5):
        for length in (LEAF + 1, 2 * NODE + 9, LONGEST):
            for part in (slice(0, 4), slice(2, 4)):
                q, k, v = (t[:length] for t in tensors(128, torch.bfloat16))
                groups = slice(part.start // 2, part.stop // 2)
                for queries in (1, 100):
                    caches, order = cache_of(k[:, groups], v[:, groups], size, max(0, length - queries + 1 - window))
                    many = count if queries == 1 else 1
                    out = functional.paged_attention(
                        q[length - queries :, part].repeat(many, 1, 1), *caches, block_table=order.expand(many, -1),
                        seq_lens=int32([length] * many), query_start_loc=int32(range(0, queries * many + 1, queries)), max_query_len=queries,
                        **settings("all", window, part),
                    )  # fmt: skip
                    whole = prefill("all", window, 128, torch.bfloat16)[length - queries : length, part]
                    assert_bitwise_equal(out, whole.repeat(many, 1, 1), f"{window=} {length=} {part=} {queries=}")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_dense_and_paged(kind):
    q, k, v = tensors(128, torch.bfloat16)
    caches, order = cache_of(k, v, 32)
    whole = prefill(kind, 700, 128, torch.bfloat16)
    for chunk in (7, 100, 4096):
        for start in (0, 500, 4090, 8000, LONGEST - chunk):
            stop = start + chunk
            dense = functional.core_attention(*(t.unsqueeze(1) for t in (q[start:stop], k[:stop], v[:stop])), **settings(kind)).squeeze(1)
            assert_bitwise_equal(dense, whole[start:stop], f"dense, {start}")
            out = functional.paged_attention(
                torch.cat([q[start:stop], q[199:200]]), *caches, block_table=order.expand(2, -1), seq_lens=int32([stop, 200]),
                query_start_loc=int32([0, chunk, chunk + 1]), **settings(kind),
            )  # fmt: skip
            assert_bitwise_equal(out, torch.cat([whole[start:stop], whole[199:200]]), f"paged, {start}")


def test_options_that_change_nothing_change_no_byte():
    """What csrc computes without options, Triton computes with a window over everything and with sinks of -inf; gradients too."""
    for length in (1000, LONGEST):
        q, k, v = (t[:length].unsqueeze(1) for t in tensors(128, torch.bfloat16))
        dout = torch.randn(q.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2)).bfloat16()
        plain = gradients(q, k, v, dout)
        for given in ({"sliding_window": length}, {"sinks": torch.full((4,), float("-inf"), device="cuda")}):
            for name, a, b in zip(("out", "dq", "dk", "dv"), gradients(q, k, v, dout, **given), plain, strict=False):
                assert_bitwise_equal(a, b, f"{name}, {given}")


def gradients(q, k, v, dout, sinks=None, function=functional.core_attention, **given):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)] + ([] if sinks is None else [sinks.clone().requires_grad_()])
    out = function(*leaves[:3], **given, **({} if sinks is None else {"sinks": leaves[3]}))
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [700, 9000])
def test_gradients_over_heads_batch_packs_and_reruns(kind, length):
    generator = torch.Generator("cuda").manual_seed(1)
    inputs = [torch.randn(length, 2, heads, 128, device="cuda", generator=generator).bfloat16() for heads in (4, 4, 4, 4)]
    whole = gradients(*inputs, **settings(kind, 300))
    for p, rank, b in ((1, 0, 0), (2, 1, 1), (4, 2, 0)):
        mine = settings(kind, 300, slice(rank * 4 // p, (rank + 1) * 4 // p))
        part = gradients(*(t.chunk(p, 2)[rank][:, b : b + 1] for t in inputs), **mine)
        for name, a, full in zip(("out", "dq", "dk", "dv"), part, whole, strict=False):
            assert_bitwise_equal(a, full.chunk(p, 2)[rank][:, b : b + 1], f"{name}, rank {rank} of {p}")
        both = gradients(*(t.chunk(p, 2)[rank] for t in inputs), **mine)
        for a, full in zip(both[4:], whole[4:], strict=True):
            assert_bitwise_equal(a, full.chunk(p)[rank], f"dsinks, rank {rank} of {p}")
    for a, b in zip(gradients(*inputs, **settings(kind, 300)), whole, strict=True):
        assert_bitwise_equal(a, b, "a rerun")
    cu = int32([0, 600, length])
    packed = functools.partial(functional.packed_attention, cu_seqlens_q=cu, cu_seqlens_kv=cu)
    found = gradients(*(t[:, 0] for t in inputs), **settings(kind, 300), function=packed)
    for rows in (slice(0, 600), slice(600, length)):
        alone = gradients(*(t[rows, :1] for t in inputs), **settings(kind, 300))
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, alone, strict=False):
            assert_bitwise_equal(a[rows], b[:, 0], f"{name} of a pack, {rows}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 128])
def test_right(kind, width):
    """Against float64, in bfloat16's rounding, out and gradients."""
    generator = torch.Generator("cuda").manual_seed(1)
    inputs = [torch.randn(900, 1, heads, width, device="cuda", generator=generator).bfloat16() for heads in (4, 2, 2, 4)]
    given = settings(kind, 300)

    def exact(q, k, v, sinks=None):
        k, v = (t.repeat_interleave(2, 2) for t in (k, v))
        scores = torch.einsum("nbhd,mbhd->bhnm", q, k) * width**-0.5
        if given["softcap"]:
            scores = given["softcap"] * torch.tanh(scores / given["softcap"])
        i, j = torch.arange(900, device="cuda")[:, None], torch.arange(900, device="cuda")
        scores = scores.masked_fill((j > i) | (j <= i - (given["sliding_window"] or 900)), float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, 900, 1)], -1)
        return torch.einsum("bhnm,mbhd->nbhd", scores.softmax(-1)[..., :900], v)

    doubles = {} if given["sinks"] is None else {"sinks": given["sinks"].double()}
    expected = gradients(*(t.double() for t in inputs), function=exact, **doubles)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), gradients(*inputs, **given), expected, strict=False):
        assert (a - b).norm() <= 1e-2 * b.norm(), f"{name}: {float((a - b).norm() / b.norm())}"


def test_a_graph_serves_other_lengths():
    q, k, v = tensors(128, torch.bfloat16)
    caches, order = cache_of(k, v, 16)
    table, lens, starts = order.expand(4, -1).contiguous(), int32([1] * 4), int32(range(5))
    query, given = q[:4].clone(), settings("all", 700)
    call = functools.partial(
        functional.paged_attention, query, *caches, block_table=table, seq_lens=lens, query_start_loc=starts, max_query_len=1, **given
    )
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    whole = prefill("all", 700, 128, torch.bfloat16)
    for ends in ([LONGEST, 1, 700, 701], [NODE, NODE + 1, 2 * NODE + 700, 3], [5, 9000, 64, 65]):
        query.copy_(q[torch.tensor(ends, device="cuda") - 1])
        lens.copy_(int32(ends))
        graph.replay()
        assert_bitwise_equal(out, whole[torch.tensor(ends, device="cuda") - 1], f"{ends}")


def test_twin_stock_decode_moves():
    q, k, v = (t[:2000].transpose(0, 1).unsqueeze(0) for t in tensors(128, torch.bfloat16))
    i, j = torch.arange(2000, device="cuda")[:, None], torch.arange(2000, device="cuda")
    mask = (j <= i) & (j > i - 700)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    stock = torch.nn.functional.scaled_dot_product_attention
    whole = stock(q, k, v, attn_mask=mask)
    decodes = [stock(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], attn_mask=mask[n - 1 : n, :n]) for n in (800, 1201, 2000)]
    assert any(not torch.equal(a[:, :, 0], whole[:, :, n - 1]) for a, n in zip(decodes, (800, 1201, 2000), strict=True))
