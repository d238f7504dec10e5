"""A training step's functions on a GPU: the same bytes on 1, 2, 4, 8 ranks that share it, and those of plain torch where that is the
oracle. Skipped without a GPU."""

import itertools

import gpu_step_jobs as jobs
import pytest
import torch

from tpinv import functional, kernels
from tpinv.ops import products
from tpinv.optim import norm_of
from tpinv.testing import RankPool, assert_bitwise_equal, compare
from tpinv.tree import ReductionTree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TREE = ReductionTree(8)


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="module")
def alone(pool):
    return lambda *args: pool.run(jobs.block, 1, *args, device="cuda", timeout=180)[0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("dtype, sp, node_dtype", [("bf16", False, "float32"), ("bf16", True, "bfloat16"), ("fp32", True, "float32")])
def test_ranks_give_the_bytes_of_one(ranks, dtype, sp, node_dtype, pool, alone):
    results = pool.run(jobs.block, ranks, 8, dtype, sp, node_dtype, device="cuda", timeout=180)[0]
    expected = alone(8, dtype, False, node_dtype)
    assert len(expected) > 30 and results.keys() == expected.keys()
    different = {name: str(d) for name in expected if (d := compare(results[name], expected[name]))}
    assert not different


def test_three_and_six_ranks(pool):
    one, *others = (pool.run(jobs.scattered_norm, p, 24, device="cuda", timeout=120)[0] for p in (1, 2, 3, 6))
    for other in others:
        assert_bitwise_equal(other, one)


def test_twin_stock_differs(pool):
    one, four = (pool.run(jobs.stock, p, "bf16", device="cuda", timeout=120)[0] for p in (1, 4))
    assert compare(four["row"], one["row"]) and compare(four["db"], one["db"])


# -- against plain torch on the same GPU -------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """Runs a function with the kernels, then in the plain torch arithmetic that defines it, on the same GPU; returns both results."""

    def both(function):
        kernels = function()
        with monkeypatch.context() as patch:
            patch.setattr(products, "on_gpu", lambda x: False)
            return kernels, function()

    return both


def grads(function, dy, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(257, 4096), (64, 2, 5, 128), (33, 1000), (7, 8192)])
@pytest.mark.parametrize("kind", ["rms", "layer", "heads"])
def test_norms(shape, dtype, kind, plain):
    x, dy = jobs.make("x", *shape, dtype=dtype), jobs.make("dy", *shape, dtype=dtype)
    w, b = jobs.make("w", shape[-1], dtype=dtype), jobs.make("b", shape[-1], dtype=dtype)
    if kind == "layer":
        ours, torchs = plain(lambda: grads(lambda x, w, b: functional.layer_norm(x, w, b, tree=TREE), dy, x, w, b))
    else:
        ours, torchs = plain(lambda: grads(lambda x, w: functional.rms_norm(x, w, tree=TREE, heads_parallel=kind == "heads"), dy, x, w))
    for name, a, b in zip(("y", "dx", "dw", "db"), ours, torchs, strict=False):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate, dtype, plain):
    """A kernel of ours; an element has its bytes wherever it lies, at an odd address and in a row of any width."""
    x, dy = jobs.make("x", 33, 1001, dtype=dtype), jobs.make("dy", 33, 1001, dtype=dtype)
    run = lambda x, dy: grads(lambda x: functional.gelu(x, approximate), dy, x)  # noqa: E731
    ours, torchs = plain(lambda: run(x, dy))
    for name, a, b in zip(("y", "dx"), ours, torchs, strict=True):
        if approximate == "tanh":  # torch's erf has other last bits than the compiler's library
            assert_bitwise_equal(a, b, name)
    for width in (1, 3, 500):
        for name, a, b in zip(("y", "dx"), run(x[:, 1 : 1 + width], dy[:, 1 : 1 + width]), ours, strict=True):
            assert_bitwise_equal(a, b[:, 1 : 1 + width], f"{name} of {width}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
@pytest.mark.parametrize("vocab", [1000, 128256])
def test_cross_entropy(vocab, smooth, dtype, plain):
    logits, dloss = jobs.make("logits", 40, vocab, dtype=dtype), jobs.make("dloss", 40, dtype=torch.float32)
    target = torch.arange(40, device="cuda") * (vocab // 40)
    target[7] = -100
    run = lambda x: functional.vocab_parallel_cross_entropy(x, target, tree=TREE, label_smoothing=smooth)  # noqa: E731
    ours, torchs = plain(lambda: grads(run, dloss, logits))
    for name, a, b in zip(("loss", "dlogits"), ours, torchs, strict=True):
        assert_bitwise_equal(a, b, name)


def test_gradients_that_are_one_number_expanded():
    """sum() hands back a gradient of stride 0; every kernel must read it as the tensor it stands for."""
    logits, target = jobs.make("logits", 40, 1000), torch.arange(40, device="cuda")
    x, table = jobs.make("x", 40, 1024), jobs.make("table", 50, 1024)
    functions = {
        "loss": (lambda t: functional.vocab_parallel_cross_entropy(t, target, tree=TREE), logits),
        "norm": (lambda t: functional.rms_norm(t, table[0], tree=TREE), x),
        "swiglu": (functional.swiglu, x),
        "silu": (functional.silu, x),
        "embedding": (lambda t: functional.vocab_parallel_embedding(target, t), table),
        "attention": (lambda t: functional.core_attention(*(t.view(40, 1, 8, 128),) * 3), x),
    }
    for name, (function, value) in functions.items():
        one = torch.ones((), dtype=function(value).dtype, device="cuda")
        shape = function(value).shape
        expanded, dense = grads(function, one.expand(shape), value), grads(function, one.expand(shape).contiguous(), value)
        assert_bitwise_equal(expanded[1], dense[1], name)


def scattered(t):
    """The same numbers, no two of them side by side."""
    wide = t.new_full((*t.shape, 3), float("nan"))
    wide[..., 1] = t
    return wide[..., 1]


def every_function() -> dict:
    """name -> (function, gradient, inputs)"""
    logits, target, x = jobs.make("logits", 40, 1000), torch.arange(40, device="cuda"), jobs.make("x", 40, 1024)
    w, b, heads = jobs.make("w", 1024), jobs.make("b", 1024), jobs.make("q", 40, 2, 8, 72)
    return {
        "loss": (
            lambda t: functional.vocab_parallel_cross_entropy(t, target.to(t.device), tree=TREE),
            torch.ones(40, device="cuda"),
            logits,
        ),
        "rms": (lambda x, w: functional.rms_norm(x, w, tree=TREE), x, x, w),
        "layer": (lambda x, w, b: functional.layer_norm(x, w, b, tree=TREE), x, x, w, b),
        "swiglu": (functional.swiglu, x[:, :512], x),
        "silu": (functional.silu, x, x),
        "embedding": (lambda t: functional.vocab_parallel_embedding(target.to(t.device), t), x[:, :64], jobs.make("table", 50, 64)),
        "attention": (functional.core_attention, heads, heads, heads[:, :, :2], heads[:, :, 2:4]),
        "operator": (lambda *t: torch.ops.tpinv.core_attention(*t, 0.1, True)[0], heads, heads, heads[:, :, :2], heads[:, :, 2:4]),
        "pack": (
            lambda *t: functional.packed_attention(*t, cu_seqlens_q=CU.to(t[0].device), cu_seqlens_kv=CU.to(t[0].device)),
            heads[:, 0],
            heads[:, 0],
            heads[:, 0, :2],
            heads[:, 0, 2:4],
        ),
    }


CU = torch.tensor([0, 7, 40], dtype=torch.int32)


def test_any_strides():
    """Also of the gradient: a head of width 72 would be summed in another order if the compiler's layout decided it."""
    for name, (function, dy, *inputs) in every_function().items():
        expected = grads(function, dy.contiguous(), *(t.contiguous() for t in inputs))
        padded = torch.nn.functional.pad(dy, (0, 8))[..., : dy.shape[-1]]  # aligned rows where dy's are not, and the other way round
        for other, *rest in ((scattered(dy), *map(scattered, inputs)), (padded, *inputs)):
            for a, b in zip(grads_of(function, other, *rest), expected, strict=True):
                assert_bitwise_equal(a, b, name)
    x, one = jobs.make("x", 40, 1024), torch.ones(1, device="cuda").bfloat16()
    assert_bitwise_equal(functional.rms_norm(x, one.expand(1024), tree=TREE), functional.rms_norm(x, one.repeat(1024), tree=TREE))


def grads_of(function, dy, *inputs):
    """:func:`grads` that keeps the strides."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_gpu():
    for name, (function, dy, *inputs) in every_function().items():
        there = grads(function, dy.to("cuda:1"), *(t.to("cuda:1") for t in inputs))
        for a, b in zip(there, grads(function, dy, *inputs), strict=True):
            assert a.get_device() == 1
            assert_bitwise_equal(a.cpu(), b.cpu(), name)


def test_a_captured_graph_outlives_other_shapes():
    x = jobs.make("x", 300, 64)
    expected, graph = kernels.column_sum(x, TREE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.column_sum(x, TREE)
    for rows in range(1, 300):  # each with tables of its own
        kernels.column_sum(x[:rows], TREE)
    graph.replay()
    assert_bitwise_equal(captured, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_swiglu_and_embedding(dtype, plain):
    x, dy = jobs.make("x", 65, 2 * 700, dtype=dtype), jobs.make("dy", 65, 700, dtype=dtype)
    for a, b in zip(*plain(lambda: grads(functional.swiglu, dy, x)), strict=True):
        assert_bitwise_equal(a, b, "swiglu")
    for a, b in zip(*plain(lambda: grads(functional.silu, dy, x[:, :700])), strict=True):
        assert_bitwise_equal(a, b, "silu")
    ids, table = torch.arange(65, device="cuda").square() % 23, jobs.make("table", 50, 700, dtype=dtype)
    for a, b in zip(*plain(lambda: grads(lambda w: functional.vocab_parallel_embedding(ids, w), dy, table)), strict=True):
        assert_bitwise_equal(a, b, "embedding")


def test_twin_torch_norm_gradient_moves_with_the_columns():
    x = jobs.make("x", 4096, 512, dtype=torch.float32)
    assert compare(x.sum(0)[:64], x[:, :64].contiguous().sum(0))


def test_gradient_norm_is_that_of_a_cpu():
    x = jobs.make("x", 3_000_001, dtype=torch.float32) * torch.exp2(torch.randint(-60, 60, (3_000_001,), device="cuda").float())
    whole = norm_of([x])
    assert_bitwise_equal(norm_of([x[:999_999], x[999_999:]]), whole)
    assert_bitwise_equal(whole.cpu(), norm_of([x.cpu()]))
    assert norm_of([x, torch.full((3,), float("inf"), device="cuda")]).isinf()


# -- attention ---------------------------------------------------------------------------------------------------------------------


def attention(q, k, v, dout):
    return grads(lambda q, k, v: functional.core_attention(q, k, v), dout, q, k, v)


def attention_inputs(s, b, heads, groups, d, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(s, b, n, d, device="cuda", generator=g).to(dtype) for n in (heads, groups, groups, heads)]


@pytest.mark.parametrize(
    "s, heads, groups, d, dtype", [(1000, 32, 8, 128, torch.bfloat16), (513, 8, 8, 64, torch.float16), (200, 8, 2, 80, torch.bfloat16)]
)
def test_attention_heads_batches_and_reruns(s, heads, groups, d, dtype):
    inputs = attention_inputs(s, 2, heads, groups, d, dtype)
    whole = attention(*inputs)
    for p in (1, 2, groups):
        for rank in {0, p - 1}:
            part = attention(*(t.chunk(p, 2)[rank][:, 1:] for t in inputs))
            for name, a, b in zip(("out", "dq", "dk", "dv"), part, whole, strict=True):
                assert_bitwise_equal(a, b.chunk(p, 2)[rank][:, 1:], f"{name}, rank {rank} of {p}")
    for _ in range(20):
        for a, b in zip(attention(*inputs), whole, strict=True):
            assert_bitwise_equal(a, b, "a rerun")


LENGTHS, GAP = (1000, 0, 1, 513, 64, 130), 5


def packed(q, k, v, dout, causal=True, gap=0, **settings):
    """Output and gradients of [t, h, d] whose sequences of LENGTHS are ``gap`` rows apart."""
    cu, first = (
        torch.tensor([0, *itertools.accumulate(length + apart for length in LENGTHS)], dtype=torch.int32, device="cuda")
        for apart in (0, gap)
    )
    settings = {"max_seqlen_q": 1000, "max_seqlen_kv": 1000, "causal": causal, **settings}
    if gap:
        settings |= {"cu_seqlens_q_padded": first, "cu_seqlens_kv_padded": first}
    return grads(lambda *t: functional.packed_attention(*t, cu_seqlens_q=cu, cu_seqlens_kv=cu, **settings), dout, q, k, v)


def sequences(gap=0):
    starts = itertools.accumulate((length + gap for length in LENGTHS), initial=0)
    return [slice(start, start + length) for start, length in zip(starts, LENGTHS, strict=False)]


@pytest.mark.parametrize(
    "heads, groups, d, dtype, causal",
    [(32, 8, 128, torch.bfloat16, True), (8, 8, 64, torch.bfloat16, True), (8, 2, 80, torch.float16, False)],
)
def test_packed_sequences_have_the_bytes_they_have_alone(heads, groups, d, dtype, causal):
    """Wherever they lie, and whatever lies between them."""
    inputs = [t[:, 0] for t in attention_inputs(sum(LENGTHS) + GAP * len(LENGTHS), 1, heads, groups, d, dtype)]
    mine = torch.cat([torch.arange(rows.start, rows.stop) for rows in sequences(GAP)]).cuda()
    between = torch.ones(len(inputs[0]), dtype=torch.bool, device="cuda").index_fill(0, mine, False)
    apart = packed(*(t.masked_fill(between.view(-1, 1, 1), float("nan")) for t in inputs), causal, GAP)
    whole = packed(*(t[mine] for t in inputs), causal)
    longer = packed(*(t[mine] for t in inputs), causal, max_seqlen_q=None, max_seqlen_kv=5000)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), whole, apart, longer, strict=True):
        assert_bitwise_equal(b[mine], a, f"{name}, apart")
        assert_bitwise_equal(c, a, f"{name}, with a larger launch")
        assert not b[between].any(), f"{name} between sequences"
    for rows in sequences():
        by_itself = [t[mine][rows].unsqueeze(1) for t in inputs]
        alone = (
            grads(lambda q, k, v: functional.core_attention(q, k, v, causal=causal), by_itself[3], *by_itself[:3])
            if len(by_itself[0])
            else []
        )
        for name, a, b in zip(("out", "dq", "dk", "dv"), whole, alone, strict=False):
            assert_bitwise_equal(a[rows], b[:, 0], f"{name} of {rows}")
    for p in (2, groups):
        part = packed(*(t[mine].chunk(p, 1)[-1] for t in inputs), causal)
        for name, a, b in zip(("out", "dq", "dk", "dv"), part, whole, strict=True):
            assert_bitwise_equal(a, b.chunk(p, 1)[-1], f"{name}, the last rank of {p}")
    for _ in range(5):
        for a, b in zip(packed(*(t[mine] for t in inputs), causal), whole, strict=True):
            assert_bitwise_equal(a, b, "a rerun")


def test_twin_masked_attention_of_a_pack_moves():
    """The stock way without a kernel for packs: all rows at once under a mask of blocks, whose key blocks begin at the pack's first row."""
    q, k, v, _ = (t.transpose(0, 1).transpose(1, 2) for t in attention_inputs(sum(LENGTHS), 1, 8, 8, 64, torch.bfloat16))
    number = torch.repeat_interleave(torch.tensor(LENGTHS)).cuda()
    mask = (number[:, None] == number).tril()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        whole = sdpa(q, k, v, attn_mask=mask)
        alone = [sdpa(*(t[:, :, rows] for t in (q, k, v)), is_causal=True) for rows in sequences() if rows.start < rows.stop]
    assert compare(whole, torch.cat(alone, 2))


def test_more_sequences_than_a_grid_has_places():
    """70,000 of 3 rows, side by side and one behind another; also as one of the last alone."""
    inputs = attention_inputs(3, 70_000, 2, 1, 64, torch.bfloat16)
    cu = torch.arange(0, 3 * 70_000 + 1, 3, dtype=torch.int32, device="cuda")
    beside = attention(*inputs)
    behind = grads(
        lambda *t: functional.packed_attention(*t, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=3, max_seqlen_kv=3),
        inputs[3].transpose(0, 1).flatten(0, 1),
        *(t.transpose(0, 1).flatten(0, 1) for t in inputs[:3]),
    )
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), beside, behind, attention(*(t[:, 69_990:] for t in inputs)), strict=True):
        assert_bitwise_equal(b.view(70_000, 3, *b.shape[1:]).transpose(0, 1), a, name)
        assert_bitwise_equal(a[:, 69_990:], c, name)


