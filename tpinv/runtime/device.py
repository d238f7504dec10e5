"""What host functions of kernels do about devices: Triton launches on the current one, whichever the tensors are on."""

import functools
from collections.abc import Callable

import torch


def on_device_of_first(host: Callable) -> Callable:
    """``host`` runs with the device of its first argument, a tensor, as the current one. Nothing changes for a tensor on the CPU."""

    @functools.wraps(host)
    def guarded(first, *args, **kwargs):
        index = first.get_device()  # -1 on the CPU
        if index < 0 or index == torch.cuda.current_device():
            return host(first, *args, **kwargs)
        with torch.cuda.device_of(first):
            return host(first, *args, **kwargs)

    return guarded


def ceil_div(n: int, by: int) -> int:
    """Blocks of ``by`` that hold ``n``. triton.cdiv says the same, and takes longer to say it than a launch does."""
    return -(-n // by)


def current_stream(device: int) -> int:
    """The address of the current stream of CUDA device number ``device``, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(device)
