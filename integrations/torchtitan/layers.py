"""TorchTitan's modules with tpinv's arithmetic: subclasses that override ``forward``. Parameters, their names, state-dict hooks and
shardings are the stock ones.

    activations   [B, L, D], or packed [T, D]; under sequence parallelism L (T) is this rank's part between blocks
    weights       [N, K]; this rank's part of N (column) or K (row)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.models.common import attention, embedding, feed_forward, linear, nn_modules

from tpinv import functional
from tpinv.integrations.torchtitan.module import Invariant, TreeConfig, local, tokens_first
from tpinv.ops import gather_first_dim

ops = torch.ops.tpinv


class ColumnParallelLinear(Invariant, linear.Linear):
    """Gathers the sequence under sequence parallelism; dgrad is a tree over out-features."""

    shards = {"weight": 0, "bias": 0}

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, linear.Linear.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        return column_parallel(self, input, local(self.weight), local(self.bias))


class LMHead(ColumnParallelLinear):
    """The output layer, whose input is whole: the norm before it gathers. Its logits are sharded over the vocabulary."""

    @dataclass(kw_only=True, slots=True)
    class Config(ColumnParallelLinear.Config):
        compute_dtype: str | None = None
        """What input and weight are cast to before the product, as RL's CastLinear does. None: they stay what they are."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.compute_dtype = TORCH_DTYPE_MAP[config.compute_dtype] if config.compute_dtype else None

    def forward(self, input: Tensor) -> Tensor:
        operands = input, local(self.weight), local(self.bias)
        if self.compute_dtype is not None:
            operands = (None if operand is None else operand.to(self.compute_dtype) for operand in operands)
        logits = column_parallel(self, *operands)
        if isinstance(self.weight, DTensor):  # how the DTensor backend tells the loss which ranks share the vocabulary
            return DTensor.from_local(logits, self.weight.device_mesh, [Shard(logits.dim() - 1)], run_check=False)
        return logits


class RowParallelLinear(Invariant, linear.Linear):
    """The forward is a tree over in-features, scattered over the sequence under sequence parallelism."""

    shards = {"weight": 1, "bias": None}

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, linear.Linear.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        tree = self.tree
        y = ops.row_parallel_linear(
            tokens_first(input), local(self.weight), local(self.bias), tree.leaves, tree.node_dtype, self.group, self.sequence_parallel
        )
        return tokens_first(y)


def column_parallel(module: Invariant, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    tree = module.tree
    y = ops.column_parallel_linear(
        tokens_first(x), weight, bias, tree.leaves, tree.node_dtype, module.group, module.sequence_parallel, stride
    )
    return tokens_first(y)


class FusedQKVLinear(attention.FusedQKVLinear):
    """One product for Q, K and V; ``wqkv`` is a ColumnParallelLinear, which returns the whole sequence."""

    @dataclass(kw_only=True, slots=True)
    class Config(attention.FusedQKVLinear.Config):
        pass

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.wqkv(x)
        qkv = qkv.view(*qkv.shape[:-1], -1, self.r_dim, self.head_dim)
        parts = qkv.split([self.heads_per_kv, 1, 1], dim=-2)
        return tuple(part.flatten(-3, -2).contiguous() for part in parts)


class QKVLinear(attention.QKVLinear):
    """Three products; their dgrads are three trees, added by autograd in one fixed order."""

    @dataclass(kw_only=True, slots=True)
    class Config(attention.QKVLinear.Config):
        pass

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.wq, self.wk, self.wv))


class FeedForward(Invariant, feed_forward.FeedForward):
    """SwiGLU. w1 and w3 are one product whose weight has two blocks side by side, so that their dgrads share one tree."""

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, feed_forward.FeedForward.Config):
        pass

    def forward(self, x: Tensor) -> Tensor:
        w1, w3 = self.w1, self.w3
        weight = torch.cat([local(w1.weight), local(w3.weight)])
        bias = None if w1.bias is None else torch.cat([local(w1.bias), local(w3.bias)])
        return self.w2(ops.swiglu(column_parallel(self, x, weight, bias, stride=2)))


class RMSNorm(Invariant, nn_modules.RMSNorm):
    """The weight's gradient is a tree over the tokens of all ranks and complete on each of them."""

    shards = {"weight": None}

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, nn_modules.RMSNorm.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        y = ops.rms_norm(tokens_first(input), local(self.weight), self.eps, self.tree.leaves, self.group, self.sequence_parallel, False)
        return tokens_first(y)


