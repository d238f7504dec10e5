"""The loss and the log-probabilities of a converted model's logits: sums over the vocabulary in the order of its tree.

Training reaches them through the model (``compute_language_model_loss``). Frameworks for RL call Megatron's function on the logits instead,
after casts, slices and a division by a temperature, so nothing about the tensor says whose it is. ``install`` therefore stands between
both of Megatron's functions (``vocab_parallel_cross_entropy`` and the fused one) and their autograd function, whoever imported them and
when: logits that have the local vocabulary of a live converted model, over its group, get that model's sums. The loss that a stock model
computes for itself stays stock. A framework with a function of its own calls ``log_probs``.
"""

import contextvars
import functools
import sys

import megatron.core.fusions.fused_cross_entropy
import megatron.core.tensor_parallel.cross_entropy  # noqa: F401  of these names)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from tpinv import functional
from tpinv.integrations.megatron import converted
from tpinv.integrations.megatron.layers import ALONE

FUNCTIONS = ("megatron.core.tensor_parallel.cross_entropy", "megatron.core.fusions.fused_cross_entropy")

_stock_model = contextvars.ContextVar("a stock model is computing its own loss", default=False)


def language_model_loss(model: LanguageModule, labels: Tensor, logits: Tensor) -> Tensor:
    """In place of LanguageModule.compute_language_model_loss: labels [b, s], logits [s, b, V/p] or gathered [s, b, V] -> [b, s]."""
    loss = cross_entropy(model, logits, labels.transpose(0, 1).contiguous())
    return loss.transpose(0, 1).contiguous()


def cross_entropy(model: LanguageModule, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """logits [..., V/p] or gathered [..., V], labels [...] -> float32 [...]"""
    group = ALONE if logits.shape[-1] == model.vocab_size else model.pg_collection.tp
    return functional.vocab_parallel_cross_entropy(logits, labels, tree=model.tpinv_tree, group=group, label_smoothing=label_smoothing)


def log_probs(model: torch.nn.Module | list[torch.nn.Module], logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[labels] over the whole vocabulary, the same bytes at every tensor-parallel size; differentiable.

    Args:
        model: the converted model, wrapped or not, or Megatron's list of chunks.
        logits: [..., V/p], this rank's part of the vocabulary, or gathered [..., V]: any shape that the model's logits were cut, cast or
            scaled to, packed rows too. float32, bfloat16 or float16.
        labels: integer [...], the same on every rank; 0.0 comes out where one is -100.

    Returns:
        float32 [...].

    Raises:
        ValueError: a model that was not converted, or another last dimension than the vocabulary's.
    """
    chunks = model if isinstance(model, list) else [model]
    owners = [m for chunk in chunks for m in chunk.modules() if isinstance(m, LanguageModule) and converted.is_converted(m)]
    if not owners:
        raise ValueError(f"{type(chunks[0]).__name__} holds no converted GPTModel or HybridModel; call convert(model, tree=tree) first")
    owner = owners[0]
    local = owner.vocab_size // owner.pg_collection.tp.size()
    if logits.shape[-1] not in (local, owner.vocab_size):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} must end in this rank's vocabulary {local} or in the whole one {owner.vocab_size}; "
            "pass the model's logits, cut in other dimensions only"
        )
    return -cross_entropy(owner, logits, labels)


class _ByOwner:
    """Stands in the place of Megatron's autograd function, whose ``apply`` its public function calls by name."""

    def __init__(self, stock: type):
        self.stock = stock

    def apply(self, logits: Tensor, target: Tensor, *others):
        """``others``: label_smoothing and the group, in the order of the version, or the group alone."""
        groups = [other for other in others if isinstance(other, dist.ProcessGroup)]
        smoothing = [other for other in others if isinstance(other, (int, float))]
        owner = None if _stock_model.get() else _owner(logits, groups[0] if groups else parallel_state.get_tensor_model_parallel_group())
        if owner is None:
            return self.stock.apply(logits, target, *others)
        return cross_entropy(owner, logits, target, *smoothing)

    def __getattr__(self, name: str):
        return getattr(self.stock, name)


def _owner(logits: Tensor, group) -> LanguageModule | None:
    """The converted model that has this group and this vocabulary. ValueError if there are several that add in other orders."""
    ranks = dist.get_process_group_ranks(group)
    owners = [
        model
        for model in converted.models()
        if model.vocab_size == logits.shape[-1] * len(ranks) and _ranks(model.pg_collection.tp) == ranks
    ]
    trees = {model.tpinv_tree for model in owners}
    if len(trees) > 1:
        raise ValueError(
            f"converted models of one vocabulary and group follow {sorted(tree.fingerprint for tree in trees)}, and the logits do not say whose "
            "they are; call tpinv.integrations.megatron.log_probs(model, logits, labels)"
        )
    return owners[0] if owners else None


def _ranks(group) -> list[int] | None:
    """Global ranks of a group; None where it has been destroyed, as that of a model which is not used any more may be."""
    try:
        return dist.get_process_group_ranks(group)
    except KeyError:
        return None


def install() -> None:
    """Once per process; ``convert`` calls it."""
    for name in FUNCTIONS:
        module = sys.modules[name]
        if not isinstance(module._VocabParallelCrossEntropy, _ByOwner):
            module._VocabParallelCrossEntropy = _ByOwner(module._VocabParallelCrossEntropy)
    stock = LanguageModule.compute_language_model_loss
    if hasattr(stock, "tpinv_stock"):
        return

    @functools.wraps(stock)
    def of_a_stock_model(self, *args, **kwargs):
        token = _stock_model.set(True)
        try:
            return stock(self, *args, **kwargs)
        finally:
            _stock_model.reset(token)

    of_a_stock_model.tpinv_stock = True
    LanguageModule.compute_language_model_loss = of_a_stock_model
