"""The collectives over shared memory, on GPUs: bytes, order, skew, graphs, streams, a peer that never comes.

Most of it runs p ranks in one process (one_gpu.py); the rest in p processes that share real symmetric memory.
"""

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist
from hostile import hostile, sum_of
from one_gpu import OneGpu, same_bytes, subtree_values

from tpinv import reference, rms_norm, row_parallel_add_rms_norm, row_parallel_linear, tree_all_reduce, tree_reduce_scatter
from tpinv.collectives import nvlink, refuse, resolve, schedule, symmetric
from tpinv.collectives.group import state_of
from tpinv.runtime import cuda
from tpinv.testing import RankPool, assert_bitwise_equal, compare, order_probe, tree_shape
from tpinv.tree import ReductionTree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ALGORITHMS = ("one_shot", "two_shot")
TREES = {2: (2, 8, 24), 3: (3, 24), 4: (8, 24), 6: (6, 24), 8: (8, 24)}  # L = 24 gives two values a rank at p = 2, 4, 8
CASES = [(p, leaves, node) for p, many in TREES.items() for leaves in many for node in ("float32", "bfloat16")]


@functools.cache
def ranks(p: int) -> OneGpu:
    if cuda.missing(symmetric.SOURCE):
        pytest.skip(cuda.missing(symmetric.SOURCE))
    return OneGpu(p)


def leaf_values(kind: str, tree: ReductionTree, *shape: int, seed: int = 1) -> torch.Tensor:
    return hostile(kind, (tree.leaves, *shape), reference.torch_node_dtype(tree), seed).cuda()


def expected_sum(leaves: torch.Tensor, tree: ReductionTree, out_dtype: torch.dtype) -> torch.Tensor:
    return reference.finish(subtree_values(leaves, tree, 1)[0], tree, tree.subtrees(0, 1), out_dtype)


@pytest.mark.parametrize("p, leaves, node", CASES)
def test_same_bytes_as_the_reference(p, leaves, node):
    tree, group, differs = ReductionTree(leaves, node), ranks(p), 0
    for shape in ((1,), (7,), (48, 5), (24, 64), (20_001,), (24 * 40, 130)):
        for kind in ("exponents", "cancellation", "specials", "nonfinite") if shape == (48, 5) else ("exponents",):
            data = leaf_values(kind, tree, *shape)
            values = subtree_values(data, tree, p)
            differs += not same_bytes(data.float().sum(0), expected_sum(data, tree, torch.float32))
            for out_dtype in (torch.bfloat16, torch.float32, torch.float16) if shape == (48, 5) else (torch.bfloat16,):
                expected = expected_sum(data, tree, out_dtype)
                for algorithm in (None, *ALGORITHMS):
                    if algorithm == "one_shot" and schedule.first_values(tree, p)[-1] * expected.numel() * 8 > schedule.INBOX_BYTES:
                        continue
                    for rank, actual in enumerate(group.tree_reduce(values, tree, out_dtype, False, algorithm)):
                        assert same_bytes(actual, expected), (shape, kind, out_dtype, algorithm, rank)
                    if shape[0] % p == 0:
                        parts = group.tree_reduce(values, tree, out_dtype, True, algorithm)
                        assert same_bytes(torch.cat(parts), expected), (shape, kind, out_dtype, algorithm)
    assert differs or p < 4  # the stock sum adds in another order: these inputs can tell


@pytest.mark.parametrize("p", [2, 3, 8])
def test_messages_longer_than_a_slot(p):
    tree, group = ReductionTree(24), ranks(p)
    data = leaf_values("exponents", tree, 24 * 100, 1000)
    values, expected = subtree_values(data, tree, p), expected_sum(data, tree, torch.bfloat16)
    try:
        for workspace in group.ranks:
            workspace.bulk_bytes = 1 << 20
        for _ in range(2):
            for actual in group.tree_reduce(values, tree, torch.bfloat16, False):
                assert same_bytes(actual, expected)
            assert same_bytes(torch.cat(group.tree_reduce(values, tree, torch.bfloat16, True)), expected)
    finally:
        for workspace in group.ranks:
            workspace.bulk_bytes = schedule.BULK_BYTES


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("p, leaves, node", [(2, 24, "float32"), (4, 8, "bfloat16"), (6, 6, "float32"), (8, 24, "float32")])
def test_probe_finds_the_tree(p, leaves, node, algorithm):
    tree, group = ReductionTree(leaves, node), ranks(p)

    def total(probes):
        probes = torch.nn.functional.pad(probes, (0, 0, 0, -len(probes) % 24)).t().contiguous().cuda()
        values = subtree_values(probes, tree, p)
        every = group.tree_reduce(values, tree, torch.float32, False, algorithm)
        assert all(same_bytes(a, every[0]) for a in every)
        return every[0].cpu()

    assert order_probe(lambda probes: total(probes)[: len(probes)], leaves, batched=True) == tree_shape(tree)


