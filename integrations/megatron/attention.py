"""Core attention whose shapes do not depend on how many heads a rank holds.

The stock module multiplies all (batch, head) pairs of a rank in one batched product, so what a BLAS is given, and may choose an
order by, changes with TP. Here each (batch, query group) pair is computed alone: its query heads stacked, [n s, d] times [d, s].
Those shapes are the same at every TP size up to the number of query groups and for every batch around a sequence; the sums over a
group's query heads in dK and dV lie inside one product. Mask, scaling, softmax and layout are the stock module's own.
"""

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


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
        **_,
    ) -> Tensor:
        """query [sq, b, np, d], key and value [sk, b, ng, d], attention_mask bool [b or 1, 1, sq, sk] (True: masked) -> [sq, b, np d]."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention bias are not covered by the local core attention; pass neither")
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

    def _one_group(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, per_group: int) -> Tensor:
        """q [n sq, d], k and v [sk, d] -> [n, sq, d]"""
        scores = torch.addmm(q.new_zeros(()), q, k.t(), beta=0.0, alpha=self.softmax_scale)
        scores = scores.view(1, per_group, -1, k.shape[0])
        probabilities = self.scale_mask_softmax(scores, mask)
        return (probabilities.reshape(-1, k.shape[0]) @ v).view(per_group, -1, v.shape[-1])
