"""convert: a built Llama or Qwen 3 of transformers becomes invariant in place.

It fails closed: a module, a setting of the config, a hook or a parameter that is not known to be covered is an error, and nothing has
been changed then.
"""

import collections
import functools
import logging

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from tpinv.integrations.transformers import attention, guard, layers
from tpinv.integrations.transformers.guard import CONTAINERS, LINEARS, MODELS
from tpinv.tree import ReductionTree

logger = logging.getLogger("tpinv")

REPLACEMENTS = {
    nn.Embedding: layers.TPInvariantEmbedding,
    llama.LlamaRMSNorm: layers.TPInvariantLlamaRMSNorm,
    qwen3.Qwen3RMSNorm: layers.TPInvariantQwen3RMSNorm,
    llama.LlamaAttention: layers.TPInvariantLlamaAttention,
    qwen3.Qwen3Attention: layers.TPInvariantQwen3Attention,
    SiLUActivation: layers.TPInvariantSiLU,
    nn.SiLU: layers.TPInvariantSiLU,
    llama.LlamaRotaryEmbedding: layers.TPInvariantLlamaRotaryEmbedding,
    qwen3.Qwen3RotaryEmbedding: layers.TPInvariantQwen3RotaryEmbedding,
}
ROPE_DTYPES = ("model", "float32")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change frequencies with the length of what is seen


def convert(model: nn.Module, *, tree: ReductionTree, rope_dtype: str = "model") -> nn.Module:
    """Makes a LlamaForCausalLM or Qwen3ForCausalLM invariant, in place: linears, embedding, norms (q/k norms too), SiLU, attention, loss.

    Args:
        model: built, weights loaded or not, in float32, bfloat16 or float16, not yet wrapped by fully_shard, DDP or an adapter.
        tree: its leaves must be a multiple of every tensor-parallel size to compare, and divide heads, feed-forward width and vocabulary.
        rope_dtype: "model": cos, sin and each product are rounded to the model's dtype, as in transformers, Megatron-Core and vLLM.
            "float32": rotated in float32 and rounded once, as in TorchTitan. The same in float32 models.

    Returns:
        ``model``. What was replaced is logged to the logger "tpinv".

    Raises:
        ValueError: naming every module, setting and dimension that is not covered, or a model converted with other arguments.
    """
    if not isinstance(tree, ReductionTree):
        raise ValueError(f"tree={tree!r} must be a ReductionTree; pass tree=ReductionTree(8)")
    if rope_dtype not in ROPE_DTYPES:
        raise ValueError(f"rope_dtype={rope_dtype!r} must be one of {ROPE_DTYPES}")
    known = getattr(model, "tpinv_settings", None)
    if known is not None:
        if known[:2] != (tree, rope_dtype):
            raise ValueError(f"the model was converted with {known[:2]}; build it anew to use {(tree, rope_dtype)}")
        return model
    if not isinstance(model, MODELS):
        raise ValueError(f"{type(model).__name__} is not covered; convert one of {', '.join(kind.__name__ for kind in MODELS)}, unwrapped")
    faults = [*_check_config(model.config, tree), *_check_modules(model)]
    if faults:
        raise ValueError("this model cannot be made invariant:\n  " + "\n  ".join(faults))

    attention.register()
    model.set_attn_implementation(attention.NAME)
    replaced = collections.Counter()
    for name, module in model.named_modules():
        stock, last = type(module), name.rpartition(".")[2]
        if stock in guard.ROTARY:
            guard.restore_frequencies(module)
        kind = LINEARS[last] if stock is nn.Linear else REPLACEMENTS.get(stock)
        if kind is None:
            continue
        module.__class__ = kind
        module.tree = tree
        if isinstance(module, layers._RMSNorm):
            module.heads_parallel = last in ("q_norm", "k_norm")
        if isinstance(module, guard.ROTARY):
            module.rope_dtype = rope_dtype
        replaced[stock.__name__] += 1
    if hasattr(model, "lm_head"):
        model.loss_function = functools.partial(layers.causal_lm_loss, tree=tree)
    for part in {model, model.base_model}:
        part.tpinv_settings = guard.Settings(tree, rope_dtype, model.config.vocab_size)
    guard.watch(model)
    logger.info("converted %s with %s, rope in %s: %s", type(model).__name__, tree.fingerprint, rope_dtype, dict(replaced))
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` went through :func:`convert`."""
    return getattr(model, "tpinv_settings", None) is not None


def _check_config(config, tree: ReductionTree) -> list[str]:
    """What of the config is not covered, one line each."""
    faults = []
    required = {
        "hidden_act": ("silu",), "attention_dropout": (0, 0.0), "use_sliding_window": (None, False), "quantization_config": (None,),
        "pretraining_tp": (None, 1), "is_causal": (None, True),
    }  # fmt: skip
    for name, values in required.items():
        if getattr(config, name, None) not in values:
            faults.append(f"config.{name}={getattr(config, name)!r} must be {values[-1]!r}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        faults.append(f"config.layer_types holds {sorted(kinds)}; only full_attention is covered")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        faults.append(f"rope_type={rope!r} changes with the length of what is seen; use one of {ROPE_TYPES}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, length in {
        "num_attention_heads * head_dim": config.num_attention_heads * width,
        "num_key_value_heads * head_dim": config.num_key_value_heads * width,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }.items():
        try:
            tree.leaf_length(length, name)
        except ValueError as error:
            faults.append(str(error))
    return faults


def _check_modules(model: nn.Module) -> list[str]:
    faults = list(guard.patched())
    for name, module in model.named_modules():
        kind, last = type(module), name.rpartition(".")[2]
        place = f"{name or 'the model'} ({kind.__name__})"
        if kind is nn.Linear:
            if last not in LINEARS:
                faults.append(f"{place}: a linear of this name is not known; known are {sorted(LINEARS)}")
        elif kind in guard.ROTARY:
            faults += guard.wrong_frequencies(place, module)
        elif kind not in CONTAINERS and kind not in REPLACEMENTS:
            faults.append(f"{place} is not covered; convert before wrapping, adapters and quantisation")
        if kind is nn.Embedding and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
            faults.append(f"{place}: max_norm, scale_grad_by_freq and sparse are not covered; leave them at their defaults")
        if isinstance(module, (llama.LlamaRMSNorm, qwen3.Qwen3RMSNorm)) and module.variance_epsilon != model.config.rms_norm_eps:
            faults.append(f"{place} has variance_epsilon={module.variance_epsilon}, the config {model.config.rms_norm_eps}")
        if module._forward_hooks or module._forward_pre_hooks:
            faults.append(f"{place} has forward hooks, which may compute anything; remove them")
        if "forward" in module.__dict__:
            faults.append(
                f"{place} was given a forward of its own (kernels, Liger, a device map), which would bypass tpinv's; load it without"
            )
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                faults.append(f"{place}.{key} is a DTensor; convert before fully_shard, and load without tp_plan")
            if key not in ("weight", "bias"):
                faults.append(f"{place}.{key} is a parameter that this module does not have by itself")
    return faults
