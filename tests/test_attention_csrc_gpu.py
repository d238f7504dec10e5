"""csrc/sm90_attention.cu on a Hopper GPU: the bytes of the Triton kernel, for every form, shape and layout. ``make test-gpu``."""

import pytest
import torch

from tpinv.reference.attention import Pack
from tpinv.runtime.state import device_state
from tpinv.testing import assert_bitwise_equal

pytest.importorskip("triton")

from tpinv.kernels.attention import forward, sm90

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


# queries, keys, batch, heads, key heads: around tiles, blocks, leaves and nodes; halves of tiles without rows; more tiles than programs
SHAPES = [
    (65, 65, 1, 1, 1), (128, 129, 2, 2, 2), (192, 700, 3, 4, 1), (777, 777, 3, 4, 4), (1100, 1100, 1, 8, 2), (300, 4096, 1, 4, 2),
    (4096, 4096, 1, 8, 2), (5000, 5000, 1, 4, 2), (200, 12_289, 1, 4, 2), (129, 33_000, 1, 2, 1),
]  # fmt: skip
FORMS = [(128, torch.bfloat16), (64, torch.float16), (96, torch.bfloat16), (128, torch.float16), (64, torch.bfloat16), (40, torch.bfloat16)]


def make(queries, keys, batch, heads, groups, width, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(n, batch, h, width, device="cuda", generator=generator).to(dtype)
        for n, h in ((queries, 2 * heads), (keys, groups), (keys, groups))
    ]


def both(q, k, v, causal, pack=None, scale=0.3):
    """Results of csrc and of Triton."""
    assert sm90.refuses(q, k, v, pack) is None
    results = forward.empty_results(q, pack)
    for t in results:
        t.fill_(float("nan"))
    sm90.run(q, k, v, *results, scale, causal, pack)
    return results, forward.triton_forward(q, k, v, scale, causal, pack)


@pytest.mark.parametrize("width, dtype", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_bytes_are_those_of_the_triton_kernel(width, dtype, causal):
    for shape in SHAPES if (width, dtype) in FORMS[:2] else SHAPES[3:8:2]:
        q, k, v = make(*shape, width, dtype)
        for name, a, b in zip(("out", "lse"), *both(q, k, v, causal), strict=True):
            assert_bitwise_equal(a, b, f"{name} of {shape}")


def test_any_strides_that_copies_can_take():
    mixed = torch.randn(3, 700, 2, 12, 128, device="cuda").bfloat16()  # q, k and v beside each other, batch in front
    q, k, v = (mixed[i].transpose(0, 1).transpose(0, 1)[:, :, i : i + 4] for i in range(3))
    behind = torch.randn(2, 4, 700, 128, device="cuda").bfloat16().permute(2, 0, 1, 3)  # [b, h, s, d] in memory
    for tensors in ((q, k, v), (behind, k, v), (q[:, :1], k[:, 1:], v[:, :1]), (q, behind[:, :, :2], behind[:, :, 2:])):
        for a, b in zip(*both(*tensors, True), strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("width, dtype", [(128, torch.bfloat16), (64, torch.float16), (96, torch.bfloat16)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[300, 0, 1, 1000, 64, 577, 128], [9000, 5, 4097, 63]], ids=["a node", "a tree"])
def test_packs_with_nan_between_sequences(width, dtype, causal, lengths):
    def starts(gap):
        return torch.tensor([sum(lengths[:i]) + gap * i for i in range(len(lengths) + 1)], dtype=torch.int32, device="cuda")

    cu, first = starts(0), starts(5)
    q, k, v = make(sum(lengths) + 40, sum(lengths) + 40, 1, 2, 2, width, dtype)
    inside = torch.zeros(len(q), dtype=torch.bool, device="cuda")
    for start, count in zip(first.tolist(), lengths, strict=False):
        inside[start : start + count] = True
    k[~inside], v[~inside] = float("nan"), float("nan")
    pack = Pack(cu, cu, first, first, max(lengths), max(lengths))
    (out, lse), (expected, expected_lse) = both(q, k, v, causal, pack)
    assert_bitwise_equal(out[inside], expected[inside], "out")
    assert_bitwise_equal(lse[:, :, inside], expected_lse[:, :, inside], "lse")
    assert out[~inside].isnan().all()  # nothing is written that belongs to no sequence
    whole, _ = forward.forward(q, k, v, 0.3, causal, pack)
    assert not whole[~inside].any()


def test_numbers_that_are_not_finite():
    for value in (float("inf"), float("-inf"), float("nan")):
        q, k, v = make(300, 900, 1, 2, 2, 128, torch.bfloat16)
        k[100, 0, 0, 5], q[17, 0, 1, 3], v[600, 0, 1, 7] = value, value, value
        for a, b in zip(*both(q, k, v, True), strict=True):
            assert_bitwise_equal(a, b, f"{value}")


def test_repeats_streams_and_a_graph():
    q, k, v = make(2000, 6000, 1, 8, 2, 128, torch.bfloat16)
    expected, _ = forward.triton_forward(q, k, v, 0.1, True)
    first, _ = forward.forward(q, k, v, 0.1, True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            found.append(forward.forward(q, k, v, 0.1, True)[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, _ = forward.forward(q, k, v, 0.1, True)
    for _ in range(50):
        replayed.fill_(float("nan"))
        graph.replay()
        assert_bitwise_equal(replayed, expected)
    for out in (first, *found):
        assert_bitwise_equal(out, expected)


def test_a_kernel_that_disagrees_is_not_used(monkeypatch):
    q, k, v = make(300, 300, 1, 2, 2, 128, torch.float16)
    state = device_state(q.device.index)
    state.forget()
    honest = forward.triton_forward
    monkeypatch.setattr(forward, "triton_forward", lambda *a, **k: tuple(t + 1e-3 for t in honest(*a, **k)))
    out, _ = forward.forward(q, k, v, 0.1, True)
    assert_bitwise_equal(out, honest(q, k, v, 0.1, True)[0] + 1e-3)  # the other kernel's
    state.forget()


def test_twin_another_kernel_has_other_bytes():
    q, k, v = make(700, 700, 1, 4, 4, 128, torch.bfloat16)
    q = q[:, :, :4].contiguous()
    ours, _ = forward.forward(q, k, v, 128**-0.5, True)
    dense = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        stock = torch.nn.functional.scaled_dot_product_attention(*dense, is_causal=True)
    assert not torch.equal(stock.permute(2, 0, 1, 3), ours)
