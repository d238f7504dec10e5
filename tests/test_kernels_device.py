"""Host functions of kernels launch on the device of their tensors, and say so when a CUDA graph capture comes too early. No GPU needed."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from tpinv.kernels.attention import backward as attention_backward
from tpinv.kernels.attention import forward as attention
from tpinv.kernels.attention import paged
from tpinv.kernels.rows import activation, cross_entropy, embedding, norm, squares
from tpinv.runtime.device import on_device_of_first, table

GUARDED = {
    activation: ("silu", "silu_backward", "swiglu", "swiglu_backward"),
    attention: ("forward",),
    attention_backward: ("backward",),
    paged: ("append", "forward"),
    cross_entropy: ("row_max", "vocab_sums", "vocab_grad"),
    embedding: ("sum_by_id",),
    norm: ("norm", "norm_backward"),
    squares: ("add_squares", "total"),
}


@pytest.mark.parametrize("function", [getattr(module, name) for module, names in GUARDED.items() for name in names])
def test_every_host_function_is_guarded(function):
    assert function.__code__ is on_device_of_first(function).__code__


def test_the_device_of_the_first_tensor_is_the_current_one(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device_of(x):
        entered.append(x.device)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        x, here = torch.empty(2, device="cuda:1"), torch.empty(2, device="cuda:0")
    host = on_device_of_first(lambda x, y: (list(entered), y))
    assert host(here, y=2) == ([], 2)  # the one that is the current one already
    assert host(x, y=3) == ([torch.device("cuda:1")], 3)


def test_a_cpu_tensor_needs_no_cuda():
    assert on_device_of_first(lambda x: x + 1)(torch.ones(1)) == 2


def test_a_table_cannot_be_made_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="make one call before it"):
        table([1, 2], torch.device("cuda"))
    assert table([(1, 2)], torch.device("cpu")).dtype == torch.int32
