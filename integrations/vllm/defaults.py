"""vLLM builds a model with its GPU and the model's dtype as torch's defaults. What tpinv computes meanwhile must not take them: a
permutation from a CPU generator, a table in float32."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torchs_own() -> Iterator[None]:
    """New tensors are float32 and on the CPU unless they say otherwise."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
