"""TransformerEngine's layers with tpinv's arithmetic, each a subclass of the class that Megatron-Core builds.

LayerNorm and column product, one module in TE, are our norm and our column product: two kernels there as well. Under sequence parallelism
the norm is of this rank's rows, whose gradients (``layer_norm_weight``, ``layer_norm_bias``) come complete out of backward. A bias is added
inside, and a module without one has an empty tensor in its place (``use_bias`` says which). Weight gradients go into ``main_grad`` as they
do in the local layers, whatever ``fuse_wgrad_accumulation`` says, and ``grad_added_to_main_grad`` says so to Megatron's hooks.

Imported where TransformerEngine is installed; importing it imports nothing that Megatron-Core has not.
"""

import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from tpinv import functional
from tpinv.integrations.megatron import attention, layers

CAUSAL = (AttnMaskType.causal, AttnMaskType.causal_bottom_right, AttnMaskType.padding_causal)


class _TELinear(layers.TreeBound):
    """What TE's linears have in common."""

    def _bias(self) -> Tensor | None:
        return self.bias if self.use_bias else None

    def _neutral_bias(self) -> Tensor | None:
        """What the caller adds where Megatron has asked for the bias, which is in the output already."""
        return layers.neutral_like(self.bias) if self.te_return_bias else None

    def _column_product(self, x: Tensor) -> Tensor:
        return functional.column_parallel_linear(
            x,
            self.weight,
            self._bias(),
            tree=self.tree,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            stride=self.stride,
            gradient_accumulation_fusion=layers.fuses_main_grad(self, self.weight),
        )

    def backward_dw(self) -> None:
        """Nothing is left to compute: delay_wgrad_compute is refused."""


class TPInvariantTEColumnParallelLinear(_TELinear, TEColumnParallelLinear):
    """TEColumnParallelLinear: dgrad is a tree over out-features. SwiGLU's fc1 is the one with stride 2."""

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"weight": (0, self.stride), "bias": (0, self.stride)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.require_converted()
        return self._column_product(x), self._neutral_bias()


class TPInvariantTELayerNormColumnParallelLinear(_TELinear, TELayerNormColumnParallelLinear):
    """TELayerNormColumnParallelLinear: the norm's gradients are trees over the rows of all ranks, dgrad one over out-features."""

    owned = frozenset({"layer_norm_weight", "layer_norm_bias", "weight", "bias"})

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"layer_norm_weight": None, "layer_norm_bias": None, "weight": (0, self.stride), "bias": (0, self.stride)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.require_converted()
        rows = {"tree": self.tree, "group": self.tp_group, "sequence_parallel": self.sequence_parallel}
        if self.normalization == "RMSNorm":
            normed = functional.rms_norm(x, self.layer_norm_weight, self.eps, **rows)
        else:
            normed = functional.layer_norm(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, **rows)
        return self._column_product(normed), self._neutral_bias()


class TPInvariantTERowParallelLinear(_TELinear, TERowParallelLinear):
    """TERowParallelLinear: the forward is a tree over in-features; the bias's gradient is complete on every rank."""

    def parameter_sharding(self) -> dict[str, tuple[int, int] | None]:
        return {"weight": (1, 1), "bias": None}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.require_converted()
        output = functional.row_parallel_linear(
            x,
            self.weight,
            self._bias(),
            tree=self.tree,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            gradient_accumulation_fusion=layers.fuses_main_grad(self, self.weight),
        )
        return output, self._neutral_bias()


class TPInvariantTERMSNorm(layers._NormMixin, te.RMSNorm):
    """te.RMSNorm whose weight gradient is a tree over the rows of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight, self.eps, **self._rows())


class TPInvariantTELayerNorm(layers._NormMixin, te.LayerNorm):
    """te.LayerNorm whose parameter gradients are trees over the rows of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps, **self._rows())


class TPInvariantTENorm(layers.TreeBound):
    """Builds the norm that TENorm builds, ours."""

    by_heads = False

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, has_residual: bool = False):
        """``has_residual`` matters with fused_residual_rmsnorm alone, which is refused."""
        norm = TENorm(config, hidden_size, eps)
        norm.__class__ = REPLACEMENTS[type(norm)].bind(cls.tree)
        group = get_tensor_model_parallel_group_if_none(None)
        norm.share_rows(group, by_sequence=config.sequence_parallel and group.size() > 1 and not cls.by_heads, by_heads=cls.by_heads)
        return norm


class TPInvariantTEQKNorm(TPInvariantTENorm):
    """The same for q_layernorm and k_layernorm: one weight for all heads, and the heads are sharded."""

    by_heads = True


class TPInvariantTEDotProductAttention(TEDotProductAttention):
    """TEDotProductAttention by leaves, on any device. TE's own implementations below it are not called."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        **others,
    ) -> Tensor:
        """query [sq, b, np, d], key and value [sk, b, ng, d] -> [sq, b, np d]; packed: [t, np, d] and [t, ng, d] -> [t, np d].

        ``attn_mask_type`` is this call's, as TE has it. ValueError for what is neither causal nor without a mask.
        """
        if attention_bias is not None:
            raise ValueError("attention bias is not covered; pass None")
        layers.refuse(self, others)
        kind = AttnMaskType[self.attn_mask_type] if attn_mask_type is None else attn_mask_type
        if packed_seq_params is not None:
            plain = AttnMaskType.causal if kind in CAUSAL else AttnMaskType.no_mask
            attention.check_pack(plain, packed_seq_params, kind if kind not in CAUSAL else None, attention_mask)
            return attention.by_leaves(query, key, value, packed_seq_params, causal=kind in CAUSAL, scale=self.softmax_scale)
        causal = kind in (AttnMaskType.causal, AttnMaskType.causal_bottom_right)
        if not causal and kind != AttnMaskType.no_mask:
            raise ValueError(f"attn_mask_type={kind} is covered for packed sequences alone; use causal, or pass packed_seq_params")
        sq, sk = len(query), len(key)
        if kind == AttnMaskType.causal and sq != sk:
            raise ValueError(
                f"attn_mask_type=causal of {sq} queries over {sk} keys begins at the first key in TransformerEngine; use causal_bottom_right"
            )
        if attention_mask is not None:
            if not causal and sq > 1:
                raise ValueError(f"attention_mask {tuple(attention_mask.shape)} with attn_mask_type=no_mask is not read; pass None")
            attention._require_causal(attention_mask, sq, sk)  # of one query: that nothing is masked
        return attention.by_leaves(query, key, value, None, causal=causal, scale=self.softmax_scale)


REPLACEMENTS = {
    TEColumnParallelLinear: TPInvariantTEColumnParallelLinear,
    TELayerNormColumnParallelLinear: TPInvariantTELayerNormColumnParallelLinear,
    TERowParallelLinear: TPInvariantTERowParallelLinear,
    TEDotProductAttention: TPInvariantTEDotProductAttention,
    te.RMSNorm: TPInvariantTERMSNorm,
    te.LayerNorm: TPInvariantTELayerNorm,
}