def test_skewed_arrival(iterations=10_000):
    """Ranks that come late by random times, sizes and algorithms in turn, fresh values every time: stale memory would show."""
    p, tree = 4, ReductionTree(8)
    group, g = ranks(p), torch.Generator().manual_seed(0)
    sizes = [
        (512, "one_shot", False),
        (40_000, "two_shot", False),
        (4096, "one_shot", True),
        (120_000, "two_shot", True),
        (64, None, False),
    ]
    cases = []
    for size, algorithm, scatter in sizes:
        data = [leaf_values("normal", tree, size, seed=seed) for seed in range(3)]
        cases += [(subtree_values(d, tree, p), expected_sum(d, tree, torch.bfloat16), algorithm, scatter) for d in data]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(p)]

    def count(rank, actual, right):
        wrong[rank] += (actual.view(torch.int16) != right.view(torch.int16)).sum()

    # CUDA loads a kernel when it is first launched, and may wait for those that run: here they wait for what comes after.
    torch.cuda._sleep(1)
    for values, expected, algorithm, scatter in cases:
        for rank, actual in enumerate(group.tree_reduce(values, tree, torch.bfloat16, scatter, algorithm)):
            count(rank, actual, expected.chunk(p)[rank] if scatter else expected)
    torch.cuda.synchronize()
    delays = torch.randint(0, 20_000, (iterations, p), generator=g)
    delays[torch.rand(iterations, p, generator=g) < 0.7] = 0
    for i in range(iterations):
        values, expected, algorithm, scatter = cases[(i * 7) % len(cases)]
        for rank, (workspace, stream) in enumerate(zip(group.ranks, group.streams, strict=True)):
            with torch.cuda.stream(stream):
                if delay := int(delays[i, rank]):
                    torch.cuda._sleep(delay)
                actual = nvlink.tree_reduce(workspace, values[rank], tree, torch.bfloat16, scatter, algorithm)
                count(rank, actual, expected.chunk(p)[rank] if scatter else expected)
    torch.cuda.synchronize()
    assert [int(w) for w in wrong] == [0] * p


@pytest.mark.parametrize("node", ["float32", "bfloat16"])
@pytest.mark.parametrize("p, rows, width", [(2, 5, 4096), (4, 3, 5120), (3, 200, 64), (8, 2, 8192), (2, 2, 14336)])
def test_fused_norm_has_the_bytes_of_the_separate_operations(p, rows, width, node):
    tree, group = ReductionTree(24, node), ranks(p)
    for dtype, weight_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        data = leaf_values("normal", tree, rows, width)
        values, reduced = subtree_values(data, tree, p), expected_sum(data, tree, dtype)
        residual, weight = (hostile("normal", s, d, 3).cuda() for s, d in (((rows, width), dtype), ((width,), weight_dtype)))
        hidden = residual + reduced
        x = hidden.float()
        scale = torch.rsqrt(reference.row_sum(x * x) / width + 1e-5).unsqueeze(-1)
        normed = (x * scale * weight.float()).to(dtype)
        for actual in group.run(lambda w, v=values, r=residual, g=weight: nvlink.add_norm(w, v[w.rank], r, g, 1e-5, tree)):
            assert same_bytes(actual[0], hidden) and same_bytes(actual[1], normed), (dtype, weight_dtype)


