"""Rotary embeddings in the model's dtype: cos, sin and each product rounded to it, as transformers, Megatron-Core and vLLM do.

TorchTitan's CosSinRoPE rotates in float32 and rounds once. In bfloat16 the two give other bytes, and trainer and engine must agree on
one; in float32 they are the same. Halves are rotated, so that weights are laid out as Hugging Face's. Frequencies are a CPU's powers of the
base on any device, as in transformers: a GPU's differ in the last bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchtitan.models.common.rope import CosSinRoPE


class ModelDtypeRoPE(CosSinRoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass

    def _precompute_cache(self) -> Tensor:
        """[max_seq_len, 2 d], cos, then sin."""
        cfg = self.config
        if cfg.scaling != "none":
            return super()._precompute_cache()
        steps = torch.arange(0, cfg.dim, 2, device="cpu").float() / cfg.dim
        frequencies = (1.0 / cfg.theta**steps).to(torch.get_default_device())
        angles = torch.outer(torch.arange(cfg.max_seq_len, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), -1)
        return torch.cat((angles.cos(), angles.sin()), -1)

    @staticmethod
    def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        """query and key [b, s, heads, d], rope_cache [.., s, 1, 2 d] holding cos, then sin -> both rotated."""
        cos, sin = rope_cache.to(query.dtype).chunk(2, dim=-1)
        return tuple((x * cos) + (CosSinRoPE._rotate_half(x) * sin) for x in (query, key))
