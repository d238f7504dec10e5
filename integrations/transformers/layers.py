"""transformers' modules with tpinv's arithmetic: subclasses that override ``forward`` and keep parameters, names and attributes.

A model is whole on every rank, so that nothing here communicates; the order of additions is that of any other TP size.
Legend: b sequences, s tokens, H hidden, N out-features, K in-features.
"""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, Qwen3RotaryEmbedding

from tpinv import functional
from tpinv.collectives import Ranks
from tpinv.integrations.transformers.attention import NAME

ALONE = Ranks(None, 0, 1)


class TPInvariantColumnLinear(nn.Linear):
    """q, k, v, gate, up and lm_head: y is a chain over in-features; the tree is over out-features, in the gradient of x."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.column_parallel_linear(input, self.weight, self.bias, tree=self.tree, group=ALONE)


class TPInvariantRowLinear(nn.Linear):
    """o and down: y is the tree over in-features, whose leaves the ranks of another TP size own."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.row_parallel_linear(input, self.weight, self.bias, tree=self.tree, group=ALONE)


class TPInvariantEmbedding(nn.Embedding):
    """The gradient of a row is a chain over its tokens, in their order; that of the row ``padding_idx`` is zero, as torch has it."""

    def forward(self, input: Tensor) -> Tensor:
        embedded = functional.vocab_parallel_embedding(input, self.weight, group=ALONE)
        if self.padding_idx is None or not embedded.requires_grad:
            return embedded
        return torch.where((input == self.padding_idx).unsqueeze(-1), embedded.detach(), embedded)


class _RMSNorm:
    """``heads_parallel`` orders rows by heads, as q and k norms of other TP sizes must; set by convert."""

    heads_parallel = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(
            hidden_states, self.weight, self.variance_epsilon, tree=self.tree, group=ALONE, heads_parallel=self.heads_parallel
        )


class TPInvariantLlamaRMSNorm(_RMSNorm, LlamaRMSNorm):
    pass


class TPInvariantQwen3RMSNorm(_RMSNorm, Qwen3RMSNorm):
    pass


class _Attention:
    """The stock forward, after a look at the implementation, which the config names and which may have been changed since convert."""

    def forward(self, *args, **kwargs):
        if self.config._attn_implementation != NAME:
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} was set after convert; call model.set_attn_implementation({NAME!r})"
            )
        return super().forward(*args, **kwargs)


class TPInvariantLlamaAttention(_Attention, LlamaAttention):
    pass


class TPInvariantQwen3Attention(_Attention, Qwen3Attention):
    pass


class _Rotary:
    """cos and sin [b, s, d] of positions [b, s]. An angle is one product, rounded once to float32; transformers multiplies matrices, which a
    GPU may be told to do in TF32. Frequencies are those of a CPU, on any device (guard.py): a GPU's powers are others.

    ``rope_dtype``, set by convert: "model" rounds cos and sin to the model's dtype, as transformers, Megatron-Core and vLLM do; with "float32"
    queries and keys are rotated in float32 and rounded once (attention.py rounds them), as in TorchTitan.
    """

    rope_dtype = "model"

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        dtype = torch.float32 if self.rope_dtype == "float32" else x.dtype
        return tuple((function(angles) * self.attention_scaling).to(dtype) for function in (torch.cos, torch.sin))


class TPInvariantLlamaRotaryEmbedding(_Rotary, LlamaRotaryEmbedding):
    pass


class TPInvariantQwen3RotaryEmbedding(_Rotary, Qwen3RotaryEmbedding):
    pass


class TPInvariantSiLU(nn.Module):
    """On a CPU, torch's silu depends on where an element lies."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    tree,
    **_,
) -> Tensor:
    """transformers' ForCausalLMLoss: logits [b, s, V], labels [b, s] -> the mean over labels that count, or their sum / num_items_in_batch.

    The sum over the vocabulary is the tree; the one over tokens is torch's, which no TP size enters.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.to(logits.device)
    losses = functional.vocab_parallel_cross_entropy(logits, target, tree=tree, group=ALONE, ignore_index=ignore_index)
    items = (target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / items
