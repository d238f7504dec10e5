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
        with torch.cuda.device_of(first):
            return host(first, *args, **kwargs)

    return guarded


def table(values: Sequence, device: torch.device) -> Tensor:
    """int32 ``values`` on ``device``. Keep it for good (functools.cache): a captured CUDA graph reads it whenever it is replayed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("the first call with new shapes copies tables to the GPU, which a capture forbids; make one call before it")
    return torch.tensor(values, dtype=torch.int32).to(device)
