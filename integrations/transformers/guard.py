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
LOOKED = "tpinv_looked"  # set while a pass of the model around lasts
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
    base = model.base_model
    base.register_forward_pre_hook(_look, prepend=True)
    if base is not model:
        model.register_forward_pre_hook(_look_for_base, prepend=True)
        model.register_forward_hook(_leave_base, always_call=True)


def _look_for_base(model: PreTrainedModel, args: tuple) -> None:
    """Which need not look again while this pass lasts."""
    _look(model, args)
    vars(model.base_model)[LOOKED] = True


def _leave_base(model: PreTrainedModel, args: tuple, output) -> None:
    vars(model.base_model).pop(LOOKED, None)


def _look(module: nn.Module, args: tuple) -> None:
    if vars(module).get(LOOKED):
        return
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
    (tree, rope_dtype, vocabulary), config = model.tpinv_settings, model.config
    for name, module in model.named_modules():
        kind, own = type(module), vars(module)
        last = name.rpartition(".")[2]
        if kind is CheckpointWrapper:
            continue
        if last == WRAPPED:
            last = name.removesuffix(f".{WRAPPED}").rpartition(".")[2]
        told, role = None, _role(kind, last)
        if role is None:
            told = "is not what convert left there; it cannot be exchanged, wrapped or adapted"
        elif "forward" in own and module is not model:
            told = "was given a forward of its own; undo what replaced it (kernels, Liger, a device map)"
        elif role != "holds" and own.get("tree") != tree:
            told = f"comes from elsewhere: its tree is {own.get('tree')}, the model's {tree}"
        elif own.get("config", config) is not config:
            told = "comes from elsewhere: its config is not the model's"
        elif last in ("lm_head", "embed_tokens") and len(module.weight) != vocabulary:
            told = f"has {len(module.weight)} rows, and convert found {vocabulary}; resize the embeddings before convert"
        elif role == "norm" and module.variance_epsilon != config.rms_norm_eps:
            told = f"has variance_epsilon={module.variance_epsilon}, the config {config.rms_norm_eps}"
        elif role == "attention" and (module.scaling != module.head_dim**-0.5 or module.attention_dropout):
            told = f"has scaling={module.scaling}, attention_dropout={module.attention_dropout}; they were 1 / sqrt(head_dim) and 0"
        elif role == "rotary" and module.inv_freq.dtype != torch.float32:
            told = f"has rope's frequencies in {module.inv_freq.dtype}, to which a cast of the model rounded them; cast it before convert"
        elif role == "rotary" and module.rope_dtype != rope_dtype:
            told = f"comes from elsewhere: it rotates in {module.rope_dtype}, the model in {rope_dtype}"
        if told:
            yield f"{name or 'the model'} ({kind.__name__}) {told}"
        if own["_forward_pre_hooks"] or own["_forward_hooks"]:
            for hook in foreign_hooks(module):
                yield f"{name or 'the model'} ({kind.__name__}) has the hook {hook}, which may compute anything; remove it"
    loss = getattr(model, "loss_function", None) if hasattr(model, "lm_head") else None
    if loss is not None and getattr(loss, "func", None) is not layers.causal_lm_loss:
        yield f"loss_function is {loss}; the one that convert set is tpinv's"
    yield from patched()


@functools.lru_cache(maxsize=512)
def _role(kind: type, last: str) -> str | None:
    """What a module of this class, under this last part of its name, does here; None if it is not one that convert leaves."""
    if last in LINEARS:
        return "linear" if kind.forward is LINEARS[last].forward else None
    if kind.forward not in _known_forwards():
        return None
    roles = {layers._RMSNorm: "norm", layers._Attention: "attention", layers._Rotary: "rotary", OTHERS: "other"}
    return next((role for kinds, role in roles.items() if issubclass(kind, kinds)), "holds")


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
