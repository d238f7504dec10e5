"""Megatron-Core on a machine without a GPU: what it asks CUDA for although it does not need it."""

import contextlib

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


class _NoRandomStates:
    """Stands in for the CUDA RNG tracker. Megatron forks it around dropout even when the dropout is 0, and recomputation saves it."""

    @contextlib.contextmanager
    def fork(self, *_):
        yield

    def is_initialized(self) -> bool:
        return False

    def get_states(self) -> dict:
        return {}

    def set_states(self, states: dict) -> None:
        pass


class _CudaMeansCpu(TorchFunctionMode):
    """Megatron spells out ``device="cuda"`` and ``.cuda()``, which make and leave a CPU tensor here, and compares ``tensor.type()`` with the
    names of CUDA types, which CPU tensors get here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if kwargs and kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.cuda:
            return args[0]
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextlib.contextmanager
def on_cpu():
    """Within, Megatron-Core allocates on the CPU (its optimizer too), forks no CUDA random states and asks for no CUDA stream.

    Everything is put back on exit. Does nothing on a machine with CUDA. Models need ``use_cpu_initialization=True`` and no dropout.
    """
    if torch.cuda.is_available():
        yield
        return
    places = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "current_stream", lambda: None),
        (torch.cuda, "synchronize", lambda: None),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER", _NoRandomStates()),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: None),
        (megatron_random, "_set_cuda_rng_state", lambda *_, **__: None),
    ]
    saved = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        for (place, name, _), value in zip(places, saved, strict=True):
            setattr(place, name, value)
