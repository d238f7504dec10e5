"""csrc/sm90_attention_dkv.cu on a Hopper GPU: the bytes of the Triton kernel, for every form, shape and layout. ``make test-gpu``."""

import pytest
import torch

from tpinv.testing import assert_bitwise_equal

pytest.importorskip("triton")

from tpinv.kernels.attention import backward, forward, sm90_dkv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# queries, keys, batch, heads, key heads: around tiles and blocks; more keys than queries and fewer; more tiles than multiprocessors
SHAPES = [
    (64, 64, 1, 1, 1), (65, 129, 2, 2, 2), (192, 700, 3, 4, 1), (777, 777, 3, 4, 4), (1100, 1100, 1, 8, 2), (700, 200, 1, 4, 2),
    (4096, 4096, 1, 8, 2), (129, 9000, 1, 2, 1),
]  # fmt: skip
FORMS = [(128, torch.bfloat16), (64, torch.float16), (96, torch.bfloat16), (128, torch.float16), (40, torch.bfloat16)]


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def make(queries, keys, batch, heads, groups, width, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    counts = (queries, heads), (keys, groups), (keys, groups), (queries, heads)
    return [torch.randn(n, batch, h, width, device="cuda", generator=generator).to(dtype) for n, h in counts]


@pytest.mark.parametrize("width, dtype", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_bytes_are_those_of_the_triton_kernel(width, dtype, causal):
    for shape in SHAPES if (width, dtype) in FORMS[:2] else SHAPES[2:7:2]:
        q, k, v, dout = make(*shape, width, dtype)
        out, lse = forward.forward(q, k, v, 0.1, causal)
        delta = backward.row_dots(out, dout)
        assert sm90_dkv.refuses(q, k, v, dout, None) is None
        size, kind = (2, len(k), *q.shape[1:]), dtype if q.shape[2] == k.shape[2] else torch.float32
        found, expected = (torch.full(size, float("nan"), device="cuda", dtype=kind) for _ in range(2))
        sm90_dkv.run(q, k, v, dout, lse, delta, *found, 0.1, causal)
        backward.fill_parts(q, k, v, dout, lse, delta, *expected, 0.1, causal)
        for name, a, b in zip(("dk", "dv"), found, expected, strict=True):
            assert_bitwise_equal(a, b, f"{name} of {shape}")


def test_it_is_the_one_that_runs(monkeypatch):
    """Else the test of the backward pass would be Triton's alone."""
    q, k, v, dout = make(300, 300, 2, 4, 2, 128, torch.bfloat16)
    out, lse = forward.forward(q, k, v, 0.1, True)
    expected = backward.backward(q, k, v, out, lse, dout, 0.1, True)
    monkeypatch.setattr(backward, "fill_parts", None)
    for a, b in zip(backward.backward(q, k, v, out, lse, dout, 0.1, True), expected, strict=True):
        assert_bitwise_equal(a, b)


def test_any_strides_that_copies_can_take_and_reruns():
    mixed = torch.randn(3, 700, 2, 12, 128, device="cuda").bfloat16()  # q, k and v beside each other, batch in front
    q, k, v = (mixed[i][:, :, 4 * i : 4 * i + 4] for i in range(3))
    dout = torch.randn(700, 2, 8, 128, device="cuda").bfloat16()[:, :, ::2]
    out, lse = forward.forward(q, k, v, 0.1, True)
    first = backward.backward(q, k, v, out, lse, dout, 0.1, True)
    plain = backward.backward(*(t.contiguous() for t in (q, k, v, out)), lse, dout.contiguous(), 0.1, True)
    for again in [plain] + [backward.backward(q, k, v, out, lse, dout, 0.1, True) for _ in range(20)]:
        for a, b in zip(again, first, strict=True):
            assert_bitwise_equal(a, b)
