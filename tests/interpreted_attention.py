"""Attention's Triton kernels under Triton's interpreter, on a CPU. Run by test_kernels_interpreter.py.

Products are NumPy's here, whose bits follow a tile's shape; so bytes are compared between kernels on numbers whose products are exact
(small integers for queries and keys; one value a column and block), and to the reference within rounding elsewhere.
"""

import itertools

import fast_interpreter  # noqa: F401
import pytest
import torch

from tpinv import contract
from tpinv.kernels.attention import decode, forward, paged
from tpinv.reference import attention as reference
from tpinv.testing import assert_bitwise_equal

BLOCK = contract.ATTENTION_BLOCK
WIDTH = 16


def exact(length, heads=2, groups=1, queries=None, seed=0):
    """q, k, v of which every product is exact in fp32, whatever its order: scores are sums of small integers; a column of v has one value
    in every 16 keys that is not zero, a power of two, so that p v adds numbers in one order only: that of the blocks of keys."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-3, 4, (queries or length, heads, WIDTH), generator=g).float()
    k = torch.randint(-3, 4, (length, groups, WIDTH), generator=g).float()
    position = torch.arange(length)
    v = torch.zeros(length, groups, WIDTH)
    for column in range(WIDTH):
        chosen = position % BLOCK == (column * 5 + 3) % BLOCK
        v[chosen, :, column] = torch.exp2(torch.randint(-3, 4, (int(chosen.sum()), groups), generator=g).float()) + 0.125
    return q, k, v


def through_numpy(monkeypatch):
    """exp2 and log2 of the reference as the interpreter's are."""
    import numpy as np

    monkeypatch.setattr(reference, "exp2", lambda x: torch.from_numpy(np.exp2(x.numpy())))


def dense(q, k, v, causal=True, pack=None, **settings):
    return forward.triton_forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, causal, pack, **settings)[0][:, 0]


