"""After warmup a model's linears call no product of a new shape, layout or dtype: nothing is left for a capture to meet."""

import pytest
import torch
from torch import Tensor, nn

from tpinv import ColumnParallelLinear, ReductionTree, RowParallelLinear, warmup
from tpinv.collectives import resolve
from tpinv.ops import products
from tpinv.testing import run_ranks

TREE = ReductionTree(8)


def model(dtype=torch.float32, sequence_parallel=False) -> nn.Module:
    settings = {"tree": TREE, "sequence_parallel": sequence_parallel, "dtype": dtype}
    blocks = [
        nn.Sequential(ColumnParallelLinear(24, 64, bias=bias, **settings), nn.SiLU(), RowParallelLinear(64, 24, bias=bias, **settings))
        for bias in (True, True, False)
    ]
    return nn.Sequential(*blocks)


def recorded(call) -> set:
    """The products that ``call`` asks for: functions, and what decides their kernels."""
    found, real = set(), {name: getattr(products, name) for name in ("tree_product", "local_product", "add_local_product")}

    def describe(value):
        return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value

    for name, function in real.items():

        def record(*arguments, function=function, name=name, **named):
            found.add((name, tuple(map(describe, arguments)), tuple((key, describe(value)) for key, value in sorted(named.items()))))
            return function(*arguments, **named)

        setattr(products, name, record)
    try:
        call()
    finally:
        for name, function in real.items():
            setattr(products, name, function)
    return found


def train(net, *tokens):
    for count in tokens:
        x = torch.randn(count, 24, dtype=net[0][0].weight.dtype, requires_grad=True)
        net(x).backward(torch.randn_like(x))


def nothing_is_new(sequence_parallel: bool = False) -> None:
    p = resolve().size
    torch.manual_seed(0)  # layers refuse ranks that draw different weights
    net = model(torch.bfloat16, sequence_parallel)
    before = [parameter.clone() for parameter in net.parameters()]
    warm = recorded(lambda: warmup(net, (4, 12, 4), backward=True))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))
    rows = 1 if not sequence_parallel else p
    used = recorded(lambda: train(net, 4 // rows, 12 // rows))
    assert len(used) > 8 and used <= warm, used - warm
    assert recorded(lambda: train(net, 8 // rows)) - warm, "the twin: another number of tokens is new"


def test_nothing_is_new_after_warmup():
    nothing_is_new()
    net = model()
    assert warmup(net, [3]) == 4 and warmup(net, range(1, 4)) == 12  # two kinds of each linear: with a bias and without
    forward = recorded(lambda: warmup(net, [3]))
    assert forward < recorded(lambda: warmup(net, [3], backward=True))


def several() -> None:
    for sequence_parallel in (False, True):
        nothing_is_new(sequence_parallel)


def test_nothing_is_new_after_warmup_on_ranks():
    run_ranks(several, 4)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="Linear has no ColumnParallelLinear or RowParallelLinear of tpinv"):
        warmup(nn.Linear(2, 2), [1])
    for tokens in ([], [0, 4]):
        with pytest.raises(ValueError, match="must be numbers of at least 1"):
            warmup(model(), tokens)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture of a CUDA graph, not in it"):
        warmup(model(), [1])
