"""TRL's fused lm_head with tpinv's arithmetic: hidden states of the completions -> log-probabilities, the engine's bytes.

    logits = lm_head(hidden)             only rows whose label counts; a row's bytes do not depend on the others
    logits / temperature                 in float32, and only where it is not 1: what both of vLLM's model runners compute
    log p(label)                         the tree over the vocabulary

TRL adds its head by replacing ``model.forward``; :func:`add_lm_head` has the same signature and goes into its place. Two things more:
TRL passes no positions, for which transformers would count the padding on the left; here they count from a row's first real token, as
they do in the engine. And the lm_head is called as a module, once, which is what FSDP2's hooks know.
"""

import functools
import types

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from tpinv import functional
from tpinv.collectives import Ranks
from tpinv.inference import apply_temperature
from tpinv.integrations.transformers import is_converted
from tpinv.tree import ReductionTree

ALONE = Ranks(None, 0, 1)
ENTROPY_ROWS = 512  # at once, in float32: it bounds memory alone, since every row is by itself
OUTPUTS = ("log_probs", "entropy")


def add_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    tree: ReductionTree,
    entropy_has_gradient: bool = False,
) -> None:
    """``model(..., labels=labels, fused_lm_head=True)`` returns a FusedCausalLMOutput with log-probabilities, float32 [b, s - 1].

    Args:
        model: a converted LlamaForCausalLM or Qwen3ForCausalLM, not wrapped yet.
        temperature: positive.
        cast_lm_head_to_fp32: must be False: the engine's head computes in the model's dtype.
        outputs: of "log_probs" and "entropy".
        tree: the model's and the engine's.
        entropy_has_gradient: for an entropy bonus; it costs memory.

    Raises:
        ValueError: a model that is not converted, another output, a temperature that is not positive.
    """
    if not is_converted(model):
        raise ValueError(f"{type(model).__name__} is not converted; call tpinv.integrations.transformers.convert first")
    if cast_lm_head_to_fp32 or temperature <= 0 or set(outputs) - set(OUTPUTS):
        raise ValueError(
            f"cast_lm_head_to_fp32={cast_lm_head_to_fp32}, temperature={temperature}, outputs={outputs}: covered are an lm_head in the "
            f"model's dtype, a positive temperature, and {OUTPUTS}"
        )
    stock = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **keywords):
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return stock(*args, **keywords, **{name: value for name, value in given.items() if value is not None})
        keywords["use_cache"] = False
        _fill_positions(keywords)
        hidden = self.base_model(*args, **keywords).last_hidden_state
        if shift_labels is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        else:
            labels = shift_labels
        counts = labels != -100
        logits = self.get_output_embeddings()(hidden[counts])
        log_probs, entropy = score(
            logits, labels[counts], temperature, tree=tree, entropy="entropy" in outputs, entropy_has_gradient=entropy_has_gradient
        )
        log_probs, entropy = (None if x is None else x.new_zeros(counts.shape).masked_scatter(counts, x) for x in (log_probs, entropy))
        items = counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-log_probs.sum() / items, log_probs=log_probs, entropy=entropy, label_mask=counts)

    model.forward = types.MethodType(forward, model)


def score(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    tree: ReductionTree,
    entropy: bool = False,
    entropy_has_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """logits [n, V] in any dtype, targets [n] -> log-probabilities of the targets and, if asked for, entropies; float32 [n] each."""
    logits = apply_temperature(logits, temperature)
    log_probs = functional.vocab_parallel_log_probs(logits, targets, tree=tree, group=ALONE)
    if not entropy:
        return log_probs, None
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_has_gradient):
        parts = [_entropy(rows) for rows in logits.split(ENTROPY_ROWS)]
    return log_probs, torch.cat(parts)


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)


def _fill_positions(keywords: dict) -> None:
    """position_ids from the mask of padding, where none are given."""
    mask = keywords.get("attention_mask")
    if keywords.get("position_ids") is None and mask is not None and mask.dim() == 2:
        keywords["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
