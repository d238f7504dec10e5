"""Your TorchTitan model for ``tpinv verify``: a factory that returns its Config, its ModelSpec, or a whole Trainer.Config.

    tpinv verify --model examples/verify_torchtitan.py:build --tp 1,2,4

Around a model verify puts its own small Trainer.Config (real text, AdamW, FSDP, chunked loss); of a Trainer.Config it sets the degree of
tensor parallelism, the number of steps, the seed, and in tpinv's runs the override.
"""

from torchtitan.models import llama3
from torchtitan.models.common.attention import ScaledDotProductAttention


def build():
    model = llama3.model_registry("debugmodel").model
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # FlexAttention has no backward on a CPU
    return model
