"""A stand-in for transformer-engine 2.20 on a machine without a GPU: its classes, constructors, parameters, marks and state dicts as
Megatron-Core sees them, over torch's arithmetic. Sums over ranks are all-reduces of rounded partial results, as in the original, so that a
model built of it depends on the tensor-parallel size. Nothing is here that Megatron-Core's layers for GPT do not use.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]