def paged_of(sequences, size, queries, causal=True, longest=None, strided=False, **settings):
    """[(q, k, v, keys)] of requests with NaN behind their keys and in unused pages, -1 in the table there; the last queries of each."""
    counts = [-(-keys // size) for *_, keys in sequences]
    pages = sum(counts) + 2
    groups = sequences[0][1].shape[1]
    whole = torch.full((pages, 2, groups, size, WIDTH) if strided else (pages, 2, size, groups, WIDTH), float("nan"))
    caches = (whole.transpose(2, 3) if strided else whole).unbind(1)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()
    table = torch.full((len(sequences), max(counts) + 1), -1, dtype=torch.int32)
    rows = []
    for i, ((q, k, v, keys), count) in enumerate(zip(sequences, queries, strict=True)):
        table[i, : counts[i]] = order[sum(counts[:i]) : sum(counts[: i + 1])]
        position = torch.arange(keys)
        slots = table[i][position // size].long() * size + position % size
        paged.append(k[:keys], v[:keys], *caches, slots)
        rows.append(q[keys - count : keys])
    starts = torch.tensor(list(itertools.accumulate(queries, initial=0)), dtype=torch.int32)
    lens = torch.tensor([keys for *_, keys in sequences], dtype=torch.int32)
    query = torch.cat([*rows, torch.full((3, *rows[0].shape[1:]), float("nan"))])  # padding
    out = torch.full_like(query, float("nan"))
    paged.forward(query, *caches, table, lens, starts, max(queries), longest or int(lens.max()), 0.25, causal, out, **settings)
    assert_bitwise_equal(out[-3:], torch.zeros_like(out[-3:]), "rows of no request")
    return out[:-3].split(list(queries))


@pytest.mark.parametrize("length", [1, 63, 130, 520, 600])
@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_the_kernel(length, causal, monkeypatch):
    """Byte for byte, where products are exact: recurrence, sum over a block, leaves, fma, division."""
    through_numpy(monkeypatch)
    q, k, v = exact(length, queries=min(length, 40))
    expected, _ = reference.forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, causal)
    assert_bitwise_equal(dense(q, k, v, causal), expected[:, 0])


def test_the_tree_of_nodes_is_the_references(monkeypatch):
    """Leaves of 64 keys make nodes of 512: five of them and a piece, through what is parked in scratch, and through the decode's merge."""
    through_numpy(monkeypatch)
    monkeypatch.setattr(reference, "ATTENTION_LEAF", BLOCK)
    q, k, v = exact(5 * 8 * BLOCK + 100, queries=3)
    expected, _ = reference.forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, True)
    assert_bitwise_equal(dense(q, k, v, leaf=BLOCK), expected[:, 0])
    q_all = torch.cat([torch.zeros(len(k) - 3, *q.shape[1:]), q])
    (out,) = paged_of([(q_all, k, v, len(k))], 32, [3], leaf=BLOCK)
    assert_bitwise_equal(out, expected[:, 0])
    monkeypatch.setattr(decode, "UNITS", 1)  # units are nodes
    (out,) = paged_of([(q_all, k, v, len(k))], 32, [3], leaf=BLOCK)
    assert_bitwise_equal(out, expected[:, 0])
    monkeypatch.setattr(paged, "DECODED", 1)  # tiles of rows
    monkeypatch.setattr(paged, "BESIDE", 0)
    (out,) = paged_of([(q_all, k, v, len(k))], 32, [3], leaf=BLOCK)
    assert_bitwise_equal(out, expected[:, 0])


@pytest.mark.parametrize("size, strided", [(16, False), (48, True), (128, False)])
def test_paged_requests_have_the_bytes_of_one_prefill(size, strided, monkeypatch):
    """Strangers of all lengths in one batch: decodes, a few queries, a request of none; then the same beside a prefill of another kernel."""
    monkeypatch.setattr(reference, "ATTENTION_LEAF", BLOCK)
    q, k, v = exact(210, 4, 2)
    whole = dense(q, k, v, leaf=BLOCK)
    lengths, queries = [210, 1, 64, 129, 65], [1, 1, 3, 2, 5]
    for found, n, c in zip(
        paged_of([(q, k, v, n) for n in lengths], size, queries, strided=strided, leaf=BLOCK), lengths, queries, strict=True
    ):
        assert_bitwise_equal(found, whole[n - c : n], f"{c} queries of {n}")
    monkeypatch.setattr(paged, "DECODED", 2)
    queries[0] = 40
    for found, n, c in zip(
        paged_of([(q, k, v, n) for n in lengths], size, queries, strided=strided, leaf=BLOCK), lengths, queries, strict=True
    ):
        assert_bitwise_equal(found, whole[n - c : n], f"{c} queries of {n}, beside others")


def test_chunks_heads_and_packs():
    q, k, v = exact(550, 2, 2)
    whole = dense(q, k, v, leaf=BLOCK)
    for start, stop in ((0, 7), (520, 550), (63, 65), (511, 514)):
        assert_bitwise_equal(dense(q[start:stop], k[:stop], v[:stop], leaf=BLOCK), whole[start:stop], f"{start}:{stop}")
    assert_bitwise_equal(dense(q[:100, 1:], k[:100, 1:], v[:100, 1:], leaf=BLOCK), whole[:100, 1:], "heads")
    cu = torch.tensor([0, 130, 130, 170], dtype=torch.int32)
    for longest in (170, 600):  # more than 8 leaves: the tree's kernel
        packed = dense(q[:170], k[:170], v[:170], pack=reference.Pack(cu, cu, cu, cu, 130, longest), leaf=BLOCK)
        assert_bitwise_equal(packed[:130], whole[:130])
        assert_bitwise_equal(packed[130:], dense(q[130:170], k[130:170], v[130:170], leaf=BLOCK))


def test_without_a_mask_and_right():
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(150, heads, WIDTH, generator=g) for heads in (4, 2, 2))
    (found,) = paged_of([(q, k, v, 150)], 16, [5], causal=False)
    expected, _ = reference.forward(*(t.unsqueeze(1) for t in (q[-5:], k, v)), 0.25, False)
    assert (found - expected[:, 0]).norm() <= 1e-6 * expected.norm()


def test_lengths_past_the_bounds_are_nan_and_not_silence():
    q, k, v = exact(200, 2, 1)
    ours, other = paged_of([(q, k, v, 200), (q, k, v, 30)], 16, [1, 1], longest=150)
    assert ours.isnan().all()
    assert_bitwise_equal(other, dense(q[:30], k[:30], v[:30])[-1:])


def test_fewer_keys_than_queries_are_nan():
    caches = torch.zeros(2, 4, 16, 1, WIDTH)
    query, out = torch.ones(6, 2, WIDTH), torch.empty(6, 2, WIDTH)
    numbers = [torch.tensor(x, dtype=torch.int32) for x in ([3, 0], [0, 4, 6])]
    paged.forward(query, *caches, torch.zeros(2, 2, dtype=torch.int32), *numbers, 4, 32, 0.25, True, out)
    assert out[:4].isnan().all() and not out[4:].any()


def test_append():
    g = torch.Generator().manual_seed(3)
    key, value = torch.randn(5, 2, 2, 24, generator=g).unbind(1)
    cache = torch.zeros(2, 3, 16, 2, 24)
    paged.append(key, value, *cache, torch.tensor([17, -1, 40, 48, 0]))
    expected = torch.zeros_like(cache)
    for i, (page, row) in ((0, (1, 1)), (2, (2, 8)), (4, (0, 0))):
        expected[0, page, row], expected[1, page, row] = key[i], value[i]
    assert_bitwise_equal(cache, expected)
