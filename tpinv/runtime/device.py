"""What host functions of kernels do about devices: Triton launches on the current one, whichever the tensors are on, and CUDA graphs
keep the addresses of tables."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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


def table(values: Sequence, device: torch.device) -> Tensor:
    """int32 ``values`` on ``device``. Keep it for good (functools.cache): a captured CUDA graph reads it whenever it is replayed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("the first call with new shapes copies tables to the GPU, which a capture forbids; make one call before it")
    return torch.tensor(values, dtype=torch.int32).to(device)
