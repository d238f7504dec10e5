"""Sliding windows, capped scores and sinks in the Triton kernels under Triton's interpreter, on a CPU. Run by test_kernels_interpreter.py.

Numbers whose products are exact, as in interpreted_attention.py, so that bytes can be compared between kernels and with the reference.
"""

import itertools

import fast_interpreter  # noqa: F401
import pytest
import torch
from interpreted_attention import BLOCK, WIDTH, exact, through_numpy

from tpinv.kernels.attention import backward, decode, forward, paged
from tpinv.reference import attention as reference
from tpinv.reference import attention_backward as reference_backward
from tpinv.reference.attention import Options, Pack
from tpinv.testing import assert_bitwise_equal

SINKS = torch.tensor([1.5, -0.5])
KINDS = {
    "window": Options(window=100),
    "one key": Options(window=1),
    "softcap": Options(softcap=2.0),
    "sinks": Options(sinks=SINKS),
    "all": Options(64, 3.0, SINKS),
}


def dense(q, k, v, options, pack=None, **settings):
    return forward.triton_forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, True, pack, options=options, **settings)[0][:, 0]


def paged_of(sequences, size, queries, options, **settings):
    """[(q, k, v, keys)] of requests in a cache that is NaN, and a table that is -1, behind their keys and before their windows."""
    window = options.window or 1 << 30
    counts = [-(-keys // size) for *_, keys in sequences]
    pages, groups = sum(counts) + 2, sequences[0][1].shape[1]
    caches = torch.full((2, pages, size, groups, WIDTH), float("nan"))
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()
    table = torch.full((len(sequences), max(counts) + 1), -1, dtype=torch.int32)
    for i, ((_, k, v, keys), count) in enumerate(zip(sequences, queries, strict=True)):
        low = max(0, keys - count + 1 - window)
        mine = order[sum(counts[:i]) : sum(counts[: i + 1])]
        table[i, low // size : counts[i]] = mine[low // size :]
        at = torch.arange(low, keys)
        paged.append(k[low:keys], v[low:keys], *caches, mine[at // size].long() * size + at % size)
    starts, lens = (
        torch.tensor(t, dtype=torch.int32) for t in (list(itertools.accumulate(queries, initial=0)), [n for *_, n in sequences])
    )
    query = torch.cat([q[keys - count : keys] for (q, _, _, keys), count in zip(sequences, queries, strict=True)])
    out = torch.full_like(query, float("nan"))
    paged.forward(query, *caches, table, lens, starts, max(queries), int(lens.max()), 0.25, True, out, options=options, **settings)
    return out.split(list(queries))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [63, 600])
def test_the_reference_is_the_kernel(kind, length, monkeypatch):
    through_numpy(monkeypatch)
    q, k, v = exact(length, queries=40)
    expected, lse = reference.forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, True, None, KINDS[kind])
    found = forward.triton_forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, True, options=KINDS[kind])
    assert_bitwise_equal(found[0], expected)
    assert (found[1] - lse).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 1, 65, 512, 1100, 2000])
def test_the_tree_of_nodes_is_the_references(window, monkeypatch):
    """Leaves of 64 keys make nodes of 512, five of them and a piece: windows that begin in each of them, at their edges, and in none."""
    through_numpy(monkeypatch)
    monkeypatch.setattr(reference, "ATTENTION_LEAF", BLOCK)
    options = Options(window, 3.0, SINKS)
    q, k, v = exact(5 * 8 * BLOCK + 100, queries=3)
    expected, _ = reference.forward(*(t.unsqueeze(1) for t in (q, k, v)), 0.25, True, None, options)
    assert_bitwise_equal(dense(q, k, v, options, leaf=BLOCK), expected[:, 0], "by tiles")
    q_all = torch.cat([torch.zeros(len(k) - 3, *q.shape[1:]), q])
    for units in (decode.UNITS, 1):  # of leaves, of nodes
        monkeypatch.setattr(decode, "UNITS", units)
        (out,) = paged_of([(q_all, k, v, len(k))], 32, [3], options, leaf=BLOCK)
        assert_bitwise_equal(out, expected[:, 0], f"a decode, {units} units")
    monkeypatch.setattr(paged, "DECODED", 1)
    monkeypatch.setattr(paged, "BESIDE", 0)
    (out,) = paged_of([(q_all, k, v, len(k))], 32, [3], options, leaf=BLOCK)
    assert_bitwise_equal(out, expected[:, 0], "a prefill over pages")


