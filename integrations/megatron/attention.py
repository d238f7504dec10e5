"""Core attention whose shapes do not depend on how many heads a rank holds.

On a GPU it is tpinv's own kernel (kernels/attention.py), causal or without a mask. On a CPU:

The stock module multiplies all (batch, head) pairs of a rank in one batched product, so what a BLAS is given, and may choose an
order by, changes with TP. Here each (batch, query group) pair is computed alone: its query heads stacked, [n s, d] times [d, s].
Those shapes are the same at every TP size up to the number of query groups and for every batch around a sequence; the sums over a
group's query heads in dK and dV lie inside one product. Mask, scaling, softmax and layout are the stock module's own.
"""

import weakref

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from tpinv import functional
from tpinv.integrations.megatron import layers


class TPInvariantDotProductAttention(DotProductAttention):
    """DotProductAttention, one (batch, query group) pair at a time. Dropout is refused at conversion."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        **others,
    ) -> Tensor:
        """query [sq, b, np, d], key and value [sk, b, ng, d], attention_mask bool [b or 1, 1, sq, sk] (True: masked) -> [sq, b, np d]."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention bias are not covered by the local core attention; pass neither")
        layers.refuse(self, others)
        if query.is_cuda:
            return self._on_gpu(query, key, value, attention_mask)
        sq, batch, heads, _ = query.shape
        groups = key.shape[2]
        per_group = heads // groups
        context = []
        for b in range(batch):
            mask = attention_mask if attention_mask is None or attention_mask.shape[0] == 1 else attention_mask[b : b + 1]
            for g in range(groups):
                first = g * per_group
                q = query[:, b, first : first + per_group].transpose(0, 1).reshape(per_group * sq, -1).contiguous()
                context.append(self._one_group(q, key[:, b, g].contiguous(), value[:, b, g].contiguous(), mask, per_group))
        joined = torch.stack(context).view(batch, groups * per_group, sq, -1).permute(2, 0, 1, 3)
        return joined.reshape(sq, batch, -1)

    def _on_gpu(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        causal = self.attn_mask_type == AttnMaskType.causal
        window = getattr(self.scale_mask_softmax, "window_size", None)
        if window is not None or not (causal or (self.attn_mask_type == AttnMaskType.no_mask and mask is None)):
            raise ValueError(f"attn_mask_type={self.attn_mask_type} with window_size={window}: on a GPU only causal attention is covered")
        if causal and mask is not None:
            _require_causal(mask, query.shape[0], key.shape[0])
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)  # layer scaling divides before the softmax and multiplies in it
        return functional.core_attention(query, key, value, causal=causal, scale=scale).flatten(2)

    def _one_group(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, per_group: int) -> Tensor:
        """q [n sq, d], k and v [sk, d] -> [n, sq, d]"""
        scores = torch.addmm(q.new_zeros(()), q, k.t(), beta=0.0, alpha=self.softmax_scale)
        scores = scores.view(1, per_group, -1, k.shape[0])
        probabilities = self.scale_mask_softmax(scores, mask)
        return (probabilities.reshape(-1, k.shape[0]) @ v).view(per_group, -1, v.shape[-1])


_checked: list = [None, None]  # the last mask seen, weakly, and its version, sq and sk


def _require_causal(mask: Tensor, sq: int, sk: int) -> None:
    """The kernel makes its own causal mask; another one must not be ignored. Asserted on the GPU, once a mask: every layer gets the same.
    Tensors of inference mode, which count no changes, are looked at every time."""
    state = None if mask.is_inference() else (mask._version, sq, sk)
    seen, checked = _checked
    if state is not None and state == checked and seen() is mask:
        return
    causal = torch.ones(sq, sk, dtype=torch.bool, device=mask.device).triu(1 + sk - sq)
    if mask.shape[-2:] != causal.shape or mask.dtype != torch.bool:
        raise ValueError(f"attention_mask {tuple(mask.shape)} {mask.dtype} must be the causal one, bool [..., {sq}, {sk}]; or pass None")
    torch._assert_async((mask == causal).all(), "attention_mask is not the causal one, the only one that is covered on a GPU; pass None")
    _checked[:] = weakref.ref(mask), state
