"""Rotary embeddings in the model's dtype: cos, sin and each product rounded to it, as transformers, Megatron-Core and vLLM do.

TorchTitan's CosSinRoPE rotates in float32 and rounds once. In bfloat16 the two give other bytes, and trainer and engine must agree on
one; in float32 they are the same. Halves are rotated, so that weights are laid out as Hugging Face's.
"""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.models.common.rope import CosSinRoPE


class ModelDtypeRoPE(CosSinRoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass

    @staticmethod
    def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        """query and key [b, s, heads, d], rope_cache [.., s, 1, 2 d] holding cos, then sin -> both rotated."""
        cos, sin = rope_cache.to(query.dtype).chunk(2, dim=-1)
        return tuple((x * cos) + (CosSinRoPE._rotate_half(x) * sin) for x in (query, key))
