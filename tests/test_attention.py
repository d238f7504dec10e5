"""Attention by leaves on a CPU: the contract, and that a row's bytes depend on its own sequence and position alone, however computed."""

import functools
import itertools

import pytest
import torch

from tpinv import contract, functional, reference
from tpinv.reference import attention
from tpinv.testing import assert_bitwise_equal
from tpinv.tree import ReductionTree

BLOCK, LEAF, NODE = contract.ATTENTION_BLOCK, contract.ATTENTION_LEAF, contract.ATTENTION_LEAF * contract.ATTENTION_NODE


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(length, heads=4, groups=2, width=16, dtype=torch.float32, batch=1, queries=None):
    """query, key, value, gradient of the output; [s, b, heads, d]. Scores spread widely, so that maxima move from block to block."""
    q, dout = (randn(queries or length, batch, heads, width, seed=seed, dtype=dtype) for seed in (0, 3))
    k, v = (randn(length, batch, groups, width, seed=seed, dtype=dtype) for seed in (1, 2))
    return q * 2, k, v, dout


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# -- the contract -------------------------------------------------------------------------------------------------------------------


def test_the_sum_over_a_block_adds_columns_in_the_distances_of_the_table():
    terms = torch.arange(BLOCK)
    expected = [{int(i)} for i in terms]
    for distance in contract.ATTENTION_ROW:
        expected = [group | expected[i ^ distance] for i, group in enumerate(expected)]
    assert all(group == set(range(BLOCK)) for group in expected)
    # Which columns are under one node is seen from which pairs of a large number and its opposite leave the ones beside them alone.
    values = torch.exp2(torch.randint(-20, 20, (50, BLOCK), generator=torch.Generator().manual_seed(0)).float())
    total = values
    for distance in contract.ATTENTION_ROW:
        total = total + total[:, terms ^ distance]
    assert_bitwise_equal(attention.block_sum(values), total[:, 0])
    assert not torch.equal(reference.row_sum(values), total[:, 0]), "the order matters for these values"


