"""No function has a second derivative: the first backward with create_graph=True is an error, however the function was called; and what
runs a backward without it (checkpointing, compilers, torch.autograd.grad) works and changes no byte."""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tpinv
from tpinv import ReductionTree
from tpinv.ops import gather_first_dim, gather_last_dim
from tpinv.testing import assert_bitwise_equal

TREE, NO_GROUP = ReductionTree(4), ""
TARGET = torch.tensor([1, 0, 7, 3])
CU = torch.tensor([0, 3, 8], dtype=torch.int32)


def make(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def fused(function):
    def call(x, w):
        w.main_grad = torch.zeros_like(w)
        return function(x, w, tree=TREE, gradient_accumulation_fusion=True)

    return call


ops = torch.ops.tpinv
CASES = {
    "column_parallel_linear": (lambda x, w, b: tpinv.column_parallel_linear(x, w, b, tree=TREE), (4, 8), (12, 8), (12,)),
    "row_parallel_linear": (lambda x, w, b: tpinv.row_parallel_linear(x, w, b, tree=TREE), (4, 8), (6, 8), (6,)),
    "gathered": (lambda x, w: tpinv.column_parallel_linear(x, w, tree=TREE, gather_output=True), (4, 8), (12, 8)),
    "gather_last_dim": (gather_last_dim, (4, 8)),
    "gather_first_dim": (gather_first_dim, (4, 8)),
    "fused column": (fused(tpinv.column_parallel_linear), (4, 8), (12, 8)),
    "fused row": (fused(tpinv.row_parallel_linear), (4, 8), (6, 8)),
    "rms_norm": (lambda x, w: tpinv.rms_norm(x, w, tree=TREE), (4, 8), (8,)),
    "layer_norm": (lambda x, w, b: tpinv.layer_norm(x, w, b, tree=TREE), (4, 8), (8,), (8,)),
    "silu": (tpinv.silu, (4, 8)),
    "gelu": (tpinv.gelu, (4, 8)),
    "gelu tanh": (lambda x: tpinv.gelu(x, "tanh"), (4, 8)),
    "swiglu": (tpinv.swiglu, (4, 8)),
    "embedding": (lambda w: tpinv.vocab_parallel_embedding(TARGET, w), (8, 5)),
    "cross_entropy": (lambda x: tpinv.vocab_parallel_cross_entropy(x, TARGET, tree=TREE), (4, 8)),
    "log_probs": (lambda x: tpinv.vocab_parallel_log_probs(x, TARGET, tree=TREE), (4, 8)),
    "core_attention": (tpinv.core_attention, (5, 1, 2, 8), (5, 1, 2, 8), (5, 1, 2, 8)),
    "packed_attention": (lambda *t: tpinv.packed_attention(*t, cu_seqlens_q=CU, cu_seqlens_kv=CU), (8, 2, 8), (8, 2, 8), (8, 2, 8)),
}
OPERATORS = {
    "column_parallel_linear": (
        lambda x, w, b: ops.column_parallel_linear(x, w, b, 4, "float32", NO_GROUP, False, 1),
        (4, 8),
        (12, 8),
        (12,),
    ),
    "row_parallel_linear": (lambda x, w, b: ops.row_parallel_linear(x, w, b, 4, "float32", NO_GROUP, False), (4, 8), (6, 8), (6,)),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5, 4, NO_GROUP, False, False), (4, 8), (8,)),
    "swiglu": (ops.swiglu, (4, 8)),
    "core_attention": (lambda *t: ops.core_attention(*t, 0.5, True)[0], (5, 1, 2, 8), (5, 1, 2, 8), (5, 1, 2, 8)),
}
EVERY = {**CASES, **{f"operator {name}": case for name, case in OPERATORS.items()}}


def leaves(shapes) -> list[torch.Tensor]:
    return [make(*shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("way", ["grad", "backward", "under a profiler"])
def test_the_first_backward_with_create_graph_is_an_error(name, way):
    function, *shapes = EVERY[name]
    inputs = leaves(shapes)
    profiled = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if way == "under a profiler" else None
    with profiled or contextlib.nullcontext():
        y = function(*inputs)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            if way == "backward":
                y.sum().backward(create_graph=True)
            else:
                torch.autograd.grad(y.sum(), inputs[:1], create_graph=True)


def test_the_issue_in_short():
    """A penalty on a gradient that would train nothing."""
    x, up, down = leaves([(4, 8), (12, 8), (6, 12)])
    y = tpinv.row_parallel_linear(tpinv.silu(tpinv.column_parallel_linear(x, up, tree=TREE)), down, tree=TREE)
    with pytest.raises(RuntimeError, match="row_parallel_linear ran with gradients enabled"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_operators_have_no_gradient_either(name):
    function, *shapes = OPERATORS[name]
    inputs = leaves(shapes)
    with torch.no_grad():
        out = function(*inputs)
    dy = torch.ones_like(out).requires_grad_()
    needs = [True] * len(inputs)
    arguments = {
        "column_parallel_linear": lambda: (dy, *inputs[:2], needs, 4, "float32", NO_GROUP, False, 1),
        "row_parallel_linear": lambda: (dy, *inputs[:2], needs, 4, "float32", NO_GROUP, False),
        "rms_norm": lambda: (dy, *inputs, needs, 1e-5, 4, NO_GROUP, False, False),
        "swiglu": lambda: (dy, *inputs, needs),
        "core_attention": lambda: (dy, *inputs, out, torch.zeros(1, 2, 5), needs, 0.5, True),
    }[name]()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        getattr(ops, f"{name}_backward")(*arguments)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("fused")])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled", "one by one"])
def test_what_needs_no_graph_of_the_backward_works(name, how):
    function, *shapes = EVERY[name]
    expected_inputs, inputs = leaves(shapes), leaves(shapes)
    expected = function(*expected_inputs)
    dy = make(*expected.shape)
    expected.backward(dy)
    if how == "compiled":
        y = torch.compile(function, backend="aot_eager", fullgraph=not name.startswith(("embedding", "packed")))(*inputs)
    elif how == "one by one":
        y = function(*inputs)
    else:
        y = checkpoint(function, *inputs, use_reentrant=how == "reentrant")
    assert_bitwise_equal(y, expected)
    if how == "one by one":
        gradients = [torch.autograd.grad(y, t, dy, retain_graph=True)[0] for t in inputs]
    else:
        y.backward(dy)
        gradients = [t.grad for t in inputs]
    for found, wanted in zip(gradients, expected_inputs, strict=True):
        assert_bitwise_equal(found, wanted.grad)


def test_forward_mode_is_refused():
    """Not a gradient of zero."""
    import torch.autograd.forward_ad as forward

    with forward.dual_level():
        x = forward.make_dual(make(4, 8), torch.ones(4, 8))
        with pytest.raises((RuntimeError, NotImplementedError)):
            tpinv.silu(x)
        with pytest.raises((RuntimeError, NotImplementedError)):
            ops.swiglu(x)
