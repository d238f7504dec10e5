"""The compiled kernels on a GPU: order, bytes, shapes, accuracy. Skipped without one.

Ranks are simulated by slicing: what a rank computes depends on its slice and nothing else, and the values are combined by the
reference. Outputs are poisoned with NaN by the deterministic fill. Each invariance test has a stock twin that differs.
"""

from dataclasses import replace

import pytest
import torch

from tpinv import kernels, reference, row_parallel_linear
from tpinv.testing import assert_bitwise_equal, compare, order_probe, tree_shape
from tpinv.tree import ReductionTree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TREES = [ReductionTree(8), ReductionTree(8, "bfloat16"), ReductionTree(24)]


@pytest.fixture(autouse=True)
def poisoned():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty comes filled with NaN
    yield
    torch.use_deterministic_algorithms(before)


def wild(*shape, dtype=BF16, seed=0):
    """Exponents from 2^-12 to 2^12, and rows that cancel."""
    g = torch.Generator("cuda").manual_seed(seed)
    spread = 4 if dtype == FP16 else 12
    x = torch.randn(shape, generator=g, device="cuda") * torch.exp2(
        torch.randint(-spread, spread + 1, shape, generator=g, device="cuda").float()
    )
    x[::5] = 100.0 * x[::5].sign()
    return x.to(dtype)


def problem_of(a, b, tree, out_dtype=FP32, rank=0, ranks=1, pieces=1):
    from tpinv.kernels.gemm.problem import make_problems

    out = torch.full((len(tree.subtrees(rank, ranks)), a.shape[0], b.shape[1]), float("nan"), dtype=out_dtype, device="cuda")
    return out, make_problems(a, b.t(), out, None, tree, rank, ranks, pieces, "ieee")


# -- order -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 8, 24])
@pytest.mark.parametrize("rows", [40, 300, 700])
def test_probe_finds_the_contract_in_every_configuration(leaves, rows):
    from tpinv.kernels.gemm import tuner, verification

    tree, length, dtype = ReductionTree(leaves), 72, BF16
    pairs = leaves * (leaves - 1) // 2 + 1

    def operands(values):
        """Rows of probes, repeated to ``rows`` at least, so that the tuner's candidates for that many rows apply."""
        a = torch.zeros(max(rows, len(values)), leaves, length)
        a[: len(values), :, 5] = values
        return a.flatten(1).to("cuda", dtype), torch.ones(leaves * length, 136, device="cuda", dtype=dtype)

    if rows < pairs:
        pytest.skip("fewer rows than probes")
    a, b = operands(torch.ones(1, leaves))
    problem = problem_of(a, b, tree)[1][0]
    configs = tuner.candidates(problem)
    tuner.compile_ahead(problem, configs)
    for config in configs:

        def total(values, config=config):
            a, b = operands(values)
            out, problems = problem_of(a, b, tree)
            verification.launch(problems[0], config)
            return out[0, : len(values), 77]

        assert order_probe(total, leaves, batched=True) == tree_shape(tree), config


def test_twin_cublas_has_another_tree():
    def total(values):
        a = torch.zeros(len(values), 8, 64)
        a[:, :, 5] = values
        return torch.matmul(a.flatten(1).to("cuda", BF16), torch.ones(512, 136, device="cuda", dtype=BF16))[:, 77]

    assert order_probe(total, 8, batched=True) != tree_shape(ReductionTree(8))


# -- bytes -------------------------------------------------------------------------------------------------------------------------


def simulated(a, b, tree, ranks, pieces=1):
    """p ranks by slicing k, their values combined by the reference."""
    values, nodes = [], []
    a_pieces, b_pieces = a.chunk(pieces, 1), b.chunk(pieces, 0)
    for rank in range(ranks):
        a_rank = torch.cat([piece.chunk(ranks, 1)[rank] for piece in a_pieces], 1)
        b_rank = torch.cat([piece.chunk(ranks, 0)[rank] for piece in b_pieces], 0)
        values.append(kernels.tree_product(a_rank, b_rank, tree, rank, ranks, stride=pieces))
        nodes += tree.subtrees(rank, ranks)
    return reference.finish(torch.cat(values), tree, nodes, a.dtype)