@pytest.mark.parametrize("keys", [1, 63, 65, LEAF, LEAF + 1, NODE, NODE + BLOCK, 2 * NODE + LEAF + 3, 3 * NODE + 1])
def test_leaves_are_a_chain_and_nodes_a_tree(monkeypatch, keys):
    """With symbols: merging writes down what is merged, a leaf its blocks."""
    monkeypatch.setattr(attention, "leaf", lambda q, k, v, seen, blocks, *_: [tuple(blocks)])
    monkeypatch.setattr(attention, "merge", lambda a, b: [a, b])
    seen = []
    monkeypatch.setattr(attention.ReductionTree, "reduce", lambda tree, nodes, add: seen.append((tree.leaves, list(nodes))) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention.attend(torch.zeros(1, 1, 16), *[torch.zeros(1, keys, 16)] * 2, [keys], 1.0)
    blocks = list(range(-(-keys // BLOCK)))
    leaves = [[tuple(blocks[i : i + LEAF // BLOCK])] for i in range(0, len(blocks), LEAF // BLOCK)]
    nodes = [functools.reduce(lambda a, b: [a, b], leaves[i : i + 8]) for i in range(0, len(leaves), 8)]
    assert seen == [(len(nodes), nodes)]


def test_a_leaf_is_the_recurrence_and_partial_results_merge_to_the_whole():
    """Leaves apart, merged by hand as an engine's decode does: a chain in a node, then RFC 6962's tree."""
    length = 3 * NODE + LEAF + 70
    q, k, v, _ = inputs(length, 1, 1)
    whole, _ = attention.forward(q[-1:], k, v, 0.25, True)
    tiles = [attention.tiles(t[:, 0].transpose(0, 1)) for t in (q[-1:], k, v)]
    keys = attention.Keys.of([length], tiles[1].shape[1])
    parts = []
    for first in range(0, -(-length // BLOCK), LEAF // BLOCK):
        blocks = range(first, min(first + LEAF // BLOCK, -(-length // BLOCK)))
        parts.append(attention.leaf(*tiles, keys, blocks, 0.25 * attention.LOG2E, torch.float32))
    nodes = [functools.reduce(attention.merge, parts[i : i + 8]) for i in range(0, len(parts), 8)]
    root = ReductionTree(len(nodes)).reduce(nodes, attention.merge)
    assert_bitwise_equal((root.acc[0, 0, 0] / root.total[0, 0, 0]).view(-1), whole.view(-1))
    chain = functools.reduce(attention.merge, nodes)
    assert not torch.equal(root.acc[0, 0, 0] / root.total[0, 0, 0], chain.acc[0, 0, 0] / chain.total[0, 0, 0])


def test_merging_what_saw_nothing_changes_nothing():
    part = attention.Part(randn(2, 1, 64, seed=0), randn(2, 1, 64, seed=1).abs(), randn(2, 1, 64, 16, seed=2))
    empty = attention.nothing(part.acc)
    for merged in (attention.merge(part, empty), attention.merge(empty, part)):
        for a, b in zip(merged, part, strict=True):
            assert_bitwise_equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(attention.merge(empty, empty), empty, strict=True))


@pytest.mark.parametrize("count", [64, 4096, (1 << 15) + 64, 3 << 15])
def test_exp2_depends_on_the_number_alone(count):
    x = randn(count, seed=5) * 20
    expected = torch.cat([attention.exp2(part.repeat(64))[:1] for part in x[:: count // 64].split(1)])
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert_bitwise_equal(attention.exp2(x.clone())[:: count // 64], expected)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(attention.exp2(torch.tensor([0.0, float("-inf"), 3.0]).repeat(64))[:3], torch.tensor([1.0, 0.0, 8.0]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "queries, keys, heads, groups, width", [(70, 70, 4, 2, 16), (1, 700, 2, 1, 24), (130, 1100, 6, 6, 7), (40, 40, 2, 2, 130)]
)
def test_right(queries, keys, heads, groups, width, causal):
    q, k, v, dout = inputs(keys, heads, groups, width, queries=queries, batch=2)
    found = [t.requires_grad_() for t in (q, k, v)]
    out = functional.core_attention(*found, causal=causal)
    exact = [t.detach().double().permute(1, 2, 0, 3).requires_grad_() for t in found]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    pairs = [(out, expected)]
    gradients = torch.autograd.grad(out, found, dout), torch.autograd.grad(expected, exact, dout.double().permute(1, 2, 0, 3))
    for a, b in (*pairs, *zip(*gradients, strict=True)):
        assert (a.permute(1, 2, 0, 3) - b).norm() <= 2e-6 * b.norm()


# -- forward: one row, however computed ---------------------------------------------------------------------------------------------

EDGES = sorted({edge + d for edge in (BLOCK, LEAF, 2 * LEAF, NODE, NODE + LEAF) for d in (-1, 0, 1)} | {1, 2, NODE + 700})


@functools.cache
def prefill(dtype):
    q, k, v, _ = inputs(max(EDGES), 2, 1, dtype=dtype)
    return q, k, v, functional.core_attention(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_is_prefill_around_every_boundary(dtype):
    q, k, v, whole = prefill(dtype)
    for length in EDGES:
        assert_bitwise_equal(functional.core_attention(q[length - 1 : length], k[:length], v[:length])[0], whole[length - 1], f"{length}")


@pytest.mark.parametrize("chunk", [1, 7, 100, 512])
def test_chunks_are_prefill(chunk):
    q, k, v, whole = prefill(torch.bfloat16)
    length = len(q)
    starts = list(range(0, length, chunk)) if chunk > 50 else list(range(LEAF - 3 * chunk, LEAF + 3 * chunk, chunk))
    starts += [] if chunk > 50 else range(NODE - 3 * chunk, NODE + 3 * chunk, chunk)
    for start in starts:
        rows = slice(start, min(start + chunk, length))
        assert_bitwise_equal(functional.core_attention(q[rows], k[: rows.stop], v[: rows.stop]), whole[rows], f"{rows}")


def test_twin_stock_attention_moves():
    """torch's flash attention on this CPU: a decode has other bytes than the prefill."""
    q, k, v, _ = prefill(torch.float32)
    q, k, v = (t.permute(1, 2, 0, 3)[:, :1] for t in (q, k, v))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    lengths = [length for length in EDGES if length > 60]
    decodes = [torch.nn.functional.scaled_dot_product_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n]) for n in lengths]
    assert any(not torch.equal(a[:, :, 0], whole[:, :, n - 1]) for a, n in zip(decodes, lengths, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_and_batch(dtype):
    whole_inputs = inputs(LEAF + 77, 8, 4, 24, dtype, batch=3)
    whole = gradients(functional.core_attention, *whole_inputs)
    for p, rank, b in ((4, 3, 1), (2, 0, 2), (1, 0, 0)):
        part = gradients(functional.core_attention, *(t.chunk(p, 2)[rank][:, b : b + 1] for t in whole_inputs))
        for name, a, full in zip(("out", "dq", "dk", "dv"), part, whole, strict=True):
            assert_bitwise_equal(a, full.chunk(p, 2)[rank][:, b : b + 1], f"{name}, rank {rank} of {p}, sequence {b}")


def test_groups_of_query_heads_one_by_one():
    """A group's rows share tiles; a head alone with its keys has the same bytes."""
    q, k, v, _ = inputs(200, 6, 2, 24)
    whole = functional.core_attention(q, k, v)
    for head in range(6):
        alone = functional.core_attention(q[:, :, head : head + 1], k[:, :, head // 3 : head // 3 + 1], v[:, :, head // 3 : head // 3 + 1])
        assert_bitwise_equal(alone, whole[:, :, head : head + 1])


def gradients(function, *tensors):
    *leaves, dout = tensors
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def test_twin_stock_gradients_move():
    """What eager attention computes dk by, one product over a head's queries, has other bytes when the keys are fewer."""
    ds, q = randn(LEAF + 77, 300, seed=0), randn(LEAF + 77, 24, seed=1)
    assert not torch.equal((ds.t() @ q)[:1], ds[:, :1].t() @ q)


@pytest.mark.parametrize("causal", [True, False])
def test_packs(causal):
    lengths, gap = [1, LEAF + 5, 0, 64, 130], 3
    firsts = list(itertools.accumulate([n + gap for n in lengths], initial=gap))[:-1]
    total = sum(lengths) + gap * (len(lengths) + 1)
    q, k, v, dout = (t[:, 0] for t in inputs(total, 4, 2, 24))
    rows = [slice(a, a + n) for a, n in zip(firsts, lengths, strict=True)]
    outside = torch.ones(total, dtype=torch.bool)
    for own in rows:
        outside[own] = False
    q, k, v, dout = (t.masked_fill(outside.view(-1, 1, 1), float("nan")) for t in (q, k, v, dout))
    cu, padded = int32(*itertools.accumulate(lengths, initial=0)), int32(*firsts, total)
    packed = functools.partial(
        functional.packed_attention,
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        causal=causal,
    )
    whole = gradients(packed, q, k, v, dout)
    for t in whole:
        assert not t[outside].any()
    for own in rows:
        if own.stop > own.start:
            alone = gradients(functools.partial(functional.core_attention, causal=causal), *(t[own].unsqueeze(1) for t in (q, k, v, dout)))
            for name, a, b in zip(("out", "dq", "dk", "dv"), whole, alone, strict=True):
                assert_bitwise_equal(a[own], b[:, 0], f"{name} of {own}")


def test_a_pack_that_does_not_fit_is_refused_with_its_numbers():
    x = torch.zeros(9, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens overlap.*\[0, 6, 10\].*9 queries"):
        functional.packed_attention(x, x, x, cu_seqlens_q=int32(0, 6, 10), cu_seqlens_kv=int32(0, 6, 10))


# -- paged --------------------------------------------------------------------------------------------------------------------------


class Cache:
    """A cache of NaN with some sequences in it, in shuffled pages."""

    def __init__(self, sequences, size, layout="NHD", seed=0):
        (_, groups, width), dtype = sequences[0][0].shape, sequences[0][0].dtype
        counts = [-(-len(k) // size) for k, _ in sequences]
        pages = sum(counts) + 3
        shape = (pages, 2, size, groups, width) if layout == "NHD" else (pages, 2, groups, size, width)
        self.whole = torch.full(shape, float("nan"), dtype=dtype)
        views = self.whole if layout == "NHD" else self.whole.transpose(2, 3)
        self.caches = views.unbind(1)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int()
        self.table = torch.full((len(sequences), max(counts) + 1), -1, dtype=torch.int32)  # -1: never to be looked at
        for i, (k, v) in enumerate(sequences):
            mine = order[sum(counts[:i]) : sum(counts[: i + 1])]
            self.table[i, : counts[i]] = mine
            position = torch.arange(len(k))
            functional.append_kv(k, v, *self.caches, mine[position // size].long() * size + position % size)

    def attend(self, queries, lengths, **settings):
        starts = int32(*itertools.accumulate(map(len, queries), initial=0))
        return functional.paged_attention(
            torch.cat(queries), *self.caches, block_table=self.table, seq_lens=int32(*lengths), query_start_loc=starts, **settings
        ).split([len(q) for q in queries])


@pytest.mark.parametrize("size, layout", [(16, "NHD"), (32, "HND"), (256, "NHD"), (48, "HND")])
def test_paged_is_prefill(size, layout):
    """Decodes, chunks and a whole prefill in one batch of strangers, each from its own length on, NaN behind it and in unused pages."""
    q, k, v, whole = (t[:, 0] for t in prefill(torch.bfloat16))
    lengths, counts = [NODE + 1, 1, LEAF, LEAF + 1, 700, NODE + LEAF + 1, 65], [1, 1, 7, 1, 100, 512, 65]
    cache = Cache([(k[:n], v[:n]) for n in lengths], size, layout)
    found = cache.attend([q[n - c : n] for n, c in zip(lengths, counts, strict=True)], lengths)
    for out, n, c in zip(found, lengths, counts, strict=True):
        assert_bitwise_equal(out, whole[n - c : n], f"{c} queries of {n}")


def test_paged_heads_of_a_rank_batch_and_padding():
    q, k, v, _ = inputs(LEAF + 90, 8, 4, 24)
    q, k, v = (t[:, 0] for t in (q, k, v))
    whole = functional.core_attention(*(t.unsqueeze(1) for t in (q, k, v)))[:, 0]
    lengths = [LEAF + 90, 33, 200]
    for p, rank in ((1, 0), (2, 1), (4, 2)):
        mine = [t.chunk(p, 1)[rank] for t in (q, k, v)]
        cache = Cache([(mine[1][:n], mine[2][:n]) for n in lengths], 16)
        rows = torch.cat([*(mine[0][n - 2 : n] for n in lengths), torch.full((5, 8 // p, 24), float("nan"))])
        out = torch.full_like(rows, float("nan"))
        padded_table = torch.cat([cache.table, torch.full((2, cache.table.shape[1]), -1, dtype=torch.int32)])
        returned = functional.paged_attention(
            rows, *cache.caches, block_table=padded_table, seq_lens=int32(*lengths, 0, 0), query_start_loc=int32(0, 2, 4, 6, 6, 6), out=out
        )
        assert returned is out
        for i, n in enumerate(lengths):
            assert_bitwise_equal(out[2 * i : 2 * i + 2], whole[n - 2 : n].chunk(p, 1)[rank], f"{n}, rank {rank} of {p}")
            (alone,) = Cache([(mine[1][:n], mine[2][:n])], 32, seed=9).attend([mine[0][n - 1 : n]], [n])
            assert_bitwise_equal(alone, out[2 * i + 1 : 2 * i + 2], "alone")
        assert_bitwise_equal(out[6:], torch.zeros(5, 8 // p, 24), "rows of no request")


def test_paged_without_a_mask():
    q, k, v, _ = (t[:, 0] for t in inputs(150, 4, 2, 24))
    (out,) = Cache([(k, v)], 16).attend([q[:40]], [150], causal=False, scale=0.3)
    assert_bitwise_equal(out, functional.core_attention(*(t.unsqueeze(1) for t in (q[:40], k, v)), causal=False, scale=0.3)[:, 0])


def test_append_leaves_out_negative_slots_and_touches_nothing_else():
    k, v = randn(4, 2, 8, seed=0), randn(4, 2, 8, seed=1)
    cache = torch.zeros(2, 3, 16, 2, 8)
    functional.append_kv(k, v, *cache, torch.tensor([17, -1, 40]))
    assert_bitwise_equal(cache[0, 1, 1], k[0])
    assert_bitwise_equal(cache[1, 2, 8], v[2])
    assert cache.count_nonzero() == 2 * 2 * 2 * 8


def paged_call(**changes):
    call = {
        "query": torch.zeros(3, 4, 8), "key_cache": torch.zeros(5, 16, 2, 8), "value_cache": torch.zeros(5, 16, 2, 8),
        "block_table": torch.zeros(2, 3, dtype=torch.int32), "seq_lens": int32(20, 5), "query_start_loc": int32(0, 2, 3),
    }  # fmt: skip
    call.update(changes)
    return functional.paged_attention(call.pop("query"), call.pop("key_cache"), call.pop("value_cache"), **call)


WHOLE, CACHED = torch.zeros(4, 4, 8), torch.zeros(5, 16, 2, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": torch.zeros(3, 8)}, r"must be \[t, h, d\]"),
        ({"query": torch.zeros(3, 3, 8)}, "g dividing the heads"),
        ({"value_cache": torch.zeros(5, 16, 2, 4)}, "do not fit"),
        ({"key_cache": torch.zeros(5, 16, 2, 8, dtype=torch.float8_e4m3fn)}, "fp8 is not covered"),
        ({"query": torch.zeros(3, 4, 8).bfloat16()}, "dtypes must agree"),
        ({"key_cache": torch.zeros(5, 8, 2, 8), "value_cache": torch.zeros(5, 8, 2, 8)}, "pages of 8 positions"),
        ({"key_cache": torch.zeros(5, 16, 8, 2).mT, "value_cache": torch.zeros(5, 16, 8, 2).mT}, "which must be 1"),
        ({"seq_lens": torch.tensor([20, 5])}, "torch.int32"),
        ({"query_start_loc": int32(0, 2)}, r"\[n \+ 1\]"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"seq_lens": int32(49, 5)}, "at most the 3 x 16 positions"),
        ({"seq_lens": int32(1, 5)}, "request 0 has 2 queries and seq_len 1"),
        ({"query_start_loc": int32(0, 2, 4)}, "leave the 3 rows"),
        ({"query_start_loc": int32(2, 0, 3)}, "must not decrease"),
        ({"block_table": torch.full((2, 3), 5, dtype=torch.int32)}, r"names pages \[5, 5\] of a cache of 5"),
        ({"out": torch.zeros(3, 4, 8).half()}, "must be like query"),
        ({"query": torch.zeros(3, 4, 8, requires_grad=True)}, "no gradient"),
        ({"max_query_len": 1}, "request 0 has 2 queries and seq_len 20, more than max_query_len=1"),
        ({"max_seq_len": 19}, "max_seq_len=19 says"),
        ({"max_query_len": True}, "max_query_len=True must be a whole number"),
        ({"max_seq_len": 20.0}, "max_seq_len=20.0 must be a whole number"),
        ({"max_query_len": -1}, "max_query_len=-1 must be"),
        ({"causal": None}, "causal=None must be True or False"),
        ({"scale": True}, "scale=True must be a number"),
        ({"query": WHOLE[:3], "out": WHOLE[:3]}, "out shares memory"),
        ({"query": WHOLE[:3], "out": WHOLE[1:4]}, "out shares memory"),
        ({"key_cache": CACHED, "out": CACHED.view(-1)[96:192].view(3, 4, 8)}, "out shares memory"),
        ({"out": torch.zeros(1, 4, 8).expand(3, 4, 8)}, "rows of one memory"),
    ],
)
def test_paged_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_call(**changes)


@pytest.mark.parametrize(
    "key, slots, message",
    [
        (torch.zeros(3, 2), [0, 1, 2], r"must be \[t, g, d\]"),
        (torch.zeros(3, 4, 8), [0, 1, 2], "the cache 2"),
        (torch.zeros(3, 2, 8).half(), [0, 1, 2], "dtypes must agree"),
        (torch.zeros(3, 2, 8), [0, 1, 2, 3], "one for each of 3 keys"),
        (torch.zeros(3, 2, 8), [0.0, 1.0], "must be int64"),
        (torch.zeros(3, 2, 8), [0, 80], "slot 80 is past the cache's 80"),
    ],
)
def test_append_refusals(key, slots, message):
    with pytest.raises(ValueError, match=message):
        functional.append_kv(key, key, torch.zeros(5, 16, 2, 8), torch.zeros(5, 16, 2, 8), torch.tensor(slots))


def test_append_wants_two_memories_and_no_gradient():
    key, cache = torch.ones(2, 2, 8), torch.zeros(5, 16, 2, 8)
    for caches in ((cache, cache), (cache, torch.zeros(1, 16, 2, 8).expand(5, -1, -1, -1))):
        with pytest.raises(ValueError, match="one memory"):
            functional.append_kv(key, key, *caches, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="append_kv has no gradient"):
        functional.append_kv(key.clone().requires_grad_(), key, cache, cache.clone(), torch.tensor([0, 1]))
    functional.append_kv(key, key, *torch.zeros(5, 16, 2, 16).split(8, -1), torch.tensor([0, 1]))  # side by side, as vLLM has them


def test_heads_side_by_side_are_no_memory_in_common():
    both = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = paged_call(query=both[:, :4].clone())
    for query, out in ((both[:, :4], both[:, 4:]), (both[:, 4:], both[:, :4])):
        query.copy_(both[:, :4]) if query.data_ptr() != both.data_ptr() else None
        assert_bitwise_equal(paged_call(query=query, out=out), expected)


def test_operators():
    k, v = randn(20, 2, 8, seed=0), randn(20, 2, 8, seed=1)
    caches = Cache([(k, v)], 16)
    arguments = randn(3, 4, 8, seed=2), *caches.caches, caches.table, int32(20), int32(0, 3), 3, 20, 0.5, True
    torch.library.opcheck(torch.ops.tpinv.paged_attention.default, arguments)
    torch.library.opcheck(torch.ops.tpinv.paged_attention_out.default, (*arguments, torch.zeros(3, 4, 8)))
    torch.library.opcheck(torch.ops.tpinv.append_kv.default, (k, v, *torch.zeros(2, 5, 16, 2, 8), torch.arange(20)))
    q = inputs(9, 4, 2, 8)
    torch.library.opcheck(torch.ops.tpinv.core_attention.default, (*(t.requires_grad_() for t in q[:3]), 0.5, True))


def test_a_machine_that_is_not_invariant_is_refused(monkeypatch):
    """The probes look: with rows of another shape for a single query, or with other heads, they find it."""
    real = attention.attend

    def by_rows(q, *others):
        out, lse = real(q, *others)
        return (out * 1.5 if q.shape[1] < 8 else out), lse

    monkeypatch.setattr(attention, "attend", by_rows)
    for probe in (functional_attention().require_invariant, functional_paged().require_paged):
        probe.cache_clear()
    with pytest.raises(ValueError, match="not invariant on this CPU.*output differs between chunks of queries"):
        functional.core_attention(*inputs(5)[:3])
    with pytest.raises(ValueError, match="1 queries over pages of 16 differ from one prefill"):
        paged_call()
    for probe in (functional_attention().require_invariant, functional_paged().require_paged):
        probe.cache_clear()


def functional_attention():
    import tpinv.ops.attention as module

    return module


def functional_paged():
    import importlib

    return importlib.import_module("tpinv.ops.paged_attention")
