"""Attention by leaves on an NVIDIA GPU: one set of bytes, at lengths up to 70,000, for prefill, chunks, decode and pages. ``make test-gpu``."""

import functools

import pytest
import torch

from tpinv import contract, functional
from tpinv.testing import assert_bitwise_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LONGEST = 70_000
BLOCK, LEAF, NODE = contract.ATTENTION_BLOCK, contract.ATTENTION_LEAF, contract.ATTENTION_LEAF * contract.ATTENTION_NODE
EDGES = sorted(
    {
        edge + d
        for edge in (BLOCK, 2 * BLOCK, LEAF, 2 * LEAF, NODE, NODE + LEAF, *(n * NODE for n in (2, 3, 4, 5, 8, 9, 16)))
        for d in (-1, 0, 1)
    }
    | {1, 2, 3, 17, 50_001, LONGEST - 1, LONGEST}
)


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32, device="cuda")


@functools.lru_cache(maxsize=1)
def prefill(width, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(LONGEST, heads, width, device="cuda", generator=generator).to(dtype) for heads in (4, 2, 2))
    q = q * 2
    return q, k, v, functional.core_attention(*(t.unsqueeze(1) for t in (q, k, v))).squeeze(1)


def paged(keys, values, size):
    """The caches, shuffled, NaN behind the last position, and the table of one request."""
    pages = -(-len(keys) // size)
    order = torch.randperm(pages + 2, device="cuda")[:pages]
    caches = [torch.full((pages + 2, size, *keys.shape[1:]), float("nan"), device="cuda", dtype=keys.dtype) for _ in range(2)]
    position = torch.arange(len(keys), device="cuda")
    functional.append_kv(keys, values, *caches, order[position // size] * size + position % size)
    return caches, order.int()


@pytest.mark.parametrize("width, dtype", [(128, torch.bfloat16), (64, torch.float16), (96, torch.bfloat16), (256, torch.bfloat16)])
@pytest.mark.parametrize("size", [16, 32, 256])
def test_decodes_of_every_length_in_one_batch(width, dtype, size):
    q, k, v, whole = prefill(width, dtype)
    caches, order = paged(k, v, size)
    for queries in (1, 3, 40):
        ends = [n for n in EDGES if n >= queries]
        rows = torch.cat([torch.arange(n - queries, n) for n in ends]).cuda()
        out = functional.paged_attention(
            q[rows], *caches, block_table=order.expand(len(ends), -1), seq_lens=int32(ends), max_query_len=queries, max_seq_len=LONGEST,
            query_start_loc=int32(range(0, queries * len(ends) + 1, queries)),
        )  # fmt: skip
        assert_bitwise_equal(out, whole[rows], f"{queries} queries")


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("length", [1, 500, 9000, 40_000])
def test_units_of_leaves_and_of_nodes(count, length):
    """Few requests are split by leaves, many by nodes: the same bytes; NaN behind the length; heads of a rank."""
    q, k, v, whole = prefill(128, torch.bfloat16)
    for part in (slice(0, 4), slice(0, 2), slice(2, 4)):
        groups = slice(part.start // 2, part.stop // 2)
        caches, order = paged(k[:length, groups], v[:length, groups], 16)
        out = functional.paged_attention(
            q[length - 1 : length, part].expand(16 * count, -1, -1), *caches, block_table=order.expand(16 * count, -1),
            seq_lens=int32([length] * 16 * count), query_start_loc=int32(range(16 * count + 1)), max_query_len=1,
        )  # fmt: skip
        assert_bitwise_equal(out, whole[length - 1 : length, part].expand_as(out), f"heads {part}")


@pytest.mark.parametrize("width, dtype", [(128, torch.bfloat16), (64, torch.float16), (96, torch.bfloat16), (256, torch.bfloat16)])
@pytest.mark.parametrize("rows", [8, 16])
def test_the_decode_in_cuda_is_the_one_that_runs(width, dtype, rows):
    """Else every other test here would pass by Triton's. Units of leaves and of nodes, a refused request, padding: decode._same_bytes."""
    from tpinv.kernels.attention import decode, sm90_decode

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    spec = sm90_decode.Spec(width, rows, dtype)
    assert decode._verified(spec, torch.device("cuda", 0))


@pytest.mark.parametrize("chunk", [7, 100, 512, 4096])
def test_chunks_dense_and_paged(chunk):
    q, k, v, whole = prefill(128, torch.bfloat16)
    caches, order = paged(k, v, 32)
    for start in (0, 60, 500, 4090, 8000, 65_500 - chunk, LONGEST - chunk):
        stop = start + chunk
        dense = functional.core_attention(*(t.unsqueeze(1) for t in (q[start:stop], k[:stop], v[:stop]))).squeeze(1)
        assert_bitwise_equal(dense, whole[start:stop], f"dense, {start}")
        beside = torch.cat([q[start:stop], q[199:200]])  # a decode in the same batch
        out = functional.paged_attention(
            beside, *caches, block_table=order.expand(2, -1), seq_lens=int32([stop, 200]), query_start_loc=int32([0, chunk, chunk + 1])
        )
        assert_bitwise_equal(out, torch.cat([whole[start:stop], whole[199:200]]), f"paged, {start}")


def test_a_graph_serves_other_lengths_and_200_repeats():
    q, k, v, whole = prefill(128, torch.bfloat16)
    caches, order = paged(k, v, 16)
    table, lens, starts = order.expand(8, -1).contiguous(), int32([1] * 8), int32(range(9))
    query = q[:8].clone()
    call = functools.partial(
        functional.paged_attention, query, *caches, block_table=table, seq_lens=lens, query_start_loc=starts, max_query_len=1
    )
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ends = torch.randint(1, LONGEST, (8,), generator=generator).cuda()
        ends[5:] = 0  # padding
        query.copy_(q[(ends - 1).clamp(min=0)])
        lens.copy_(ends)
        starts.copy_(int32([0, 1, 2, 3, 4, 5, 5, 5, 5]))
        graph.replay()
        assert_bitwise_equal(out[:5], whole[ends[:5] - 1])
        assert not out[5:].any()


def test_twin_stock_decode_moves():
    q, k, v, _ = prefill(128, torch.bfloat16)
    n = 9000
    dense = [t[:n].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        whole = torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=True)
        last = torch.nn.functional.scaled_dot_product_attention(dense[0][:, :, -1:], *dense[1:], enable_gqa=True)
    assert not torch.equal(last, whole[:, :, -1:])


@pytest.mark.parametrize("length", [700, 9000])
def test_gradients_over_heads_batch_and_reruns(length):
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, dout = (torch.randn(length, 2, heads, 128, device="cuda", generator=generator).bfloat16() for heads in (8, 4, 4, 8))

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        out = functional.core_attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    whole = run(q, k, v, dout)
    for p, rank, b in ((1, 0, 0), (2, 1, 1), (4, 2, 0)):
        part = run(*(t.chunk(p, 2)[rank][:, b : b + 1] for t in (q, k, v, dout)))
        for name, a, full in zip(("out", "dq", "dk", "dv"), part, whole, strict=True):
            assert_bitwise_equal(a, full.chunk(p, 2)[rank][:, b : b + 1], f"{name}, rank {rank} of {p}")
    for a, b in zip(run(q, k, v, dout), whole, strict=True):
        assert_bitwise_equal(a, b, "a rerun")