@pytest.mark.parametrize("kind, size", [("window", 128), ("all", 16)])
def test_paged_requests_have_the_bytes_of_one_prefill(kind, size, monkeypatch):
    options = KINDS[kind]
    q, k, v = exact(210, 2, 1)
    whole = dense(q, k, v, options, leaf=BLOCK)
    lengths, queries = [210, 1, 64, 129, 65], [1, 1, 3, 2, 5]
    for beside in (False, True):
        if beside:
            monkeypatch.setattr(paged, "DECODED", 2)
            queries[0] = 40
        found = paged_of([(q, k, v, n) for n in lengths], size, queries, options, leaf=BLOCK)
        for out, n, c in zip(found, lengths, queries, strict=True):
            assert_bitwise_equal(out, whole[n - c : n], f"{c} queries of {n}")


def test_chunks_heads_and_packs():
    options = KINDS["all"]
    q, k, v = exact(550, 2, 2)
    whole = dense(q, k, v, options, leaf=BLOCK)
    for start, stop in ((0, 7), (520, 550), (63, 65), (511, 514)):
        assert_bitwise_equal(dense(q[start:stop], k[:stop], v[:stop], options, leaf=BLOCK), whole[start:stop], f"{start}:{stop}")
    alone = options._replace(sinks=SINKS[1:])
    assert_bitwise_equal(dense(q[:100, 1:], k[:100, 1:], v[:100, 1:], alone, leaf=BLOCK), whole[:100, 1:], "heads")
    cu = torch.tensor([0, 130, 130, 170], dtype=torch.int32)
    for longest in (170, 600):
        packed = dense(q[:170], k[:170], v[:170], options, pack=Pack(cu, cu, cu, cu, 130, longest), leaf=BLOCK)
        assert_bitwise_equal(packed[:130], whole[:130])
        assert_bitwise_equal(packed[130:], dense(q[130:170], k[130:170], v[130:170], options, leaf=BLOCK))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [130, 50])
def test_gradients_are_the_references(kind, queries):
    """Within rounding: products are NumPy's here. Windows skip blocks on both sides; with fewer queries than keys too."""
    g = torch.Generator().manual_seed(3)
    q, dout = (torch.randn(queries, 2, 2, WIDTH, generator=g) for _ in range(2))
    k, v = (torch.randn(130, 2, 1, WIDTH, generator=g) for _ in range(2))
    out, lse = reference.forward(q, k, v, 0.25, True, None, KINDS[kind])
    expected = reference_backward.backward(q, k, v, out, lse, dout, 0.25, True, None, KINDS[kind])
    found = backward.backward(q, k, v, out, lse, dout, 0.25, True, None, KINDS[kind])
    assert len(found) == len(expected) == 3 + (KINDS[kind].sinks is not None)
    for name, a, b in zip(("dq", "dk", "dv", "dsinks"), found, expected, strict=False):
        assert (a - b).norm() <= 3e-6 * (b.norm() + dout.norm()), name


def test_rows_of_no_sequence_add_nothing_to_the_gradient_of_sinks():
    g = torch.Generator().manual_seed(3)
    q, dout = (torch.randn(50, 1, 2, WIDTH, generator=g) for _ in range(2))
    k, v = (torch.randn(50, 1, 1, WIDTH, generator=g) for _ in range(2))
    cu, first = (torch.tensor(t, dtype=torch.int32) for t in ([0, 20, 40], [0, 25, 50]))
    for t in (q, k, v, dout):
        t[20:25] = t[45:] = float("nan")
    pack, options = Pack(cu, cu, first, first, 20, 20), Options(sinks=SINKS)
    out, lse = forward.forward(q, k, v, 0.25, True, pack, options)
    *_, found = backward.backward(q, k, v, out, lse, dout, 0.25, True, pack, options)
    parts = []
    for rows in (slice(0, 20), slice(25, 45)):
        mine = q[rows], k[rows], v[rows]
        parts.append(backward.backward(*mine, *forward.forward(*mine, 0.25, True, None, options), dout[rows], 0.25, True, None, options)[3])
    assert (found - sum(parts)).norm() <= 1e-5 * found.norm()
