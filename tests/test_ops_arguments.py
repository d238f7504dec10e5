"""What functions refuse on one rank, with rule, value and fix; what meta tensors give; and a BLAS that looks at a row's place."""

import math

import pytest
import torch

import tpinv
from tpinv import ReductionTree
from tpinv.ops import gather_last_dim
from tpinv.reference.products import require_rows_alike

TREE = ReductionTree(4)


def tensors(*shapes, device="cpu", dtype=torch.float32):
    return [torch.ones(shape, device=device, dtype=dtype) for shape in shapes]


def functions(device: str = "cpu") -> dict:
    """name -> (function of a tree, shape of the result)"""
    x, wide, narrow, w, hidden = tensors((4, 8), (12, 8), (6, 8), (8,), (4, 6), device=device)
    values, target = torch.ones(1, 4, 8, device=device), torch.ones(4, dtype=torch.long, device=device)
    return {
        "column_parallel_linear": (lambda tree: tpinv.column_parallel_linear(x, wide, tree=tree), (4, 12)),
        "row_parallel_linear": (lambda tree: tpinv.row_parallel_linear(x, narrow, tree=tree), (4, 6)),
        "rms_norm": (lambda tree: tpinv.rms_norm(x, w, tree=tree), (4, 8)),
        "layer_norm": (lambda tree: tpinv.layer_norm(x, w, w, tree=tree), (4, 8)),
        "cross_entropy": (lambda tree: tpinv.vocab_parallel_cross_entropy(x, target, tree=tree), (4,)),
        "log_probs": (lambda tree: tpinv.vocab_parallel_log_probs(x, target, tree=tree), (4,)),
        "reduce_add_rms_norm": (lambda tree: tpinv.reduce_add_rms_norm(values, x, w, tree=tree)[1], (4, 8)),
        "row_parallel_add_rms_norm": (
            lambda tree: tpinv.row_parallel_add_rms_norm(x, narrow, hidden, w[:6], tree=tree)[1],
            (4, 6),
        ),
    }


TREELESS = {
    "silu": (tpinv.silu, ((4, 8),), (4, 8)),
    "gelu": (tpinv.gelu, ((4, 8),), (4, 8)),
    "swiglu": (tpinv.swiglu, ((4, 8),), (4, 4)),
    "gather_last_dim": (gather_last_dim, ((4, 8),), (4, 8)),
    "core_attention": (tpinv.core_attention, ((5, 1, 2, 8),) * 3, (5, 1, 2, 8)),
}


@pytest.mark.parametrize("tree", [None, 8, "8"])
@pytest.mark.parametrize("name", functions())
def test_what_is_no_tree(name, tree):
    with pytest.raises(ValueError, match=r"must be a tpinv.ReductionTree; pass tree=ReductionTree\(8\)"):
        functions()[name][0](tree)


@pytest.mark.parametrize("eps", [-1.0, -1e-30, math.nan, math.inf, True, "1e-5", None])
def test_what_is_no_eps(eps):
    x, w, values = tensors((4, 8), (8,), (1, 4, 8))
    narrow = torch.ones(8, 8)
    for call in (
        lambda: tpinv.rms_norm(x, w, eps, tree=TREE),
        lambda: tpinv.layer_norm(x, w, None, eps, tree=TREE),
        lambda: tpinv.reduce_add_rms_norm(values, x, w, eps, tree=TREE),
        lambda: tpinv.row_parallel_add_rms_norm(x, narrow, x, w, eps, tree=TREE),
    ):
        with pytest.raises(ValueError, match="eps=.* must be a finite number of at least 0"):
            call()
    if isinstance(eps, float):
        with pytest.raises(ValueError, match="eps=.* must be a finite number of at least 0"):
            torch.ops.tpinv.rms_norm(x, w, eps, 4, "", False, False)


def test_an_eps_of_zero_is_one():
    x, w = torch.arange(1.0, 9).view(1, 8), torch.ones(8)
    assert torch.allclose(tpinv.rms_norm(x, w, 0, tree=TREE), torch.nn.functional.rms_norm(x, (8,), eps=0.0))


@pytest.mark.parametrize("label", [-1, 8, -101])
def test_a_label_out_of_range_names_the_one_that_is_ignored(label):
    target = torch.tensor([1, label])
    with pytest.raises(ValueError, match=rf"\[0, 8\), the global vocabulary; got {label} and 0 others; write ignore_index=-100"):
        tpinv.vocab_parallel_cross_entropy(torch.zeros(2, 8), target, tree=TREE)


def test_an_id_out_of_range():
    with pytest.raises(ValueError, match=r"ids must be in \[0, 8\), the global vocabulary; got 8 and 0 others$"):
        tpinv.vocab_parallel_embedding(torch.tensor([1, 8]), torch.zeros(8, 2))


# -- meta tensors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", functions())
def test_meta_tensors_have_the_shapes(name):
    real, meta = functions()[name][0](TREE), functions("meta")[name][0](TREE)
    assert meta.is_meta and meta.shape == real.shape == functions()[name][1]
    assert meta.dtype == real.dtype and meta.stride() == real.stride()


@pytest.mark.parametrize("name", TREELESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_have_the_shapes_and_gradients(name, dtype):
    function, shapes, expected = TREELESS[name]
    inputs = [t.requires_grad_() for t in tensors(*shapes, device="meta", dtype=dtype)]
    y = function(*inputs)
    assert y.is_meta and y.shape == expected and y.dtype == dtype
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.is_meta and t.grad.dtype == dtype for t in inputs)


