"""What tpinv keeps of a device between calls: one object per device, which can be seen and cleared.

    device_state(0).choices      the configurations that the tuner chose
    device_state(0).forget()     empties what can be found out again
    clear()                      forgets everything of every device, as if nothing had run

Two kinds of things are kept. What a Memo holds can be found out again: one that is full is emptied. What a captured CUDA graph reads
when it is replayed (tables, counters of captured launches, loaded functions) has to stay where it is: it is kept until ``clear``, and
there is little of it, because none depends on the number of tokens. So call ``clear`` only when every captured graph is gone.

Pure arithmetic on trees and shapes is not state; it is kept by functools.lru_cache where it is defined.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from tpinv.runtime.counters import Counters
from tpinv.runtime.turns import Turns


class Memo(dict):
    """A dict of at most ``limit`` entries: the next one empties it first."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self.limit and key not in self:
            self.clear()
        super().__setitem__(key, value)


class DeviceState:
    """Of CUDA device number ``index``; None stands for the CPU, where Triton's interpreter and pretended GPUs run."""

    def __init__(self, index: int | None):
        self.index = index
        self.counters = Counters(index)
        self.turns = Turns()  # of launches that wait for other ranks
        self.functions: dict[tuple, Any] = {}  # csrc, specialization -> the loaded function
        self.launches: dict[Any, Memo] = {}  # Triton kernel -> kind of arguments -> what Triton compiled
        self.plans = Memo(4096)  # launches of csrc's GEMM and attention, but for addresses
        self.calls = Memo(8192)  # products by shapes, strides and alignments -> their launches; attention -> whether csrc computes it
        self.choices = Memo(1 << 14)  # shape class -> the tuner's configuration
        self.verified = Memo(1 << 16)  # compiled kernel -> has it the canonical bytes?
        self._tables: dict[tuple, Tensor] = {}

    @functools.cached_property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.index)

    @functools.cached_property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.index)

    @functools.cached_property
    def multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(self.index).multi_processor_count

    def table(self, values: tuple) -> Tensor:
        """int32 ``values`` on the device, at one address for good. ValueError in the capture of a CUDA graph that needs a new one.

        The copy is a blocking one, once for each table: every stream may read it from then on.
        """
        found = self._tables.get(values)
        if found is None:
            if self.index is not None and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "the first call with a new tree copies a table to the GPU, which a capture forbids; make one call before it"
                )
            device = torch.device("cpu") if self.index is None else torch.device("cuda", self.index)
            found = self._tables[values] = torch.tensor(values, dtype=torch.int32).to(device)
        return found

    def forget(self) -> None:
        """Empties the memos: choices are made, and kernels verified, anew. No captured graph minds."""
        for memo in (self.plans, self.calls, self.choices, self.verified, *self.launches.values()):
            memo.clear()

    def summary(self) -> dict[str, int]:
        """How much is kept of what."""
        kept = {name: len(value) for name, value in vars(self).items() if isinstance(value, dict)}
        return kept | {"launches": sum(map(len, self.launches.values())), "counters": self.counters.kept}


_states: dict[int | None, DeviceState] = {}


def device_state(index: int | None) -> DeviceState:
    """The state of CUDA device number ``index`` (None: the CPU)."""
    state = _states.get(index)
    if state is None:
        state = _states[index] = DeviceState(index)
    return state


def device_states() -> tuple[DeviceState, ...]:
    """Of every device that was used."""
    return tuple(_states.values())


def clear() -> None:
    """Forgets everything. Only when no kernel runs and every CUDA graph captured so far is gone."""
    _states.clear()
