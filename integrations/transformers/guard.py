"""What may happen to a model after convert: looked at before every forward pass, and refused, so that nothing computes in another order.

Each module must compute what convert left there: by the function that its class has for ``forward`` (FSDP2 derives classes, which keep
it), not by one that an instance was given (kernels, Liger, accelerate's dispatch), and without hooks of others, which may return what they
like. So a new head of resize_token_embeddings, an adapter, a layer of another library are found; and by its tree, its config, its number of
rows one of the same class that comes from elsewhere. The model itself may be wrapped, compiled it may not be: between tpinv's operators a
compiler rounds differently.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from tpinv.integrations.transformers import layers
from tpinv.tree import ReductionTree

COLUMN, ROW = layers.TPInvariantColumnLinear, layers.TPInvariantRowLinear
LINEARS = {
    "q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "gate_proj": COLUMN, "up_proj": COLUMN, "lm_head": COLUMN,
    "o_proj": ROW, "down_proj": ROW,
}  # fmt: skip
MODELS = (llama.LlamaForCausalLM, llama.LlamaModel, qwen3.Qwen3ForCausalLM, qwen3.Qwen3Model)
CONTAINERS = (
    *MODELS, nn.ModuleList, llama.LlamaDecoderLayer, llama.LlamaMLP,
    qwen3.Qwen3DecoderLayer, qwen3.Qwen3MLP,
)  # fmt: skip
OTHERS = (
    layers.TPInvariantEmbedding, layers.TPInvariantLlamaRMSNorm, layers.TPInvariantQwen3RMSNorm, layers.TPInvariantSiLU,
    layers.TPInvariantLlamaAttention, layers.TPInvariantQwen3Attention, layers.TPInvariantLlamaRotaryEmbedding,
    layers.TPInvariantQwen3RotaryEmbedding,
)  # fmt: skip
FUNCTIONS = [(module, name) for module in (llama, qwen3) for name in ("apply_rotary_pos_emb", "eager_attention_forward")]
WRAPPED = "_checkpoint_wrapped_module"
ROTARY = (llama.LlamaRotaryEmbedding, qwen3.Qwen3RotaryEmbedding)
# FSDP, recordings, captured hidden states, gradients of inputs for checkpointing
HOOKS_OF = ("torch.", "tpinv.", "accelerate.", "transformers.utils.", "transformers.modeling_utils.")


class Settings(NamedTuple):
    """What a model was converted with, and the vocabulary it had."""

    tree: ReductionTree
    rope_dtype: str
    vocabulary: int


def watch(model: PreTrainedModel) -> None:
    """Looks at ``model`` before each of its forward passes from now on, and at its base model, which others call by itself."""
    for module in {model, model.base_model}:
        module.register_forward_pre_hook(_look, prepend=True)


def _look(module: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling() or _compiles_parts():
        raise ValueError("torch.compile rounds differently between tpinv's operators; run the converted model without it")
    told = list(find_faults(module))
    if told:
        raise ValueError("this model was changed after convert:\n  " + "\n  ".join(told))


def _compiles_parts() -> bool:
    """Whether torch.compile is on around this call. Where the whole cannot be traced, it goes on with the parts, which would not notice."""
    from torch._C._dynamo import eval_frame

    return eval_frame.get_eval_frame_callback() not in (None, False)


def find_faults(model: nn.Module) -> Iterator[str]:
    """What of a converted model is not as convert leaves it, one line each."""
    known, (tree, rope_dtype, vocabulary) = _known_forwards(), model.tpinv_settings
    replaced = (*set(LINEARS.values()), *OTHERS)
    for name, module in model.named_modules():
        if isinstance(module, CheckpointWrapper):
            continue
        place = f"{name or 'the model'} ({type(module).__name__})"
        last = name.replace(f".{WRAPPED}", "").rpartition(".")[2]
        forwards = {LINEARS[last].forward} if last in LINEARS else known
        if type(module).forward not in forwards:
            yield f"{place} is not what convert left there; it cannot be exchanged, wrapped or adapted"
        elif "forward" in module.__dict__ and module is not model:
            yield f"{place} was given a forward of its own; undo what replaced it (kernels, Liger, a device map)"
        elif isinstance(module, replaced) and getattr(module, "tree", None) != tree:
            yield f"{place} comes from elsewhere: its tree is {getattr(module, 'tree', None)}, the model's {tree}"
        elif last in ("lm_head", "embed_tokens") and len(module.weight) != vocabulary:
            yield f"{place} has {len(module.weight)} rows, and convert found {vocabulary}; resize the embeddings before convert"
        elif getattr(module, "config", model.config) is not model.config:
            yield f"{place} comes from elsewhere: its config is not the model's"
        else:
            yield from _changed_settings(module, place, rope_dtype, model.config)
        yield from (f"{place} has the hook {hook}, which may compute anything; remove it" for hook in foreign_hooks(module))
    loss = getattr(model, "loss_function", None) if hasattr(model, "lm_head") else None
    if loss is not None and getattr(loss, "func", None) is not layers.causal_lm_loss:
        yield f"loss_function is {loss}; the one that convert set is tpinv's"
    yield from patched()


def _changed_settings(module: nn.Module, place: str, rope_dtype: str, config) -> Iterator[str]:
    """Attributes that another module of the same class may have otherwise."""
    if isinstance(module, ROTARY):
        if module.inv_freq.dtype != torch.float32:
            yield f"{place}: a cast of the model rounded rope's frequencies to {module.inv_freq.dtype}; cast it before convert"
        if module.rope_dtype != rope_dtype:
            yield f"{place} comes from elsewhere: it rotates in {module.rope_dtype}, the model in {rope_dtype}"
    elif isinstance(module, layers._RMSNorm) and module.variance_epsilon != config.rms_norm_eps:
        yield f"{place} has variance_epsilon={module.variance_epsilon}, the config {config.rms_norm_eps}"
    elif isinstance(module, layers._Attention) and (module.scaling != module.head_dim**-0.5 or module.attention_dropout):
        yield f"{place} has scaling={module.scaling}, attention_dropout={module.attention_dropout}; they were 1 / sqrt(head_dim) and 0"


def restore_frequencies(rotary: nn.Module) -> None:
    """rope's frequencies as engines and other frameworks have them: in float32, which a cast of the model (``model.bfloat16()``) rounds, and
    a CPU's, which they are not where a model was built on a GPU."""
    for name, value in _frequencies(rotary).items():
        setattr(rotary, name, value.to(getattr(rotary, name).device))