# -- processes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def sharing_gpus():
    """The default group of ranks that may share GPUs. Told to these processes alone: those of other tests take the ProcessGroup then."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    group = resolve()
    torch.cuda.set_device(group.rank % torch.cuda.device_count())
    return group


def shared_memory() -> dict:
    """On p processes over the GPUs there are: everything that does not show in one process."""
    group = sharing_gpus()
    device = torch.device("cuda", torch.cuda.current_device())
    tree, out = ReductionTree(24), {}
    data = leaf_values("exponents", tree, 48, 50)
    mine, expected = subtree_values(data, tree, group.size)[group.rank], expected_sum(data, tree, torch.bfloat16)
    began = time.monotonic()
    out["all"] = tree_all_reduce(mine, tree=tree, out_dtype=torch.bfloat16)
    out["scattered"] = tree_reduce_scatter(mine, tree=tree, out_dtype=torch.bfloat16)
    workspace, decision = symmetric.agreement(group, device)
    out["decision"], out["seconds"] = (decision.backend, decision.reason), time.monotonic() - began
    owned = tree.owned(group.rank, group.size)
    out["expected"], out["gloo"] = expected, sum_of(data[owned.start : owned.stop].sum(0).cpu())
    out["float32"] = tree_all_reduce(mine, tree=tree)
    if workspace is None:
        return out
    with torch.inference_mode():
        out["inference"] = tree_all_reduce(mine, tree=tree, out_dtype=torch.bfloat16)
        whole = [hostile("normal", shape, torch.bfloat16, seed) for seed, shape in enumerate(((6, 384), (64, 384), (6, 64), (64,)))]
        x, w, residual, norm = (t.chunk(group.size, 1)[group.rank].cuda() if t.shape[-1] == 384 else t.cuda() for t in whole)
        out["fused"] = row_parallel_add_rms_norm(x, w, residual, norm, tree=tree)
        hidden = residual + row_parallel_linear(x, w, tree=tree)
        out["separate"] = hidden, rms_norm(hidden, norm, tree=tree)
    big = mine.repeat(1, 40, 8)  # two-shot
    out["two_shot"] = tree_all_reduce(big, tree=tree, out_dtype=torch.bfloat16)[:48, :50]
    # A graph: captured once, replayed with new values.
    static, graph = mine.clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        once = tree_all_reduce(static, tree=tree, out_dtype=torch.bfloat16)
        twice = tree_all_reduce(static.repeat(1, 40, 8), tree=tree, out_dtype=torch.bfloat16)
    for factor in (1.0, 2.0, 4.0):
        static.copy_(mine * factor)
        graph.replay()
        out[f"graph {factor}"] = (once / factor).clone(), (twice[:48, :50] / factor).clone()
    # Streams take turns without waiting for each other; a second group has its own workspace.
    other, streams = dist.new_group(), [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for i in range(9):
        with torch.cuda.stream(streams[i % 3]):
            out[f"stream {i}"] = tree_all_reduce(mine, tree=tree, group=other if i % 2 else None, out_dtype=torch.bfloat16)
    torch.cuda.synchronize()
    out["workspaces"] = symmetric.workspace(resolve(other), device) is not workspace
    return out


@pytest.mark.parametrize("p", [8, 6, 4, 3, 2])  # downwards: torch counts rendezvous by process, and all must have had as many
def test_processes_over_shared_memory(pool, p):
    results = pool.run(shared_memory, p, timeout=150)
    print(p, results[0]["decision"], results[0]["seconds"])
    for rank, result in enumerate(results):
        assert result["decision"][0] == "cuda" and result["workspaces"]
        for name in ("all", "inference", "two_shot", *(f"stream {i}" for i in range(9))):
            assert_bitwise_equal(result[name], result["expected"], f"{name} on rank {rank}")
        for factor in (1.0, 2.0, 4.0):
            for actual in result[f"graph {factor}"]:
                assert_bitwise_equal(actual, result["expected"], f"graph {factor} on rank {rank}")
        for actual, expected in zip(result["fused"], result["separate"], strict=True):
            assert_bitwise_equal(actual, expected, f"fused on rank {rank}")
    assert_bitwise_equal(torch.cat([r["scattered"] for r in results]), results[0]["expected"])
    if p >= 4:
        assert compare(results[0]["gloo"], results[0]["float32"])  # the stock sum over the same ranks


def refused() -> tuple[str, float]:
    """Rank 1 refuses a call that rank 0 knows, and is in: past the agreement, which over gloo would find it first."""
    group = sharing_gpus()
    tree = ReductionTree(2)
    values = torch.ones(1, 64, device="cuda")
    tree_all_reduce(values, tree=tree)
    torch.cuda.synchronize()
    workspace, state = symmetric.workspace(group, values.device), state_of(group)
    if group.rank == 1:
        refuse(group, "tree_all_reduce", ValueError("of its own"))
        time.sleep(8)
        return "", 0.0
    state.calls += 1
    started = time.monotonic()
    try:
        nvlink.tree_reduce(workspace, values, tree, values.dtype, False)
        torch.cuda.synchronize()
    except RuntimeError:
        return workspace.failure() or "no report", time.monotonic() - started
    return "no error", 0.0


def test_a_peer_that_refuses_the_call():
    """It does not take the timeout of 600 s."""
    with RankPool() as pool:
        message, seconds = pool.run(refused, 2, timeout=120)[0]
    assert "rank 1 of 2 refused tree_all_reduce" in message and "of its own" in message, message
    assert seconds < 8


def lonely() -> str:
    group = sharing_gpus()
    tree = ReductionTree(2)
    values = torch.ones(1, 64, device="cuda")
    tree_all_reduce(values, tree=tree)
    torch.cuda.synchronize()
    workspace = symmetric.workspace(group, values.device)
    workspace.timeout = 2.0
    if group.rank == 1:
        time.sleep(6)
        return ""
    try:
        nvlink.tree_reduce(workspace, values, tree, values.dtype, False)  # past the agreement, which over gloo would wait in its place
        torch.cuda.synchronize()
    except RuntimeError as error:
        try:
            workspace.enter()
        except RuntimeError as named:
            return f"{error}\n{named}"
    return "no error"


def test_a_peer_that_never_comes():
    with RankPool() as pool:
        message = pool.run(lonely, 2, timeout=120)[0]
    assert "rank 0 of 2 waited 2 s for rank 1 and gave up: word of block 0, seen 0, expected 3" in message, message
