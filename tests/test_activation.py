"""silu and gelu on a CPU: an element's bits depend on the element alone, not on how many stand beside it in a row."""

import pytest
import torch

from tpinv import gelu, silu
from tpinv.ops import swiglu
from tpinv.testing import assert_bitwise_equal, compare

OURS = {"silu": silu, "gelu": gelu, "tanh gelu": lambda x: gelu(x, "tanh")}
STOCK = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "tanh gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
WIDTHS = (1, 2, 3, 4, 6, 8, 43, 86, 172)  # of a shard of 258 features; most are no multiple of a vector


def both(function, x, dy):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(dy)
    return torch.stack([y.detach(), x.grad])


def in_shards(function, x, dy, width):
    parts = zip(x.split(width, -1), dy.split(width, -1), strict=True)
    return torch.cat([both(function, part, dpart) for part, dpart in parts], -1)


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 258, generator=generator) * torch.exp2(torch.randint(-20, 5, (3, 7, 258), generator=generator).float())
    x[0, 0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    return x.to(dtype), torch.randn(3, 7, 258, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OURS)
def test_shards_give_the_bytes_of_the_whole(name, dtype):
    x, dy = inputs(dtype)
    whole = both(OURS[name], x, dy)
    nan = whole.isnan()  # an infinity times zero in the gradient; NaN has no fixed bits
    for width in WIDTHS:
        parts = in_shards(OURS[name], x, dy, width)
        assert_bitwise_equal(parts.masked_fill(nan, 0.0), whole.masked_fill(nan, 0.0), f"{name} in shards of {width}")


@pytest.mark.parametrize("name", ["silu", "tanh gelu"])
def test_stock_activations_depend_on_the_width(name):
    x, dy = inputs(torch.float32)
    x = x.clamp(-30, 30)
    whole = both(STOCK[name], x, dy)
    assert any(compare(in_shards(STOCK[name], x, dy, width), whole) for width in WIDTHS)


@pytest.mark.parametrize("name", OURS)
def test_accuracy_is_that_of_the_stock_activation(name):
    x, dy = inputs(torch.float32)
    x = x.clamp(-30, 30)
    exact = both(STOCK[name], x.double(), dy.double())
    error, stock = ((both(f[name], x, dy) - exact).abs().max() for f in (OURS, STOCK))
    assert error <= 2 * stock + 1e-7


@pytest.mark.parametrize("function", [*OURS.values(), swiglu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtypes_that_float32_would_truncate_are_refused(function, dtype):
    with pytest.raises(ValueError, match=f"x has dtype {dtype}"):
        function(torch.ones(2, dtype=dtype))


def test_unknown_approximation_is_refused():
    with pytest.raises(ValueError, match="must be 'none' or 'tanh'"):
        gelu(torch.zeros(1), "sigmoid")
