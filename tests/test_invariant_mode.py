"""invariant_mode: a row alone has the bytes that it has in a batch, of any torch model; without the mode some row has not."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from tpinv.inference import invariant_mode
from tpinv.testing import assert_bitwise_equal

ROWS, WIDTH = 27, 37  # no multiple of a vector


def rows(width: int = WIDTH, count: int = ROWS, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def weight(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


OPERATORS = {
    "mm": lambda x: x @ weight(x.shape[1], 48, dtype=x.dtype),
    "linear": lambda x: F.linear(x, weight(48, x.shape[1], dtype=x.dtype), weight(48, dtype=x.dtype)),
    "addmm": lambda x: torch.addmm(weight(48, dtype=x.dtype), x, weight(x.shape[1], 48, dtype=x.dtype), beta=0.5, alpha=2.0),
    "bmm": lambda x: torch.bmm(x.unsqueeze(1), weight(x.shape[1], 48, dtype=x.dtype).expand(len(x), -1, -1)).squeeze(1),
    "einsum": lambda x: torch.einsum("mk,kn->mn", x, weight(x.shape[1], 48, dtype=x.dtype)),
    "mv": lambda x: torch.mv(x, weight(x.shape[1], dtype=x.dtype)),
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[1:], weight(x.shape[1], dtype=x.dtype)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:], weight(x.shape[1], dtype=x.dtype), weight(x.shape[1], dtype=x.dtype)),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "exp2": torch.exp2,
    "softplus": F.softplus,
    "pow": lambda x: x.abs().pow(1.7),
    "rsqrt": lambda x: x.abs().rsqrt(),
    "celu": F.celu,
    "logsigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "sinh": lambda x: x.mul(0.3).sinh(),
    "cosh": lambda x: x.mul(0.3).cosh(),
    "atanh": lambda x: x.tanh().mul(0.9).atanh(),
    "atan2": lambda x: torch.atan2(x, weight(x.shape[1], dtype=x.dtype)),
    "ldexp": lambda x: torch.ldexp(x, weight(x.shape[1], dtype=x.dtype)),
    "logaddexp": lambda x: torch.logaddexp(weight(x.shape[1], dtype=x.dtype), x),
    "power of a number": lambda x: 1.3**x,
    "pow_": lambda x: x.abs().pow_(0.7),
    "silu_": lambda x: F.silu(x.clone(), inplace=True),
    "out": lambda x: torch.mm(x, weight(x.shape[1], 48, dtype=x.dtype), out=x.new_empty(len(x), 48)),
}


def differing(function, dtype) -> int:
    """Over sizes of a batch, how many of the first row's results are not those of the row alone."""
    x = rows(dtype=dtype)
    alone = function(x[:1])
    return sum(not torch.equal(function(x[:size])[:1], alone) for size in range(2, ROWS + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_alone_is_a_row_in_a_batch(name, dtype):
    with invariant_mode():
        assert differing(OPERATORS[name], dtype) == 0
        found = OPERATORS[name](rows(dtype=dtype))
    close = {"rtol": 2e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.15}
    torch.testing.assert_close(found, OPERATORS[name](rows(dtype=dtype)), **close)


def test_stock_rows_are_not():
    wrong = {name for name, function in OPERATORS.items() if differing(function, torch.float32)}
    assert wrong & {"mm", "linear", "addmm", "einsum"} and wrong & {"sigmoid", "silu", "gelu", "exp2", "softplus", "pow"}, wrong


def attention(queries: int, keys: int, **arguments):
    q, k, v = (torch.randn(2, 4, keys, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return F.scaled_dot_product_attention(q[:, :, keys - queries :], k, v, **arguments)


def test_decode_is_prefill():
    with invariant_mode():
        prefill = attention(600, 600, is_causal=True)
        assert_bitwise_equal(attention(1, 600), prefill[:, :, -1:])
        mask = torch.ones(7, 600, dtype=torch.bool).tril(593)
        assert_bitwise_equal(attention(7, 600, attn_mask=mask), prefill[:, :, -7:])
    torch.testing.assert_close(prefill, attention(600, 600, is_causal=True), rtol=1e-4, atol=1e-5)
    assert not torch.equal(attention(1, 600), attention(600, 600, is_causal=True)[:, :, -1:])


def test_padding_is_left_out():
    q, k, v = (torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    padded = [F.pad(t, (0, 0, 5, 3), value=torch.nan) for t in (q, k, v)]
    mask = torch.zeros(1, 1, 28, 28, dtype=torch.bool)
    mask[..., 5:25, 5:25] = torch.ones(20, 20, dtype=torch.bool).tril()
    with invariant_mode():
        alone = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found = F.scaled_dot_product_attention(*padded, attn_mask=mask)
    assert_bitwise_equal(found[:, :, 5:25], alone)


def test_an_upper_left_mask_is_torchs():
    """is_causal with fewer queries than keys: the first query sees the first key alone."""
    q, k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    with invariant_mode():
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("queries, keys", [(6, 6), (3, 7), (7, 3)])
def test_a_mask_and_is_causal_hold_together(queries, keys):
    """The mask alone was taken."""
    q, k, v = (torch.randn(2, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (queries, keys, keys))
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., -2:] = False
    together = mask & torch.ones(queries, keys, dtype=torch.bool).tril()
    with invariant_mode():
        found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, together))
    assert not torch.allclose(found, F.scaled_dot_product_attention(q, k, v, mask.expand(2, 1, queries, keys)))


@pytest.mark.parametrize("dim", [3, -4, (0, 3), (0, 0), (1, -2)])
@pytest.mark.parametrize("function", [torch.sum, torch.mean])
def test_dimensions_that_torch_refuses(function, dim):
    """They were taken modulo the number of dimensions."""
    x = torch.ones(2, 3, 4)
    with pytest.raises((IndexError, RuntimeError)) as stock:
        function(x, dim)
    with invariant_mode(), pytest.raises(stock.type):
        function(x, dim)


def test_elementwise_operands_are_broadcast():
    """To the shape of the first of them, which had to be the largest."""
    wide, narrow = rows().abs(), rows()[0].abs()
    for base, exponent in ((narrow, wide), (wide, narrow), (torch.tensor(1.3), wide), (narrow[:, None], narrow)):
        with invariant_mode():
            found = torch.pow(base, exponent)
        torch.testing.assert_close(found, torch.pow(base, exponent))


def test_gradients_pass():
    x, w = rows().requires_grad_(), weight(48, WIDTH).requires_grad_()
    expected = torch.autograd.grad(F.silu(F.linear(x, w)).sum(), (x, w))
    with invariant_mode():
        found = torch.autograd.grad(F.silu(F.linear(x, w)).sum(), (x, w))
        alone = torch.autograd.grad(F.silu(F.linear(x[:1], w)).sum(), x)[0][:1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_bitwise_equal(found[0][:1], alone)


def test_it_nests_and_ends_whatever_is_raised():
    x, w = rows(), weight(WIDTH, 48)
    stock = x @ w
    with invariant_mode():
        once = x @ w
        with invariant_mode():
            assert_bitwise_equal(x @ w, once)
        with pytest.raises(RuntimeError):
            x @ w.t()
        assert_bitwise_equal(x @ w, once)
    assert_bitwise_equal(x @ w, stock)
    with pytest.raises(ZeroDivisionError), invariant_mode():
        raise ZeroDivisionError
    assert_bitwise_equal(x @ w, stock)


def test_what_is_not_covered_warns_once_a_context():
    x, w = torch.randn(1, 3, 9), torch.randn(2, 3, 3)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as seen, invariant_mode():
            warnings.simplefilter("always")
            F.conv1d(x, w)
            F.conv1d(x, w)
        assert len([w for w in seen if "not covered by tpinv's invariant_mode" in str(w.message)]) == 1
    with warnings.catch_warnings(record=True) as seen, invariant_mode():
        warnings.simplefilter("always")
        F.scaled_dot_product_attention(*[torch.randn(1, 1, 4, 8)] * 3, attn_mask=torch.randn(4, 4))
        rows().double() @ torch.randn(WIDTH, 3).double()
    assert len(seen) == 1


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_transformers(family, dtype):
    """A sequence alone, in a batch, token by token with a cache, and padded on the left: the same logits."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=211,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    ids = torch.randint(3, 211, (5, 23))

    def step_by_step(one):
        past, logits = None, []
        for token in one.unbind(1):
            answer = model(token.unsqueeze(1), past_key_values=past, use_cache=True)
            past, logits = answer.past_key_values, [*logits, answer.logits]
        return torch.cat(logits, 1)

    def padded(one):
        mask = torch.tensor([[0] * 4 + [1] * one.shape[1], [1] * (one.shape[1] + 4)])
        both = torch.cat([F.pad(one, (4, 0)), torch.randint(3, 211, (1, one.shape[1] + 4))])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(both, attention_mask=mask, position_ids=positions).logits[:1, 4:]

    with torch.no_grad():
        stock = model(ids).logits
        stock_differs = [not torch.equal(model(ids[:1]).logits, stock[:1]), not torch.equal(step_by_step(ids[:1]), stock[:1])]
        with invariant_mode():
            batch = model(ids).logits
            assert_bitwise_equal(model(ids[:1]).logits, batch[:1])
            assert_bitwise_equal(step_by_step(ids[:1]), batch[:1])
            assert_bitwise_equal(padded(ids[:1]), batch[:1])
    assert any(stock_differs)
    torch.testing.assert_close(batch, stock, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=5e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    x = torch.randn(40, 1024, device="cuda").to(dtype)
    w, scale = torch.randn(768, 1024, device="cuda").to(dtype), torch.rand(1024, device="cuda").to(dtype)
    q, k, v = (torch.randn(1, 4, 700, 64, device="cuda").to(dtype) for _ in range(3))
    with invariant_mode():
        for function in (lambda x: F.linear(x, w), lambda x: x.softmax(-1), lambda x: x.sum(-1), lambda x: F.rms_norm(x, (1024,), scale)):
            whole = function(x)
            for rows in (slice(0, 1), slice(7, 9), slice(3, 40)):
                assert_bitwise_equal(function(x[rows]).cpu(), whole[rows].cpu())
        prefill = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert_bitwise_equal(F.scaled_dot_product_attention(q[:, :, -1:], k, v).cpu(), prefill[:, :, -1:].cpu())
    torch.testing.assert_close(prefill, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=2e-2, atol=2e-2)