def test_modules_on_meta():
    x, ids = torch.ones(4, 8, device="meta"), torch.ones(4, dtype=torch.long, device="meta")
    net = torch.nn.Sequential(
        tpinv.VocabParallelEmbedding(16, 8, device="meta"),
        tpinv.RMSNorm(8, tree=TREE, device="meta"),
        tpinv.ColumnParallelLinear(8, 12, tree=TREE, device="meta"),
        tpinv.RowParallelLinear(12, 8, tree=TREE, device="meta"),
        tpinv.LayerNorm(8, tree=TREE, device="meta"),
    )
    y = net(ids)
    assert y.is_meta and y.shape == x.shape
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())


def test_meta_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        tpinv.column_parallel_linear(*tensors((4, 8), (12, 9), device="meta"), tree=TREE)
    with pytest.raises(ValueError, match="do not fit"):
        tpinv.row_parallel_linear(*tensors((4, 8), (6, 9), device="meta"), tree=TREE)
    with pytest.raises(ValueError, match="float64"):
        tpinv.silu(torch.ones(2, device="meta", dtype=torch.float64))
    with pytest.raises(ValueError, match="side by side"):
        tpinv.swiglu(torch.ones(3, device="meta"))
    from tpinv import kernels

    with pytest.raises(ValueError, match="a meta tensor holds no numbers"):
        kernels.matmul(*tensors((4, 8), (8, 4), device="meta"))


# -- what is no dense tensor of one device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", [lambda t: t.tolist(), lambda t: None, torch.Tensor.to_sparse, lambda t: torch.nested.nested_tensor([t, t])]
)
def test_operands_that_are_no_dense_tensors(odd):
    x, w = tensors((4, 8), (16, 8))
    tpinv.column_parallel_linear(x, w, tree=TREE)  # shapes that have passed
    for arguments in ((odd(x), w), (x, odd(w))):
        with pytest.raises(ValueError, match="pass a dense torch.Tensor"):
            tpinv.column_parallel_linear(*arguments, tree=TREE)
    with pytest.raises(ValueError, match="weight of vocab_parallel_embedding is .*pass a dense"):
        tpinv.vocab_parallel_embedding(torch.tensor([1]), odd(w))


def test_a_weight_that_was_left_on_meta():
    """It gave memory that nobody had written to."""
    x, w, b = tensors((4, 8), (16, 8), (16,))
    for weight, bias in ((w.to("meta"), b), (w, b.to("meta"))):
        with pytest.raises(ValueError, match="several devices, {'x': 'cpu'.*to_empty"):
            tpinv.column_parallel_linear(x, weight, bias, tree=TREE)


@pytest.mark.parametrize("name", ["silu", "column_parallel_linear", "rms_norm"])
def test_negated_views_have_their_sign(name):
    """Their numbers do not lie where they say: a kernel would read the others."""
    make = {"silu": tpinv.silu, "column_parallel_linear": lambda x: tpinv.column_parallel_linear(x, torch.ones(16, 8), tree=TREE)}
    function = make.get(name) or (lambda x: tpinv.rms_norm(x, torch.ones(8), tree=TREE))
    x = tensors((4, 8))[0].requires_grad_()
    twin = torch._neg_view(-x.detach()).requires_grad_()
    y, other = function(x), function(twin)
    (dx,), (dtwin,) = torch.autograd.grad(y, x, torch.ones_like(y)), torch.autograd.grad(other, twin, torch._neg_view(-torch.ones_like(y)))
    assert torch.equal(y, other) and torch.equal(dx, dtwin)


# -- autocast -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", functions())
def test_autocast_changes_nothing(name):
    expected = functions()[name][0](TREE)
    with torch.autocast("cpu", torch.bfloat16):
        y = functions()[name][0](TREE)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


# -- a CPU's BLAS -------------------------------------------------------------------------------------------------------------------


def test_a_blas_that_looks_at_a_rows_place_is_refused(monkeypatch):
    """Planted: the last of 64 rows is added in reverse."""
    stock = torch.Tensor.__matmul__

    def by_place(a, b):
        product = stock(a, b)
        product[-1] = stock(a[-1:].flip(1), b.flip(0))[0]
        return product

    x, w = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)), torch.ones(16, 100)
    require_rows_alike.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", by_place)
    try:
        with pytest.raises(ValueError, match=r"row 63 of a product of 64 x 100 by 100 x 16 .* use another build of torch"):
            tpinv.column_parallel_linear(x, w, tree=ReductionTree(1))
    finally:
        require_rows_alike.cache_clear()


@pytest.mark.parametrize("leaves, columns", [(8, 8), (1, 5), (4, 12), (1, 130)])
@pytest.mark.parametrize("offset", [1, 3])
def test_a_row_alone_at_an_odd_address(leaves, columns, offset):
    """A fault of old: 65 x 7 by leaves of one column, from storage that is not aligned."""
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(65 * 7 + offset, generator=generator)
    x, w = memory[offset:].view(65, 7), torch.randn(columns, 7, generator=generator)
    whole = tpinv.column_parallel_linear(x, w, tree=ReductionTree(leaves))
    for rows in (slice(1, None), slice(64, 65), slice(5, 40)):
        assert torch.equal(tpinv.column_parallel_linear(x[rows], w, tree=ReductionTree(leaves)), whole[rows])
    assert torch.equal(whole, tpinv.column_parallel_linear(x.clone(), w, tree=ReductionTree(leaves)))
