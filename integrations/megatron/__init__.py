"""Megatron-Core: ``convert`` a built model in place, or build from specs. Works with megatron-core 0.16.1 and 0.19.2.

    model = convert(GPTModel(...), tree=ReductionTree(8))          # forward, loss, backward: the same bytes at TP = 1, 2, 4, 8
    optimizer = convert_optimizer(get_megatron_optimizer(...))     # exact gradient norm and clipping
    log_probs(model, logits, labels)                               # for RL, the same bytes at every TP size, too

or both in one call once both are built: ``convert(model, tree=tree, optimizer=optimizer)``.

Covered: dense GPTModel and HybridModel of the local spec and of TransformerEngine's (te/). Everything else is refused by name (guard.py, settings.py, modules.py).
"""

from tpinv.integrations.megatron import wgrad
from tpinv.integrations.megatron.convert import convert
from tpinv.integrations.megatron.converted import is_converted
from tpinv.integrations.megatron.cpu import on_cpu
from tpinv.integrations.megatron.guard import padded_vocab_size
from tpinv.integrations.megatron.hooks import convert_optimizer, install_finalize_filter
from tpinv.integrations.megatron.lora import add_lora
from tpinv.integrations.megatron.loss import log_probs
from tpinv.integrations.megatron.specs import TPInvariantSpecProvider, gpt_layer_spec, hybrid_stack_spec

wgrad.install()

__all__ = [
    "TPInvariantSpecProvider",
    "add_lora",
    "convert",
    "convert_optimizer",
    "gpt_layer_spec",
    "hybrid_stack_spec",
    "install_finalize_filter",
    "is_converted",
    "log_probs",
    "on_cpu",
    "padded_vocab_size",
]