@pytest.mark.parametrize("tree", TREES, ids=lambda t: t.fingerprint)
@pytest.mark.parametrize("rows", [1, 40, 600])
def test_forward_and_dgrad_are_the_same_for_every_number_of_ranks(tree, rows):
    x, w, dy = wild(rows, 1536), wild(640, 1536, seed=1), wild(rows, 3072, seed=2)
    fc1 = wild(3072, 320, seed=3)
    y = kernels.tree_matmul(x, w.t(), tree)
    dx = kernels.tree_matmul(dy, fc1, tree, stride=2)
    for ranks in (2, 4, 8) if tree.leaves == 8 else (2, 3, 6):
        assert_bitwise_equal(simulated(x, w.t(), tree, ranks), y, f"y at p={ranks}")
        assert_bitwise_equal(simulated(dy, fc1, tree, ranks, pieces=2), dx, f"dx at p={ranks}")


def test_twin_stock_sharding_differs():
    x, w = wild(600, 1536), wild(640, 1536, seed=1)
    parts = [a.float() @ b.float().t() for a, b in zip(x.chunk(4, 1), w.chunk(4, 1), strict=True)]
    assert compare(sum(p.to(BF16) for p in parts), torch.matmul(x, w.t())).count


def test_a_row_does_not_depend_on_the_batch():
    """In fp32, where another order shows: bf16 hides it in all but one element of a thousand."""
    tree, w = ReductionTree(8), wild(1024, 2048, seed=1)
    x = wild(4096, 2048)
    whole = kernels.tree_matmul(x, w.t(), tree, out_dtype=FP32)
    for rows in (1, 3, 16, 17, 64, 100, 128, 200, 513, 1024):
        assert_bitwise_equal(kernels.tree_matmul(x[:rows], w.t(), tree, out_dtype=FP32), whole[:rows], f"M={rows}")
    assert_bitwise_equal(kernels.tree_matmul(x[4095:], w.t(), tree, out_dtype=FP32), whole[4095:], "the last row alone")
    chain = kernels.matmul(x, w.t(), out_dtype=FP32)
    for rows in (1, 40, 600):
        assert_bitwise_equal(kernels.matmul(x[:rows], w.t(), out_dtype=FP32), chain[:rows], f"chain, M={rows}")


def test_twin_cublas_depends_on_the_batch():
    x, w = wild(4096, 4096), wild(1024, 4096, seed=1)
    whole = torch.mm(x, w.t(), out_dtype=FP32)
    assert any(compare(torch.mm(x[:rows], w.t(), out_dtype=FP32), whole[:rows]).count for rows in (1, 8, 16, 64, 100, 128))


