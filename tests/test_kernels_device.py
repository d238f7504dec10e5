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
from tpinv.runtime import state
from tpinv.runtime.device import on_device_of_first

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
        state.DeviceState(0).table((1, 2))
    cpu = state.DeviceState(None)
    first = cpu.table((1, 2))
    assert first.dtype == torch.int32 and all(cpu.table((i,)) is not None for i in range(100)) and cpu.table((1, 2)) is first


def test_what_is_kept_of_a_device_can_be_seen_bounded_and_cleared():
    state.clear()
    one = state.device_state(None)
    assert state.device_state(None) is one and state.device_states() == (one,)
    one.table((1, 2))
    for i in range(one.calls.limit + 5):
        one.calls[i] = i
    one.calls[one.calls.limit] = 0  # one that is there
    assert one.summary()["calls"] == 5 and one.summary()["_tables"] == 1
    assert {name for name, value in vars(one).items() if isinstance(value, state.Memo)} == {"plans", "calls", "choices", "verified"}
    one.forget()
    assert one.summary()["calls"] == 0 and one.summary()["_tables"] == 1
    state.clear()
    assert not state.device_states()


def test_captured_launches_get_counters_of_their_own(monkeypatch):
    capturing, stream = [False], [7]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream[0], raising=False)
    counters = state.DeviceState(0).counters
    monkeypatch.setattr(counters, "_zeros", lambda count: torch.zeros(count, dtype=torch.int32))
    eager = counters.take(100)
    assert counters.take(50).data_ptr() == eager.data_ptr()
    capturing[0] = True
    first, second = counters.take(40), counters.take(40)
    assert second.data_ptr() == first.data_ptr() + 64 * 4 and not torch.any(first)
    counters.recycle()
    assert counters.take(1).data_ptr() == first.data_ptr()
    assert counters.take(1 << 20).data_ptr() not in (first.data_ptr(), second.data_ptr())  # no room: zeroed in the graph
    capturing[0] = False
    for stream[0] in range(1000):  # streams come and go
        counters.take(1)
    assert counters.kept < 20 << 20
