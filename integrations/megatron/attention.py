"""Core attention whose bits do not depend on how many heads a rank holds: tpinv's own, by leaves, causal or without a mask, on any device.

A packed sequence (PackedSeqParams, qkv_format="thd") has the bytes that it has alone.

With a window (config.window_size, in the layers that window_attn_skip_freq names) causal attention sees its last keys; the offset of
softmax_type="off-by-one" is a sink of 0 for every head. Both are tpinv's own, and for causal attention or none with a mask.

Other masks are computed on a CPU alone, with the stock module's mask, scaling and softmax: each (batch, query group) pair by itself, its
query heads stacked, [n s, d] times [d, s]. Those shapes are the same at every TP size up to the number of query groups.
"""

import weakref

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from tpinv import functional
from tpinv.integrations.megatron import layers
from tpinv.integrations.megatron.guard import is_window

# what a module of one kind may be told about a pack, whose sequences TransformerEngine calls padded
PACKED_KINDS = {
    AttnMaskType.causal: (None, AttnMaskType.causal, AttnMaskType.padding_causal),
    AttnMaskType.no_mask: (None, AttnMaskType.no_mask, AttnMaskType.padding),
}
PACK = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


class TPInvariantDotProductAttention(DotProductAttention):
    """DotProductAttention, and for packed sequences, which the stock module refuses. Dropout is refused at conversion."""

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
        """query [sq, b, np, d], key and value [sk, b, ng, d], attention_mask bool [b or 1, 1, sq, sk] (True: masked) -> [sq, b, np d];
        packed: [t, np, d] and [t, ng, d], no mask -> [t, np d], zeros in the padding between sequences."""
        if attention_bias is not None:
            raise ValueError("attention bias is not covered by the local core attention; pass None")
        layers.refuse(self, others)
        options = self._options(query)
        if packed_seq_params is not None:
            check_pack(self.attn_mask_type, packed_seq_params, attn_mask_type, attention_mask)
        if not query.is_cuda and packed_seq_params is None and not self._is_plain(attention_mask, len(query), len(key)):
            if options:
                raise ValueError(
                    f"attn_mask_type={self.attn_mask_type} with {sorted(options)} and a mask that is not the causal one is not covered; use "
                    "causal attention without a mask of one's own"
                )
            return self._by_group(query, key, value, attention_mask)
        return self._by_leaves(query, key, value, attention_mask, packed_seq_params, options)

    def _options(self, query: Tensor) -> dict:
        """Those of tpinv's attention that this layer has."""
        options, window = {}, getattr(self.scale_mask_softmax, "window_size", None)
        offset = getattr(self, "softmax_offset", None)
        if window is not None:
            if not is_window(window) or self.attn_mask_type != AttnMaskType.causal:
                raise ValueError(
                    f"window_size={window} of attn_mask_type={self.attn_mask_type} is not covered; use (n, 0) and causal attention"
                )
            options["sliding_window"] = window[0] + 1  # its own key is the last
        if offset is not None:
            options["sinks"] = offset.to(query.device)
        return options

    def _is_plain(self, mask: Tensor | None, sq: int, sk: int) -> bool:
        """On a CPU: causal attention with the causal mask or none, or attention without a mask."""
        if self.attn_mask_type == AttnMaskType.causal:
            return sk >= sq and (mask is None or _is_causal(mask, sq, sk))
        return self.attn_mask_type == AttnMaskType.no_mask and mask is None

    def _by_group(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Gradients come out of unbind and split, which put them together: sums with the other heads' zeros would lose the sign of -0.0."""
        sq, batch, heads, _ = query.shape
        per_group = heads // key.shape[2]
        context = []
        for b, (q_b, k_b, v_b) in enumerate(zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)):
            mask_b = mask if mask is None or mask.shape[0] == 1 else mask[b : b + 1]
            for q, k, v in zip(q_b.split(per_group, 1), k_b.unbind(1), v_b.unbind(1), strict=True):
                q = q.transpose(0, 1).reshape(per_group * sq, -1).contiguous()
                context.append(self._one_group(q, k.contiguous(), v.contiguous(), mask_b, per_group))
        joined = torch.stack(context).view(batch, heads, sq, -1).permute(2, 0, 1, 3)
        return joined.reshape(sq, batch, -1)

    def _by_leaves(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pack, options: dict) -> Tensor:
        causal = self.attn_mask_type == AttnMaskType.causal
        if not (causal or (self.attn_mask_type == AttnMaskType.no_mask and mask is None)):
            raise ValueError(f"attn_mask_type={self.attn_mask_type}: on a GPU only causal attention is covered")
        if causal and mask is not None:
            _require_causal(mask, query.shape[0], key.shape[0])
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)  # layer scaling divides before the softmax and multiplies in it
        return by_leaves(query, key, value, pack, causal=causal, scale=scale, **options)

    def _one_group(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, per_group: int) -> Tensor:
        """q [n sq, d], k and v [sk, d] -> [n, sq, d]"""
        scores = torch.addmm(q.new_zeros(()), q, k.t(), beta=0.0, alpha=self.softmax_scale)
        scores = scores.view(1, per_group, -1, k.shape[0])
        probabilities = self.scale_mask_softmax(scores, mask)
        return (probabilities.reshape(-1, k.shape[0]) @ v).view(per_group, -1, v.shape[-1])