def test_the_operator_of_packs():
    """In a full graph of a compiler, under checkpointing, and in a CUDA graph whose lengths change between replays."""
    q, k, v, dout = (t[:, 0] for t in attention_inputs(300, 1, 8, 2, 64, torch.bfloat16))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    cu = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    function = lambda *t: functional.packed_attention(*t, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=300, max_seqlen_kv=300)  # noqa: E731
    operator = lambda *t: torch.ops.tpinv.packed_attention(*t, cu, cu, cu, cu, 300, 300, 0.125, True)[0]  # noqa: E731
    expected = grads(function, dout, q, k, v)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    again = lambda *t: torch.utils.checkpoint.checkpoint(operator, *t, use_reentrant=False)  # noqa: E731
    for name, form in (("operator", operator), ("compiled", compiled), ("checkpointed", again)):
        for a, b in zip(grads(form, dout, q, k, v), expected, strict=True):
            assert_bitwise_equal(a, b, name)
    torch.library.opcheck(torch.ops.tpinv.packed_attention.default, (*inputs, cu, cu, cu, cu, 300, 300, 0.125, True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = function(q, k, v)
    for lengths in ([0, 100, 300], [0, 0, 299], [0, 257, 300]):
        cu.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert_bitwise_equal(captured, function(q, k, v), str(lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_as_accurate_as_the_stock_one(dtype):
    inputs = attention_inputs(700, 1, 8, 2, 128, dtype)

    def stock(q, k, v, dout):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        by_head = lambda q, k, v: sdpa(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)  # noqa: E731
        return grads(by_head, dout, q, k, v)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = stock(*(t.double() for t in inputs))
    theirs = stock(*inputs)
    for name, a, b, e in zip(("out", "dq", "dk", "dv"), attention(*inputs), theirs, exact, strict=True):
        assert (a.double() - e).norm() <= 1.1 * (b.double() - e).norm() + 1e-6 * e.norm(), name


def test_twin_flash_attention_moves():
    """The backward of torch's flash attention adds with atomics: some rerun differs."""
    q, k, v, dout = (t.permute(1, 2, 0, 3).requires_grad_() for t in attention_inputs(2048, 1, 16, 16, 128, torch.bfloat16))
    seen = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        for _ in range(10):
            q.grad = None
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(dout.detach())
            seen.append(q.grad)
    assert any(compare(a, seen[0]) for a in seen)