def wrong_frequencies(place: str, rotary: nn.Module) -> Iterator[str]:
    """A line if rope's frequencies are not, but for rounding, those of the config."""
    for name, value in _frequencies(rotary).items():
        found = getattr(rotary, name)
        if found.is_meta:
            yield f"{place}.{name} is on meta, where nothing will compute it; load the model before convert"
        elif not torch.allclose(found.cpu().float(), value, rtol=0.01, atol=0):
            yield f"{place}.{name} holds other frequencies than those of the config; set rope_parameters instead"


def _frequencies(rotary: nn.Module) -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        fresh = type(rotary)(rotary.config)
    named = {name: getattr(fresh, name, None) for name in ("inv_freq", "original_inv_freq")}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


@functools.cache
def _known_forwards() -> frozenset:
    return frozenset(kind.forward for kind in (*CONTAINERS, *OTHERS))


def foreign_hooks(module: nn.Module) -> list[str]:
    """Forward hooks of others on ``module``, by name."""
    found = []
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = hook.func if isinstance(hook, functools.partial) else hook
        where = getattr(function, "__module__", None) or type(function).__module__
        if not f"{where}.".startswith(HOOKS_OF):
            found.append(f"{where}.{getattr(function, '__qualname__', type(function).__name__)}")
    return found


def patched() -> Iterator[str]:
    """Functions of transformers that another library has replaced underneath."""
    for module, name in FUNCTIONS:
        where = getattr(module, name).__module__
        if where != module.__name__:
            yield f"{module.__name__}.{name} was replaced by {where}'s; start a process that does not"
    for kind in CONTAINERS:
        if kind.forward.__module__ not in (kind.__module__, "torch.nn.modules.module"):
            yield f"{kind.__name__}.forward was replaced by {kind.forward.__module__}'s; start a process that does not"