class FinalNorm(RMSNorm):
    """The norm before ``lm_head``: the last place where the sequence is gathered, so that the loss sees all of it."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return tokens_first(gather_first_dim(tokens_first(y), self.ranks)) if self.sequence_parallel else y


class QKNorm(Invariant, nn_modules.RMSNorm):
    """One weight for all heads, which are sharded: its gradient is a tree over heads, tokens below them. Input [..., heads/p, H]."""

    shards = {"weight": None}

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, nn_modules.RMSNorm.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        return ops.rms_norm(input, local(self.weight), self.eps, self.tree.leaves, self.group, False, True)


class Embedding(Invariant, embedding.Embedding):
    """Selects rows instead of adding zeros to them; the backward adds tokens in their order."""

    shards = {"weight": 0}

    @dataclass(kw_only=True, slots=True)
    class Config(TreeConfig, embedding.Embedding.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        ids = input.transpose(0, 1) if input.dim() == 2 else input
        y = functional.vocab_parallel_embedding(ids, local(self.weight), group=self.ranks, sequence_parallel=self.sequence_parallel)
        return tokens_first(y)


class ScaledDotProductAttention(attention.ScaledDotProductAttention):
    """Attention whose bits do not depend on how many heads a rank holds: tpinv's."""

    @dataclass(kw_only=True, slots=True)
    class Config(attention.ScaledDotProductAttention.Config):
        pass

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, is_causal: bool = True, **options) -> Tensor:
        if unknown := sorted(name for name, value in options.items() if value is not None and name != "enable_gqa"):
            raise ValueError(f"ScaledDotProductAttention takes no {', '.join(unknown)}; leave them out")
        if is_causal and q.shape[1] != k.shape[1]:  # torch's mask would begin at the first key, tpinv's ends at the last
            raise ValueError(f"causal attention of {q.shape[1]} queries over {k.shape[1]} keys is not covered; pass as many of both")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, _ = ops.core_attention(*(t.transpose(0, 1) for t in (q, k, v)), scale, is_causal)
        return out.transpose(0, 1)


def window_of(window_size) -> tuple[bool, int]:
    """torch's window_size, the keys before and behind a query's own, -1 for all -> causal or not, and sliding_window, 0 for none. ValueError
    for another than (-1, 0), (-1, -1) and (n, 0)."""
    window = tuple(window_size)
    if len(window) == 2 and all(type(side) is int for side in window):
        if window in ((-1, 0), (-1, -1)):
            return window == (-1, 0), 0
        if window[0] >= 0 == window[1]:
            return True, window[0] + 1
    raise ValueError(f"window_size={window} is not covered; use (-1, 0), (-1, -1), or (n, 0) for n keys before a query's own")


class VarlenAttention(attention.VarlenAttention):
    """Packed documents, each with the bytes it has alone: tpinv's attention, in the dtype of its inputs (stock casts to bf16, and has no
    kernel for a CPU)."""

    @dataclass(kw_only=True, slots=True)
    class Config(attention.VarlenAttention.Config):
        pass

    def __init__(self, config: Config):
        super(attention.VarlenAttention, self).__init__()  # the stock constructor activates a flash attention for the whole process
        self.causal, self.sliding_window = window_of(config.window_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, attention_masks, scale: float | None = None, **options) -> Tensor:
        unknown = sorted(name for name, value in options.items() if value is not None and name != "enable_gqa")
        if unknown or not isinstance(attention_masks, attention.VarlenMetadata):
            raise ValueError(
                f"attention over packed documents takes VarlenMetadata, got {type(attention_masks).__name__}, and no options, got {unknown}"
            )
        packed = [t.flatten(0, 1) for t in (q, k, v)]
        cu_q, cu_k, longest_q, longest_k, *_ = attention_masks
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        packed += [cu_q, cu_k, cu_q, cu_k]
        settings = longest_q, longest_k, scale, self.causal
        if not self.sliding_window:
            return ops.packed_attention(*packed, *settings)[0].view(q.shape)
        return ops.packed_attention_with_options(*packed, None, *settings, self.sliding_window, 0.0)[0].view(q.shape)
