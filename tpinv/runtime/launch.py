"""What a launch of a Triton kernel costs the host the second time: a lookup.

Triton binds, specializes and looks up the arguments of every launch anew, for longer than a small kernel runs. What it found out for a
launch holds for the next one with the same numbers, dtypes, alignments and constants, whatever the addresses.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from tpinv.runtime.device import current_stream
from tpinv.runtime.state import Memo, device_state

_LIMIT = 4096  # launches kept of one kernel on a device, with numbers that come and go
_NONE: dict = {}


class Kernel:
    """``@entry`` over ``@triton.jit``: used as what it wraps, ``kernel[grid](*arguments, **constants)``, constants last in its signature."""

    def __init__(self, jit: Any):
        self.jit = jit
        unspecialized = getattr(jit, "do_not_specialize", None) or ()
        self._any_number = frozenset(i for i, name in enumerate(jit.arg_names) if name in unspecialized)
        functools.update_wrapper(self, jit, updated=())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jit, name)

    def __getitem__(self, grid: tuple[int, ...]):
        return functools.partial(self._launch, grid)

    @functools.partial(torch.compiler.disable, recursive=False)  # no wrapper: a mark for Dynamo, which knows no addresses
    def _launch(self, grid: tuple[int, ...], *arguments, **constants) -> None:
        if not torch.cuda.is_initialized():  # Triton's interpreter compiles nothing
            self.jit[grid](*arguments, **constants)
            return
        device = torch.cuda.current_device()
        kept = device_state(device).launches.get(self, _NONE)
        key: list = [getattr(knobs.compilation, "instrumentation_mode", ""), *constants.items()]
        values: list = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                values.append(address)
                key += argument.dtype, address % 16, argument.get_device()  # a CPU tensor is Triton's to refuse: an address says nothing
                continue
            values.append(argument)
            if type(argument) is not int:
                key.append(type(argument))
            elif i in self._any_number:
                key.append(-(1 << 31) <= argument < 1 << 31)
            else:  # Triton specializes by what divides a number and by its size; these are few enough to tell all apart
                key.append(argument)
        compiled, last = kept.get(tuple(key), (None, ()))
        if compiled is None:
            compiled = self.jit[grid](*arguments, **constants)
            if compiled is not None:
                self._keep(device, tuple(key), compiled, len(arguments), constants)
            return
        compiled[(*grid, 1, 1)](*values, *last, stream=current_stream(device))

    def _keep(self, device: int, key: tuple, compiled: Any, given: int, constants: dict) -> None:
        last = self.jit.arg_names[given:]
        if not all(name in constants for name in last):
            raise TypeError(f"{self.jit.fn.__name__} wants {last} by name, got {sorted(constants)}")
        kept = device_state(device).launches.setdefault(self, Memo(_LIMIT))
        kept[key] = compiled, tuple(constants[name] for name in last)


def kind(argument: Any, specialized: bool = True) -> tuple:
    """What Triton may compile into a kernel of an argument: of a tensor its dtype and whether it begins on 16 bytes; of an integer whether
    it is 1, a multiple of 16, and 32 bits wide, or (``do_not_specialize``) the width alone."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    narrow = -(1 << 31) <= argument < 1 << 31
    return (argument == 1, argument % 16 == 0, narrow) if specialized else (narrow,)


def entry(jit: Any) -> Kernel:
    """Marks a Triton kernel that the host launches."""
    return Kernel(jit)
