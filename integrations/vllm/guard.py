"""The finished model, in every worker before it serves a token: every module is ours or known, attention is ours, stock's sums over ranks
are disarmed. Settings are rules.py's."""

import functools

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group

from tpinv.contract import fingerprint
from tpinv.integrations.vllm import attention, layers, options, reports, speculation

# Modules that hold others, or that compute nothing: by the name of their class and the module that defines it.
_HOLDERS = {
    "vllm.model_executor.models.llama": {"LlamaModel", "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP"},
    "vllm.model_executor.models.qwen2": {"Qwen2Model", "Qwen2MLP"},
    "vllm.model_executor.models.qwen3": {"Qwen3Model", "Qwen3DecoderLayer", "Qwen3Attention"},
    "vllm.model_executor.layers.rotary_embedding.common": {"ApplyRotaryEmb"},  # what a rotary embedding computes with on a GPU of AMD
    "torch.nn.modules.container": {"ModuleList"},
}
# Over the tensor-parallel ranks; what adds floats is refused, what moves them is counted.
_SUMS = ("all_reduce", "reduce_scatter", "reduce_scatterv")
_MOVES = ("all_gather", "all_gatherv", "gather", "broadcast")


def check_model(model: torch.nn.Module, config) -> None:
    """ValueError unless every module is one of ours or known and attention is ours. Then stock's sums are disarmed, and the report is
    written that assert_active looks for."""
    ours = tuple(layers.REPLACED.values())
    known = functools.partial(_known, model, ours)
    foreign = [
        f"  - {name}: {type(module).__module__}.{type(module).__name__}" for name, module in model.named_modules() if not known(module)
    ]
    if foreign:
        raise ValueError("these modules are neither tpinv's nor known to be invariant; use a model without them:\n" + "\n".join(foreign))
    attention.check_layers(model)
    disarm_stock_collectives()
    rank = get_tensor_model_parallel_rank()
    reports.write(
        config,
        rank,
        {
            "rank": rank,
            "ranks": config.parallel_config.tensor_parallel_size,
            "fingerprint": fingerprint(options.tree()),
            "modules": sum(isinstance(module, ours) for module in model.modules()),
            "attention": attention.backend_name(model),
            "rope": layers.rope_names(model),
        },
    )


def _known(model: torch.nn.Module, ours: tuple, module: torch.nn.Module) -> bool:
    if module is model or type(module) in ours:
        return True
    if attention.is_layer(module):
        return True
    # vLLM derives a class of the same name where a model is compiled.
    return type(module).__name__ in _HOLDERS.get(type(module).__module__, ()) and not module._parameters


calls: dict[str, int] = {}  # of this process: stock's collectives over the tensor-parallel ranks since the model was built


def disarm_stock_collectives() -> None:
    """Makes vLLM's tensor-parallel communicator refuse to add floats, and count what else it is asked for."""
    communicator = getattr(get_tp_group(), "device_communicator", None)
    if communicator is None:
        return

    def refuse(name, original, *arguments, **keywords):
        if speculation.is_drafting():  # whose bits no answer depends on
            return original(*arguments, **keywords)
        raise RuntimeError(f"vLLM's {name} over tensor-parallel ranks was called, whose order follows the ranks; report what was running")

    def count(name, original, *arguments, **keywords):
        calls[name] = calls.get(name, 0) + 1
        return original(*arguments, **keywords)

    for name in _SUMS:
        if hasattr(communicator, name):
            setattr(communicator, name, functools.partial(refuse, name, getattr(communicator, name)))
    for name in _MOVES:
        original = getattr(communicator, name, None)
        if original is not None and not isinstance(original, functools.partial):
            setattr(communicator, name, functools.partial(count, name, original))
