"""Text to train on that is on any machine."""

import json
import os

import torch
from torch import Tensor


def real_text() -> Tensor:
    """The bytes of two modules of Python's standard library. int64 [length]."""
    with open(json.__file__, "rb") as file, open(os.__file__, "rb") as more:
        return torch.frombuffer(bytearray(file.read() + more.read()), dtype=torch.uint8).long()