def test_a_shard_of_the_output_does_not_depend_on_its_width():
    dy, x = wild(777, 1024), wild(777, 512, seed=1)
    dw = kernels.matmul(dy.t(), x, out_dtype=FP32)
    w = wild(1024, 512, seed=2)
    y = kernels.matmul(x, w.t(), out_dtype=FP32)
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            rows, cols = slice(rank * 1024 // ranks, (rank + 1) * 1024 // ranks), slice(rank * 512 // ranks, (rank + 1) * 512 // ranks)
            assert_bitwise_equal(kernels.matmul(dy[:, rows].t(), x, out_dtype=FP32), dw[rows], "dW split on N")
            assert_bitwise_equal(kernels.matmul(dy.t(), x[:, cols], out_dtype=FP32), dw[:, cols], "dW split on K")
            assert_bitwise_equal(kernels.matmul(x, w[rows].t(), out_dtype=FP32), y[:, rows], "y split on N")


@pytest.mark.parametrize("dtype, precision", [(FP16, "ieee"), (FP32, "ieee"), (FP32, "tf32")])
def test_other_dtypes(dtype, precision):
    tree, x, w, bias = ReductionTree(8), wild(200, 1024, dtype=dtype), wild(328, 1024, dtype=dtype, seed=1), wild(328, dtype=dtype, seed=2)
    y = kernels.tree_matmul(x, w.t(), tree, bias=bias, precision=precision)
    values = [
        kernels.tree_product(a.contiguous(), b.t(), tree, r, 4, precision=precision)
        for r, (a, b) in enumerate(zip(x.chunk(4, 1), w.chunk(4, 1), strict=True))
    ]
    root = reference.finish(torch.cat(values), tree, [n for r in range(4) for n in tree.subtrees(r, 4)], dtype)
    assert_bitwise_equal(root + bias, y, f"{dtype} {precision}: the bias is added to the rounded root")


def test_repeats_under_load():
    tree, x, w = ReductionTree(8), wild(512, 4096), wild(1024, 4096, seed=1)
    expected = kernels.tree_matmul(x, w.t(), tree)
    side, noise = torch.cuda.Stream(), wild(2048, 2048)
    for i in range(200):
        with torch.cuda.stream(side):
            noise @ noise
        assert_bitwise_equal(kernels.tree_matmul(x, w.t(), tree), expected, f"repeat {i}")


def test_accuracy_is_that_of_cublas():
    x, w = torch.randn(512, 8192, device="cuda").to(BF16), torch.randn(512, 8192, device="cuda").to(BF16)
    exact = x.double() @ w.double().t()
    error = lambda y: ((y.double() - exact).norm() / exact.norm()).item()  # noqa: E731
    ours = kernels.tree_matmul(x, w.t(), ReductionTree(8), out_dtype=FP32)
    assert error(ours) <= 1.05 * error(torch.mm(x, w.t(), out_dtype=FP32))
    assert error(ours.to(BF16)) <= 1.001 * error(torch.matmul(x, w.t()))


# -- adding to what is there -----------------------------------------------------------------------------------------------------


def adding(dy, x, total):
    """The problem ``total += dy^T x``."""
    from tpinv.kernels.gemm.problem import make_problems

    (problem,) = make_problems(dy.t(), x.t(), total.unsqueeze(0), None, ReductionTree(1), 0, 1, 1, "ieee")
    return replace(problem, accumulate=True)


@pytest.mark.parametrize(
    "tokens, rows, cols, dtype",
    [(520, 600, 328, BF16), (1000, 1280, 1024, BF16), (777, 40, 136, BF16), (300, 200, 71, BF16), (5, 129, 8, FP16), (200, 300, 264, FP32)],
)
def test_every_configuration_adds_the_unrounded_product(tokens, rows, cols, dtype):
    from tpinv.kernels.gemm import triton_gemm as gemm
    from tpinv.kernels.gemm import tuner, verification

    dy, x, before = wild(tokens, rows, dtype=dtype), wild(tokens, cols, dtype=dtype, seed=1), wild(rows, cols, dtype=FP32, seed=2)
    before[3], before[4] = -0.0, float("inf")
    expected = before + kernels.matmul(dy.t(), x, out_dtype=FP32)
    assert compare(before + kernels.matmul(dy.t(), x), expected) or dtype == FP32, "the twin: rounded first, as Megatron's hook finds it"
    buffer = torch.full((rows, cols + 64), float("nan"), device="cuda")
    problem = adding(dy, x, before)
    configs = [gemm.canonical(problem), *tuner.candidates(problem)]
    tuner.compile_ahead(problem, configs)
    for config in configs:
        for total in (before.clone(), buffer[:, 32 : 32 + cols].copy_(before)):  # dense, and columns of a larger buffer
            verification.launch(adding(dy, x, total), config)
            assert_bitwise_equal(total.contiguous(), expected, config.name)
        assert buffer[:, :32].isnan().all() and buffer[:, 32 + cols :].isnan().all(), config.name


def test_a_stage_is_not_refilled_while_it_is_read():
    """Where registers are loaded from a stage: what is added to, and parked values. A missing fence was wrong in a third of such runs."""
    from tpinv.kernels.gemm import sm90, verification
    from tpinv.kernels.gemm import triton_gemm as gemm

    dy, x, before = wild(4096, 4096), wild(4096, 6144, seed=1), wild(4096, 6144, dtype=FP32, seed=2)
    parked = problem_of(dy, x, ReductionTree(8), BF16)[1][0]
    for problem, start in ((adding(dy, x, before.clone()), before), (parked, torch.zeros_like(parked.out))):
        problem.out.copy_(start)
        gemm.run(problem, gemm.canonical(problem))
        expected, wrong = problem.out.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
        for config in sm90.candidates(problem):
            for _ in range(100):
                problem.out.copy_(start)
                verification.launch(problem, config)
                wrong += (problem.out.view(torch.int16) != expected.view(torch.int16)).any()
            assert not wrong, config


def test_adding_to_any_buffer_while_tuning(tmp_path, monkeypatch):
    """The caller's sums are added to once, whatever is verified and timed before."""
    from tpinv.kernels.gemm import tuner, verification
    from tpinv.runtime.state import device_state

    monkeypatch.setenv("TPINV_CACHE", str(tmp_path))
    device_state(torch.cuda.current_device()).forget()
    dy, x, before = wild(1024, 512), wild(1024, 264, seed=1), wild(512, 264, dtype=FP32, seed=2)
    product = kernels.matmul(dy.t(), x, out_dtype=FP32)
    expected, flat = before.clone().add_(product), torch.zeros(512 * 264 + 1, device="cuda")
    for total in (
        before.clone(),
        before.t().contiguous().t(),
        flat[1:].view(512, 264).copy_(before),
    ):  # 16-byte aligned, transposed, not aligned
        kernels.add_matmul(total, dy.t(), x)
        assert_bitwise_equal(total.contiguous(), expected)
        kernels.add_matmul(total, dy.t(), x)
        assert_bitwise_equal(total.contiguous(), expected + product, "a second time, as chosen")
    assert not verification.struck_off() and len(tuner.table()) == 3  # the product, and two ways to add
    empty = torch.full((40, 24), -0.0, device="cuda")
    kernels.add_matmul(empty, wild(0, 40).t(), wild(0, 24))
    assert_bitwise_equal(empty, torch.zeros(40, 24, device="cuda"), "no tokens: plus zero")


def test_adding_under_graphs():
    dy, x, before = wild(300, 200), wild(300, 136, seed=1), wild(200, 136, dtype=FP32, seed=2)
    product = kernels.matmul(dy.t(), x, out_dtype=FP32)
    thrice = before + product + product + product
    total, graph = before.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.add_matmul(total, dy.t(), x)
    for _ in range(3):
        graph.replay()
    assert_bitwise_equal(total, thrice, "CUDA graph")


# -- shapes ------------------------------------------------------------------------------------------------------------------------


def test_empty_strided_and_odd_shapes():
    tree = ReductionTree(8)
    w = wild(72, 1024, seed=1)
    assert kernels.tree_matmul(wild(0, 1024), w.t(), tree).shape == (0, 72)
    assert kernels.matmul(wild(0, 64).t(), wild(0, 40)).abs().sum().item() == 0.0  # no tokens: dW is zero
    bias = wild(40)
    assert_bitwise_equal(kernels.matmul(wild(3, 0), wild(0, 40), bias=bias), bias.expand(3, 40).contiguous(), "k = 0")
    x = wild(70, 2048)
    y = kernels.tree_matmul(x[:, ::2].contiguous(), w.t(), tree)
    assert_bitwise_equal(kernels.tree_matmul(x[:, ::2], w.t(), tree), y, "a strided x")
    assert_bitwise_equal(kernels.tree_matmul(x[:, ::2].contiguous().t().contiguous().t(), w.t(), tree), y, "a transposed x")
    assert_bitwise_equal(kernels.tree_matmul(x[:, ::2].contiguous(), w[:71].t(), tree), y[:, :71].contiguous(), "71 columns")


def test_past_two_to_the_31():
    x, w = wild(70_000, 64), wild(32_768, 64, seed=1)
    y = kernels.tree_matmul(x, w.t(), ReductionTree(2))
    assert_bitwise_equal(kernels.tree_matmul(x[-200:], w.t(), ReductionTree(2)), y[-200:], "rows past 2^31 elements")


@pytest.mark.parametrize("tokens", [0, 5, 777, 9000])
def test_column_sum_has_the_bytes_of_the_cpu(tokens):
    tree, dy = ReductionTree(24), wild(tokens - tokens % 2, 1000) if tokens else wild(0, 1000)
    for ranks in (1, 2):
        for rank, part in enumerate(dy.chunk(ranks)):
            if tokens == 0 and rank:
                continue
            expected = reference.tree_sum(part.cpu(), tree, rank, ranks, dim=0)
            assert_bitwise_equal(kernels.column_sum(part, tree, rank, ranks).cpu(), expected, f"rank {rank} of {ranks}")
    if tokens > 1000:
        narrow, wide = dy[:, :8].float().sum(0), dy.float().sum(0)[:8]
        assert compare(narrow, wide).count or compare(wide.cpu(), reference.tree_sum(dy.cpu(), tree, 0, 1, dim=0)[0, :8]).count


def test_errors_name_rule_values_and_fix():
    x, w = wild(4, 100), wild(8, 100)
    with pytest.raises(ValueError, match="k=100 has no 8 equal leaves"):
        kernels.tree_matmul(x, w.t(), ReductionTree(8))
    with pytest.raises(ValueError, match="one k"):
        kernels.matmul(x, w)
    with pytest.raises(ValueError, match=r"must be float32 \[4, 8\]"):
        kernels.add_matmul(torch.zeros(8, 4, device="cuda"), x, w.t())
    with pytest.raises(ValueError, match="one dtype"):
        kernels.matmul(x, w.t().half())
    with pytest.raises(ValueError, match="need an NVIDIA GPU"):
        kernels.matmul(x.cpu(), w.cpu().t())


# -- under a compiler and in a graph -------------------------------------------------------------------------------------------------


def test_compile_and_graph_give_the_eager_bytes():
    tree, x, w = ReductionTree(8), wild(40, 1024), wild(256, 1024, seed=1)
    layer = lambda x: row_parallel_linear(x, w, tree=tree) + 1  # noqa: E731
    eager = layer(x)
    assert_bitwise_equal(torch.compile(layer, fullgraph=True)(x), eager, "torch.compile")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert_bitwise_equal(captured, eager, "CUDA graph")


def test_the_tuner_verifies_and_remembers(tmp_path, monkeypatch):
    from tpinv.kernels.gemm import triton_gemm as gemm
    from tpinv.kernels.gemm import tuner, verification
    from tpinv.runtime import cuda
    from tpinv.runtime.state import device_state

    monkeypatch.setenv("TPINV_CACHE", str(tmp_path))
    out, problems = problem_of(wild(40, 1024), wild(1024, 264, seed=9), ReductionTree(4), BF16)
    device_state(torch.cuda.current_device()).forget()
    tuner.run(problems[0])
    assert len(tuner.table()) == 1 and not verification.struck_off()
    # A candidate with other bits is struck off: here, one that computes another tree.
    wrong = gemm.TritonConfig(64, 64, 64, 4, 3, group=4)
    real = verification.launch

    def launch(problem, config, blocks=None, masked=False):
        real(problem, gemm.canonical(problem) if config == wrong else config, blocks, masked)
        if config == wrong:
            problem.out.neg_()

    monkeypatch.setattr(verification, "launch", launch)
    assert not verification.verify(problems[0], wrong)
    assert verification.struck_off() and cuda.cache_dir() == tmp_path