def kinds_of_options(module: torch.nn.Module) -> tuple[bool, bool, bool]:
    """Which of a window, a cap and sinks an attention has: what a probe asks for."""
    softmax = getattr(module, "scale_mask_softmax", None)
    return getattr(softmax, "window_size", None) is not None, False, getattr(module, "softmax_offset", None) is not None


def check_pack(kind: AttnMaskType, pack, attn_mask_type, mask: Tensor | None) -> None:
    """ValueError unless a module of ``kind`` can compute this pack, which was called ``attn_mask_type``."""
    if getattr(pack, "qkv_format", None) != "thd" or pack.cu_seqlens_q is None or pack.cu_seqlens_kv is None:
        raise ValueError('packed_seq_params must have qkv_format="thd", cu_seqlens_q and cu_seqlens_kv; set them, or pass None')
    if mask is not None or attn_mask_type not in PACKED_KINDS.get(kind, ()):
        raise ValueError(
            f"attn_mask_type={attn_mask_type} in a module of {kind} is not covered, nor is a mask: the sequences of a pack "
            "are the mask, causal or not; pass attention_mask=None"
        )
    if getattr(pack, "cp_group", None) is not None and pack.cp_group.size() > 1:
        raise ValueError(f"packed sequences over {pack.cp_group.size()} context-parallel ranks are not covered; pass cp_group=None")


def by_leaves(query: Tensor, key: Tensor, value: Tensor, pack, *, causal: bool, scale: float, **options) -> Tensor:
    """tpinv's attention of [s, b, heads, d] -> [s, b, heads d], or of a pack's [t, heads, d] -> [t, heads d]."""
    if pack is None:
        return functional.core_attention(query, key, value, causal=causal, scale=scale, **options).flatten(2)
    return functional.packed_attention(
        query, key, value, **{name: getattr(pack, name) for name in PACK}, causal=causal, scale=scale, **options
    ).flatten(1)


def _causal_mask(sq: int, sk: int, device: torch.device) -> Tensor:
    if sk < sq:
        raise ValueError(f"causal attention of {sq} queries over {sk} keys leaves queries without keys; pass all keys")
    return torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device).triu(1 + sk - sq)


_checked: list = [None, None]  # the last mask seen, weakly, and its version, sq and sk


def _is_causal(mask: Tensor, sq: int, sk: int) -> bool:
    """On a CPU; a mask that was seen before, unchanged, is not looked at again."""
    state = None if mask.is_inference() else (mask._version, sq, sk)
    seen, checked = _checked
    if state is not None and state == checked and seen() is mask:
        return True
    causal = _causal_mask(sq, sk, mask.device)
    same = mask.dtype == torch.bool and mask.shape[-2:] == causal.shape[-2:] and bool((mask == causal).all())
    if same and state is not None:
        _checked[:] = weakref.ref(mask), state
    return same


def _require_causal(mask: Tensor, sq: int, sk: int) -> None:
    """The kernel makes its own causal mask; another one must not be ignored. Asserted on the GPU, once a mask: every layer gets the same.
    Tensors of inference mode, which count no changes, are looked at every time, and so is a mask whenever a CUDA graph is captured, whose
    replays may find another one in its place."""
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    state = None if capturing or mask.is_inference() else (mask._version, sq, sk)
    seen, checked = _checked
    if state is not None and state == checked and seen() is mask:
        return
    causal = _causal_mask(sq, sk, mask.device)
    if mask.shape[-2:] != causal.shape[-2:] or mask.dtype != torch.bool:
        raise ValueError(f"attention_mask {tuple(mask.shape)} {mask.dtype} must be the causal one, bool [..., {sq}, {sk}]; or pass None")
    torch._assert_async((mask == causal).all(), "attention_mask is not the causal one, the only one that is covered on a GPU; pass None")
    if state is not None:
        _checked[:] = weakref.ref(mask), state
