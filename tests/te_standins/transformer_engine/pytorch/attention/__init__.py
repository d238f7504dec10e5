import math

import torch
import torch.distributed as dist

from transformer_engine.pytorch.attention import rope
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

__all__ = ["DotProductAttention", "rope"]


class FlashAttention(torch.nn.Module):
    def __init__(self, softmax_scale, attention_dropout=0.0, **_):
        super().__init__()
        self.softmax_scale, self.attention_dropout = softmax_scale, attention_dropout


class FusedAttention(FlashAttention):
    pass


class FusedScaleMaskSoftmax(torch.nn.Module):
    pass


class UnfusedDotProductAttention(torch.nn.Module):
    def __init__(self, softmax_scale, attention_dropout=0.0, **_):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.scale_mask_softmax = FusedScaleMaskSoftmax()
        self.attention_dropout = torch.nn.Dropout(attention_dropout)

    def forward(self, query, key, value, causal):
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n d]: one batched product over this rank's heads."""
        repeat = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        scores = (q @ k.transpose(-1, -2)).float() * self.softmax_scale
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + scores.shape[-1] - scores.shape[-2])
            scores = scores.masked_fill(mask, float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(2)


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
        window_size=None, bottom_right_diagonal=None, softcap=0.0, sequence_parallel=False, tp_size=1, get_rng_state_tracker=None,
        tp_group=None, layer_number=None, attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p",
        softmax_scale=None, softmax_type="vanilla", return_max_logit=False, name=None,
    ):  # fmt: skip
        super().__init__(name)
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.window_size = (-1, 0) if "causal" in attn_mask_type and window_size is None else window_size or (-1, -1)
        self.softcap, self.softmax_type, self.softmax_offset = softcap, softmax_type, None
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)
        self.num_attention_heads, self.layer_number = num_attention_heads, layer_number or 1
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.attention_type, self.attention_dropout, self.return_max_logit = attention_type, attention_dropout, return_max_logit
        self.softmax_scale = (
            1.0 / math.sqrt(kv_channels if isinstance(kv_channels, int) else kv_channels[0]) if softmax_scale is None else softmax_scale
        )
        if softmax_type == "learnable":
            self.register_parameter("softmax_offset", torch.nn.Parameter(torch.zeros(num_attention_heads // self.tp_size)))
        self.flash_attention = FlashAttention(self.softmax_scale, attention_dropout)
        self.fused_attention = FusedAttention(self.softmax_scale, attention_dropout)
        self.unfused_attention = UnfusedDotProductAttention(self.softmax_scale, attention_dropout)

        def remove_extra_states_check(self, incompatible_keys):
            for key in incompatible_keys.missing_keys:
                if "core_attention._extra_state" in key:
                    incompatible_keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(remove_extra_states_check)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, **_):
        return self.unfused_attention(query, key, value, "causal" in (attn_mask_type or self.attn_mask_type))
