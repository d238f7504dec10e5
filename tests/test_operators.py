"""The torch operators of a block: the bytes of the functions, opaque to the compiler, and their gradients registered."""

import pytest
import torch

from tpinv import ReductionTree, column_parallel_linear, rms_norm, row_parallel_linear
from tpinv.ops import core_attention, swiglu
from tpinv.ops.registry import ALONE, group_name
from tpinv.testing import assert_bitwise_equal, run_ranks

TREE = ReductionTree(8)
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))
LINEAR = (8, "float32", "")


def cases(device: str = "cpu") -> dict:
    ops = torch.ops.tpinv
    x, weight, bias, scale = (torch.randn(shape, device=device) for shape in ((5, 3, 64), (32, 64), (32,), (64,)))
    return {
        "column": (ops.column_parallel_linear, (x, weight, None, *LINEAR, False, 1), lambda x, w: column_parallel_linear(x, w, tree=TREE)),
        "fc1": (
            ops.column_parallel_linear,
            (x, weight, bias, *LINEAR, False, 2),
            lambda x, w, b: column_parallel_linear(x, w, b, tree=TREE, stride=2),
        ),
        "row": (ops.row_parallel_linear, (x, weight, bias, *LINEAR, False), lambda x, w, b: row_parallel_linear(x, w, b, tree=TREE)),
        "norm": (ops.rms_norm, (x, scale, 1e-5, 8, "", False, False), lambda x, w: rms_norm(x, w, 1e-5, tree=TREE)),
        "swiglu": (ops.swiglu, (x,), swiglu),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", cases())
def test_the_bytes_of_the_function(name, device):
    operator, arguments, function = cases(device)[name]
    inputs = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor)]
    y, expected = operator(*arguments), function(*inputs)
    dy = torch.randn_like(y)
    assert_bitwise_equal(y, expected)
    for found, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert_bitwise_equal(found, wanted)
    with torch.inference_mode():
        assert_bitwise_equal(operator(*arguments), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_attention():
    """As layers call it: [B, L, N, H] seen as [L, B, N, H]; forward, gradients, and as part of a full graph."""
    query, key, value = (torch.randn(2, 77, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    inputs = [t.transpose(0, 1).requires_grad_() for t in (query, key, value)]
    out, expected = torch.ops.tpinv.core_attention(*inputs, 0.125, True)[0], core_attention(*inputs, scale=0.125)
    dout = torch.randn_like(out)
    assert_bitwise_equal(out, expected)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, dout, retain_graph=True), torch.autograd.grad(expected, inputs, dout), strict=True
    ):
        assert_bitwise_equal(found, wanted)
    compiled = torch.compile(lambda *qkv: torch.ops.tpinv.core_attention(*qkv, 0.125, True)[0], backend="aot_eager", fullgraph=True)
    for found, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs, dout), torch.autograd.grad(out, inputs, dout), strict=True):
        assert_bitwise_equal(found, wanted)


@pytest.mark.parametrize("name", cases())
def test_opcheck(name):
    operator, arguments, _ = cases()[name]
    wants_all = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(operator.default, tuple(wants_all))
    frozen_input = [wants_all[0].detach(), *wants_all[1:]]
    if len(frozen_input) > 1:
        torch.library.opcheck(operator.default, tuple(frozen_input))


@pytest.mark.parametrize("name", cases())
def test_opcheck_on_transposed_inputs(name):
    """[s, b, h] seen as [b, s, h]: the strides that a compiler is told are those of the result."""
    operator, (x, *others), _ = cases()[name]
    torch.library.opcheck(operator.default, (x.transpose(0, 1).requires_grad_(), *others))
    x = x.transpose(0, 1).detach()
    real, fake = (
        operator(x.to(device), *(o.to(device) if isinstance(o, torch.Tensor) else o for o in others)) for device in ("cpu", "meta")
    )
    assert real.stride() == fake.stride()


def compiled_block(sequence_parallel: bool):
    """A column- and a row-parallel linear in one graph, on the default group; whole results."""
    import torch.distributed as dist

    from tpinv.collectives import all_gather, resolve
    from tpinv.layers import shard

    ranks, ops = resolve(), torch.ops.tpinv
    torch.manual_seed(0)
    x, up, down = (torch.randn(shape) for shape in ((8, 2, 64), (128, 64), (64, 128)))
    parts = [shard(up, 0, ranks.rank, ranks.size), shard(down, 1, ranks.rank, ranks.size)]
    x = shard(x, 0, ranks.rank, ranks.size) if sequence_parallel else x
    inputs = [t.requires_grad_() for t in (x, *parts)]
    settings = (8, "float32", group_name(ranks), sequence_parallel)

    def block(x, up, down):
        return x + ops.row_parallel_linear(ops.column_parallel_linear(x, up, None, *settings, 1), down, None, *settings)

    y = torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs)
    eager = block(*inputs)
    assert_bitwise_equal(y, eager)
    dx, dup, ddown = torch.autograd.grad(y.square().sum(), inputs)
    dist.barrier()
    whole = (lambda t: all_gather(t, ranks)) if sequence_parallel else lambda t: t
    return whole(y.detach()), whole(dx), all_gather(dup, ranks), all_gather(ddown, ranks, dim=1)


@pytest.mark.parametrize("ranks, sequence_parallel", [(2, False), (4, True)])
def test_full_graphs_over_ranks(ranks, sequence_parallel):
    alone = run_ranks(compiled_block, 1, False, timeout=200)[0]
    for found in run_ranks(compiled_block, ranks, sequence_parallel, timeout=200):
        for tensor, expected in zip(found, alone, strict=True):
            assert_bitwise_equal(tensor, expected)


def test_a_lone_rank_has_no_name():
    assert group_name(ALONE) == "" and ALONE.size == 1


def test_a_profiler_sees_an_operator_once():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.tpinv.rms_norm(x, weight, 1e-5, 8, "", False, False).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["tpinv::rms_norm"] == counts["tpinv::rms_norm_backward"] == 1


def rms_norm_of_whole_rows():
    from tpinv.collectives import resolve

    x, weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8, requires_grad=True)
    torch.ops.tpinv.rms_norm(x, weight, 1e-5, 2, group_name(resolve()), False, False).sum().backward()
    return weight.grad


def test_rows_that_every_rank_has_are_not_added_over_the_group():
    """An operator may name a group; only the flags say that it shares the rows."""
    (alone,), parts = run_ranks(rms_norm_of_whole_rows, 1), run_ranks(rms_norm_of_whole_rows, 2)
    for part in parts:
        assert_bitwise_equal(part, alone)
